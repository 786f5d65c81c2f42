"""How likely tokens were, before any sampling setting.

With numpy: 120 µs for a vocabulary of 128,256, 220 µs with its 20 best. An array of candidates for the engine's own
samplers takes 1,300 µs: 400 to fill it, 870 for the probabilities (measured). See `rows.py` for what numpy costs.
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
    if best == math.inf:
        # These share the probability, and nothing is left for others.
        row = np.where(row == np.inf, np.float32(0), np.float32(-np.inf))
        best = 0.0
    log_total = 0.0
    if best > -math.inf:
        # Below the least number of 32 bits is -infinity, as it should be.
        with np.errstate(over="ignore"):
            log_total = math.log(np.exp(row - np.float32(best)).sum(dtype=np.float64))

    def logprob(token: int) -> float:
        logit = float(row[token])
        # The best first: beside a huge logit the sum would be lost.
        return max(logit - best - log_total, IMPOSSIBLE) if logit > -math.inf else IMPOSSIBLE

    return logprob(chosen), [(token, logprob(token)) for token in _most_likely(row, top).tolist()]


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
