"""The prefix cache's second tier: prefixes that were saved, found for a prompt and put back when they are of use.

Restoring is lazy. At load only the heads of the files are read; a state is read, checked and restored when a prompt
begins with its tokens and finds notably fewer in memory. Saving happens when the runner leaves.
"""

from __future__ import annotations

import functools
import time
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lmd.runner.kv_files import KvFiles
from lmd.runner.kv_format import SavedPrefix
from lmd.runner.kv_state import SequenceState

#: Fewer tokens than this are not worth a file, nor reading one: the engine reads them in the time of a few steps.
WORTH_TOKENS = 32

# What a disk is taken to write before the first file shows what it does.
_FIRST_GUESS_BYTES_S = 200e6
# A file that is written faster than this says nothing about larger ones.
_TELLING_S = 0.01


@dataclass(frozen=True, slots=True)
class Candidate:
    """A prefix in memory that may be worth saving: all that a sequence holds, from position 0 on.

    Attributes:
        used_at: when it was used last, in seconds since the epoch.
    """

    sequence: int
    tokens: array[int]
    scope: str
    public: bool
    used_at: float


class SavedPrefixes:
    """What is saved for one context. Not thread-safe."""

    def __init__(self, files: KvFiles, state: SequenceState) -> None:
        self._files = files
        self._state = state

    @classmethod
    def open(
        cls, directory: Path, quota_bytes: int, state: SequenceState, fingerprint: bytes, *, divisible: bool
    ) -> SavedPrefixes:
        """Read what there is in *directory*; see `KvFiles` for the rest. Nothing is read of the states."""
        files = KvFiles(directory, quota_bytes, fingerprint, divisible=divisible, slack_tokens=WORTH_TOKENS - 1)
        files.open()
        return cls(files, state)

    def find(self, prompt: array[int], scope: str, *, in_memory: int) -> tuple[SavedPrefix, int] | None:
        """Return the saved prefix that is worth restoring for *prompt*, and how many tokens they share.

        *in_memory* is how many the prompt finds without it. The last token of the prompt is never counted.
        """
        return self._files.find(prompt, scope, beyond=in_memory + WORTH_TOKENS - 1)

    def restore(self, saved: SavedPrefix, sequence: int, *, make_room: Callable[[], bool]) -> bool:
        """Put a saved prefix into a sequence, in place of what that held; return whether it is there.

        *make_room* frees cells of the memory and returns whether it could. A state that does not go in when there is no
        more to free is taken for one that never will, and removed.
        """
        with self._files.read(saved) as content:
            restored = False
            while content is not None and not restored:
                restored = self._state.restore(sequence, content, len(saved.tokens))
                if not restored and not make_room():
                    break
        if not restored:
            self._files.discard(saved)
        return restored

    def save(self, candidates: Iterable[Candidate], *, allowed_s: float) -> int:
        """Save what is worth it, the most recently used first, in about *allowed_s*; return how many are on disk now.

        What would take longer than is left is skipped, going by what the disk has done so far.
        """
        deadline = time.monotonic() + allowed_s
        bytes_s = _FIRST_GUESS_BYTES_S
        done = 0
        for candidate in _by_use(candidates):
            size_bytes = self._state.size(candidate.sequence)
            began = time.monotonic()
            if not size_bytes or began + size_bytes / bytes_s > deadline:
                continue
            saved = self._files.save(
                candidate.tokens,
                candidate.scope,
                public=candidate.public,
                used_at=candidate.used_at,
                state_bytes=size_bytes,
                write_state=functools.partial(self._state.save, candidate.sequence, len(candidate.tokens)),
            )
            if saved is not None:
                done += 1
                if (took_s := time.monotonic() - began) > _TELLING_S:
                    bytes_s = size_bytes / took_s
        return done


def _by_use(candidates: Iterable[Candidate]) -> Sequence[Candidate]:
    worth = [candidate for candidate in candidates if len(candidate.tokens) >= WORTH_TOKENS]
    # Of two with the same use the longer one first: it may make the other superfluous.
    return sorted(worth, key=lambda candidate: (-candidate.used_at, -len(candidate.tokens)))
