"""Reads the weights of a model: the one that is served, or the one that drafts for it."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

from lmd.runner.gpus import MAIN_MEMORY, Placement


class LoadAborted(Exception):
    """Raised when the progress callback asked to stop."""


def load_weights(
    llama: Any,
    paths: Sequence[str],
    *,
    num_gpu: int,
    use_mmap: bool,
    on_progress: Callable[[float], bool],
    placement: Placement = MAIN_MEMORY,
    rearrange: bool = True,
) -> Any:
    """Return the engine's model of the files at *paths*, all shards in order; nothing when the engine refuses them.

    *num_gpu* layers, the last ones, go where *placement* says; all with -1. *on_progress* gets a fraction now and then.
    The engine copies weights into the order that suits the processor best when *rearrange* is set, which pays
    after some tokens.

    Raises:
        LoadAborted: *on_progress* returned false.
    """
    aborted = False

    def progress(fraction: float, _user_data: object) -> bool:
        nonlocal aborted
        aborted = aborted or not on_progress(fraction)
        return not aborted

    callback = llama.llama_progress_callback(progress)
    params = llama.llama_model_default_params()
    params.n_gpu_layers = num_gpu
    kept = placement.fill(llama, params)
    params.load_mode = llama.LLAMA_LOAD_MODE_MMAP if use_mmap else llama.LLAMA_LOAD_MODE_NONE
    params.use_extra_bufts = rearrange
    params.progress_callback = callback
    names = [path.encode() for path in paths]
    if len(names) == 1:
        native = llama.llama_model_load_from_file(names[0], params)
    else:
        native = llama.llama_model_load_from_splits((ctypes.c_char_p * len(names))(*names), len(names), params)
    del kept  # until here the engine may have read them
    if aborted:
        raise LoadAborted
    return native
