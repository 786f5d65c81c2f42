"""How likely tokens were, before any sampling setting.

With numpy: 130 µs for a vocabulary of 128,256 and its 20 best, where the engine's samplers over an array of candidates
take 1,500 µs, most of it for filling the array and sorting (measured); see `rows.py` for what numpy costs.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from lmd.runner.rows import row_at

if TYPE_CHECKING:
    from lmd.runner.rows import Ids, Row

#: The log probability of what cannot happen. Minus infinity would be right, but no JSON has it.
IMPOSSIBLE = -9999.0

# Logits are compared by the best of so many neighbours first.
_BLOCK = 128


def logprobs_of(logits_address: int, vocab_size: int, chosen: int, top: int) -> tuple[float, list[tuple[int, float]]]:
    """Return the natural logarithm of the probability of *chosen*, and the *top* most likely tokens with theirs.

    The best is first; of equals that with the lower id. The distribution is the softmax of the logits as they are; NaN
    counts as minus infinity. No value is below `IMPOSSIBLE`.
    """
    import numpy as np

    row = row_at(logits_address, vocab_size)
    best = float(row.max())
    if math.isnan(best):
        row = np.where(np.isnan(row), np.float32(-np.inf), row)
        best = float(row.max())
    if math.isinf(best):
        # All are impossible, or all but some that share the probability.
        row = np.where(row == np.inf, np.float32(0), np.float32(-np.inf))
        best = 0.0 if best > 0 else best
    total = float(np.exp(row - np.float32(best)).sum(dtype=np.float64)) if math.isfinite(best) else 1.0
    log_total = (best if math.isfinite(best) else 0.0) + math.log(total)

    def logprob(token: int) -> float:
        return max(float(row[token]) - log_total, IMPOSSIBLE)

    return logprob(chosen), [(int(token), logprob(int(token))) for token in _most_likely(row, top)]


def _most_likely(row: Row, count: int) -> Ids:
    """Return the tokens with the *count* highest logits, best first, of equals the lower id first."""
    import numpy as np

    candidates = np.arange(len(row), dtype=np.int32)
    if count <= 0:
        return candidates[:0]
    blocks = len(row) // _BLOCK
    if blocks > count:
        # Each of the best blocks has a token at least as good as its last one's best, so the best tokens are too.
        bests = row[: blocks * _BLOCK].reshape(blocks, _BLOCK).max(axis=1)
        least = np.partition(bests, blocks - count)[blocks - count]
        candidates = np.flatnonzero(row >= least).astype(np.int32)
    order = np.argsort(-row[candidates], kind="stable")
    return candidates[order[:count]]
