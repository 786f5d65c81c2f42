"""What an estimate says."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LayerMemory:
    """What one repeating layer takes wherever it is placed: its weights, and its keys, values and recurrent state."""

    weights_bytes: int
    kv_bytes: int

    @property
    def total_bytes(self) -> int:
        """Both."""
        return self.weights_bytes + self.kv_bytes


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes by what they are for, and by what can be placed apart.

    Attributes:
        weights_bytes: all tensors that the engine loads, each once.
        kv_bytes: keys, values and recurrent state of all layers.
        compute_bytes: scratch memory of the graph, and rows of scores; what the busiest single device needs.
        layers: the repeating layers in order; `num_gpu` counts them from the end.
        input_bytes: the token embedding and what belongs to it: it stays in main memory.
        output_bytes: the last norm and the head: the one layer that `num_gpu` counts beside the repeating ones, and
            the first to be placed. Where the head is the token embedding (tied), an accelerator gets a copy of it, so
            that input, layers and output can add up to more than *weights_bytes*.
        active_bytes: weights that are read for a token: of a mixture of experts, those that are used.
    """

    weights_bytes: int
    kv_bytes: int
    compute_bytes: int
    layers: tuple[LayerMemory, ...] = ()
    input_bytes: int = 0
    output_bytes: int = 0
    active_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """All of it, on one device that reads the weights where they are."""
        return self.weights_bytes + self.kv_bytes + self.compute_bytes
