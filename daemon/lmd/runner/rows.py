"""Rows of logits as numpy arrays over the engine's own memory.

numpy is imported by the first request that needs it: that takes 40 ms and 10 MB of memory that other processes do not
share, 19 MB with what they do (measured). A runner whose requests only need the engine's own samplers never pays it.
"""

from __future__ import annotations

import ctypes
import sys
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Row: TypeAlias = npt.NDArray[np.float32]
    Ids: TypeAlias = npt.NDArray[np.int32]


def numpy_is_here() -> bool:
    """Tell whether numpy has been imported already, so that using it costs nothing more."""
    return "numpy" in sys.modules


def row_at(address: int, size: int) -> Row:
    """Return *size* logits at *address*; no copy, so it holds until the next decode."""
    import numpy as np

    return np.frombuffer(memoryview((ctypes.c_float * size).from_address(address)), dtype=np.float32)


def logits_address(llama: Any, context: Any, index: int) -> int:
    """Return where the logits of a batch's token are.

    Raises:
        IndexError: the token was decoded without asking for them.
    """
    pointer = llama.llama_get_logits_ith(context, index)
    if not pointer:
        raise IndexError(f"no logits for token {index} of the batch")
    return ctypes.addressof(pointer.contents)


def best_of(row: Row) -> int:
    """Return the token with the highest logit, the first of equals; NaN never wins. 0 when all are NaN."""
    import numpy as np

    best = int(row.argmax())
    if row[best] != row[best]:
        # numpy takes the first NaN for the highest number.
        best = int(np.where(np.isnan(row), np.float32(-np.inf), row).argmax())
    return best
