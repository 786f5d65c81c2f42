"""How much of the prompts a step reads: what takes no longer than those who wait for their next token should wait.

It goes by time, not by tokens: a token of a prompt takes 0.05 ms on an accelerator and 50 for a large model on a CPU,
and more at the end of a long context than at its beginning.
"""

from __future__ import annotations

# What a step may take while answers are generated; while as many prompts are read; and while nobody waits for a
# next token, but the engine should still look up now and then: requests are taken back, the daemon wants to hear of it.
_FEW_PROMPTS_S, _MANY_PROMPTS_S, _ALONE_S = 0.35, 1.0, 2.0

# Before anything was measured, answers are given this part of a step.
_FIRST_GUESS = 4
# Less would fill batches too poorly.
_MINIMUM = 32
# Attention on a CPU goes by tiles of so many tokens; a begun tile costs as much as a full one. Source:
# ggml_fa_tile_config of llama.cpp.
_TILE = 64
# Steps with fewer tokens say little about what one costs.
_TELLING = 16
# The weight of the newest step in the running mean.
_NEWEST = 0.5


class PrefillPace:
    """Learns what a token of a prompt costs, and shares out steps by it."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._token_s = 0.0

    def note(self, tokens: int, seconds: float) -> None:
        """Learn from a step that has read *tokens* of prompts."""
        if tokens >= _TELLING:
            newest = seconds / tokens
            self._token_s += (newest - self._token_s) * (_NEWEST if self._token_s else 1.0)

    def budget(self, reading: int, generating: int) -> int:
        """Return how many tokens the next step reads, with so many prompts and answers under way.

        Where no fewer wait for their first token than for their next one, prompts get more of the time; one alone does
        not.
        """
        if self._token_s <= 0.0:
            share = self._capacity // _FIRST_GUESS if generating else self._capacity
        else:
            many = reading > 1 and reading >= generating
            allowed_s = _ALONE_S if not generating else _MANY_PROMPTS_S if many else _FEW_PROMPTS_S
            share = int(min(allowed_s / self._token_s, self._capacity))
        if share >= _TILE:
            share -= share % _TILE
        return min(max(share, _MINIMUM), self._capacity)
