"""The adapters of a model, and the scales that a request asks for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lmd.registry.errors import InvalidRequest
from lmd.registry.lm_config import MAX_SCALE
from lmd.runner.v1 import frames_pb2 as frames

_SUFFIX = ".gguf"


@dataclass(frozen=True, slots=True)
class AdapterFile:
    """A LoRA adapter of a model: the name it had at its source, its file, and how much of it is added by default."""

    name: str
    path: Path
    scale: float
    size_bytes: int


def check_scales(wanted: Mapping[str, float]) -> None:
    """Make sure that scales are in their range. Raises: InvalidRequest."""
    for name, scale in wanted.items():
        if not -MAX_SCALE <= scale <= MAX_SCALE:
            raise InvalidRequest(
                f"the scale of the adapter `{_shown(name)}` must be a number from {-MAX_SCALE:g} to {MAX_SCALE:g}, "
                f"not {scale:g}",
                field="adapters",
            )


def scale_frames(adapters: Sequence[AdapterFile], wanted: Mapping[str, float]) -> list[frames.AdapterScale]:
    """Return what a runner is told of the scales that a request asks for.

    An adapter is named by its file, with or without `.gguf`, or by its number among those of the model, from 1.

    Raises:
        InvalidRequest: the model has no such adapter, or several.
    """
    found: dict[int, float] = {}
    for name, scale in wanted.items():
        number = _number_of(adapters, name)
        if number in found:
            raise InvalidRequest(f"the adapter `{_shown(name)}` is named twice", field="adapters")
        found[number] = scale
    return [frames.AdapterScale(adapter=number, scale=scale) for number, scale in sorted(found.items())]


def _number_of(adapters: Sequence[AdapterFile], name: str) -> int:
    numbers = [
        number for number, adapter in enumerate(adapters) if name in (adapter.name, adapter.name.removesuffix(_SUFFIX))
    ]
    if not numbers and name.isascii() and name.isdigit() and 1 <= int(name[:9]) <= len(adapters):
        numbers = [int(name[:9]) - 1]
    if len(numbers) == 1:
        return numbers[0]
    if numbers:
        choices = " or ".join(str(number + 1) for number in numbers)
        raise InvalidRequest(
            f"the model has {len(numbers)} adapters called `{_shown(name)}`",
            field="adapters",
            hint=f"name one by its number, {choices}",
        )
    if not adapters:
        raise InvalidRequest(
            f"the model has no adapters, so none called `{_shown(name)}`",
            field="adapters",
            hint="create a model that has it, with ADAPTER in its Modelfile",
        )
    names = ", ".join(f"`{_shown(adapter.name.removesuffix(_SUFFIX))}`" for adapter in adapters)
    raise InvalidRequest(f"the model has no adapter called `{_shown(name)}`", field="adapters", hint=f"it has {names}")


def _shown(name: str) -> str:
    return ascii(name[:80])[1:-1]
