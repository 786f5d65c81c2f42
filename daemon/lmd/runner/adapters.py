"""LoRA adapters: small matrices that the engine adds to the model's while it decodes, as much as each request asks.

An adapter belongs to a model and applies to a context, so what is decoded in one batch has the same adapters. Changing
them makes the engine plan its graphs anew with the next batch: 2.7 ms with 24 layers, where a token takes 30 ms (0.4 B
on two cores, measured).

Source for what holds: `llama-adapter.cpp` and `llama-context.cpp` of llama-cpp-python 0.3.36. Adapters must be loaded
before the first context is made, since that reserves nodes of its graphs for them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

from lmd.runner.v1 import frames_pb2

#: How much of each adapter is added, in the order of `Load.adapters`.
Scales = tuple[float, ...]


class AdapterRefused(Exception):
    """Raised when an adapter cannot be used; the message says which and where to look."""


class UnknownAdapter(Exception):
    """Raised when a request names an adapter that the model does not have."""


class Adapters:
    """The adapters of one model. Everything native lives until the process ends.

    Attributes:
        scales: those of `Load`, for requests that do not say otherwise.
    """

    def __init__(self, llama: Any, native: Any, wanted: Sequence[frames_pb2.Adapter]) -> None:
        """Load them. Raises: AdapterRefused."""
        self._llama = llama
        self._handles = [_load(llama, native, adapter.path) for adapter in wanted]
        self.scales: Scales = tuple(adapter.scale for adapter in wanted)

    def asked(self, wanted: Sequence[frames_pb2.AdapterScale]) -> Scales | None:
        """Return the scales for a request; None when they are the model's.

        Raises:
            UnknownAdapter: there is no such adapter.
        """
        scales = list(self.scales)
        for each in wanted:
            if not 0 <= each.adapter < len(scales):
                raise UnknownAdapter(f"the model has {len(scales)} adapters, and no number {each.adapter}")
            scales[each.adapter] = each.scale
        found = tuple(scales)
        return None if found == self.scales else found

    def apply(self, context: Any, scales: Scales | None) -> None:
        """Have a context decode with these scales, or the model's; those at 0 cost nothing."""
        if not self._handles:
            return
        pairs = [
            (handle, scale)
            for handle, scale in zip(self._handles, self.scales if scales is None else scales, strict=True)
            if scale
        ]
        handles = (self._llama.llama_adapter_lora_p_ctypes * len(pairs))(*(handle for handle, _ in pairs))
        factors = (ctypes.c_float * len(pairs))(*(scale for _, scale in pairs))
        self._llama.llama_set_adapters_lora(context, handles, len(pairs), factors)


def _load(llama: Any, native: Any, path: str) -> Any:
    adapter = llama.llama_adapter_lora_init(native, path.encode())
    if not adapter:
        raise AdapterRefused(f"the engine refuses the adapter `{path}`")
    if llama.llama_adapter_get_alora_n_invocation_tokens(adapter):
        raise AdapterRefused(f"the adapter `{path}` starts at certain tokens only (aLoRA), which is not supported")
    return adapter
