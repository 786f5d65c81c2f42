"""How long a model that fails is left alone."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from lmd.daemon.errors import ModelIncompatible, TemplateFailed
from lmd.registry.errors import LmdError


@dataclass(slots=True)
class Backoff:
    """Doubles the pause before the next load with each failure in a row, from *first_s* up to *cap_s*."""

    first_s: float
    cap_s: float
    failures: int = 0
    _retry_at: float = 0.0
    _refusal: LmdError | None = None

    def note_failure(self, error: LmdError | None = None) -> None:
        """Count a failure that happened now."""
        self.failures += 1
        self._retry_at = _now() + min(self.cap_s, self.first_s * 2 ** min(self.failures - 1, 16))
        # Of these the engine is sure: the same file fails in the same way.
        self._refusal = error if isinstance(error, ModelIncompatible | TemplateFailed) else None

    def reset(self) -> None:
        """Begin again with the shortest pause."""
        self.failures = 0

    def pause_s(self) -> float:
        """Return how long the next load has to wait; never negative."""
        return max(0.0, self._retry_at - _now())

    def refusal(self) -> LmdError | None:
        """Return the error that the next load would end with, while it is fresh."""
        return self._refusal if self.pause_s() > 0 else None


def _now() -> float:
    return asyncio.get_running_loop().time()
