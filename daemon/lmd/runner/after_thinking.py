"""Holds an answer to a format only after the model has thought.

Thoughts are free: any token may come until the closer is written, in whatever tokens. Then the inner constraint takes
over. Where the prompt has not opened the thoughts, the model chooses with its first tokens: the opener, or what the
inner constraint allows. It cannot end its answer before the inner constraint lets it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Protocol

from lmd.runner.answer_style import Gate
from lmd.runner.token_mask import forbid

_SPACE = b" \t\r\n"
# What models write between their thoughts and the answer: line breaks, seldom more than two.
_SPACE_AFTER = 4


class Inner(Protocol):
    """What follows an answer from its first token on; see `structured.Constraint`."""

    @property
    def complete(self) -> bool:
        """Nothing but the end can follow."""

    @property
    def accepting(self) -> bool:
        """The text so far is valid as a whole."""

    def allowed(self) -> bytes:
        """Return a bit for each token."""

    def accept(self, token: int) -> bool:
        """Go on with a token, or return False."""

    def copy(self) -> Inner:
        """Return an independent one at the same place."""


class GateTables:
    """What a gate means for a vocabulary."""

    def __init__(self, gate: Gate, pieces: Sequence[bytes], ends: Collection[int]) -> None:
        """Read the vocabulary once: 0.1 s for 128,000 tokens.

        *pieces* holds the bytes of each token as the answer shows it, special tokens of the gate included; those of
        *ends* end an answer.
        """
        self.gate = gate
        self.pieces = pieces
        self.ends = frozenset(ends)
        self.opener, self.closer = gate.opener.encode(), gate.closer.encode()
        self.lead, self.lead_after = gate.lead.encode(), gate.lead_after.encode()
        literals = (self.opener, self.lead, self.lead_after)
        self._parts: dict[bytes, list[int]] = {
            text[begin:end]: []
            for text in literals
            for begin in range(len(text))
            for end in range(begin + 1, len(text) + 1)
        }
        self._spaces: list[int] = []
        self._closing: list[int] = []
        last = self.closer[-1]
        for token, piece in enumerate(pieces):
            if token in self.ends or not piece:
                continue
            if piece in self._parts:
                self._parts[piece].append(token)
            if len(piece) <= _SPACE_AFTER and not piece.strip(_SPACE):
                self._spaces.append(token)
            if last in piece:
                self._closing.append(token)
        self._jumps = _jumps(self.closer)
        self.mask_bytes = -(-(len(pieces) + 1) // 32) * 4
        self.begins_with: Callable[[bytes], tuple[int, ...]] = functools.cache(self._begins_with)
        self.thinking: Callable[[int], bytes] = functools.cache(self._thinking)

    def spaces(self, room: int) -> Iterable[int]:
        """Return the tokens that are whitespace of at most so many bytes."""
        return (token for token in self._spaces if len(self.pieces[token]) <= room)

    def go_on(self, matched: int, piece: bytes) -> tuple[int, bytes | None]:
        """Follow the closer through a piece.

        Returns how much of it has been matched, and, once that is all, what comes after it.
        """
        for place, byte in enumerate(piece):
            while matched and self.closer[matched] != byte:
                matched = self._jumps[matched - 1]
            matched += self.closer[matched] == byte
            if matched == len(self.closer):
                return matched, piece[place + 1 :]
        return matched, None

    def may_follow(self, rest: bytes) -> bool:
        """Tell whether a token may have *rest* after the closer: the inner constraint has to see all that is its."""
        return not rest.strip(_SPACE) and not (rest and self.lead_after)

    def _begins_with(self, text: bytes) -> tuple[int, ...]:
        """Return the tokens with which *text*, the rest of a literal, can begin."""
        return tuple(token for end in range(1, len(text) + 1) for token in self._parts[text[:end]])

    def _thinking(self, matched: int) -> bytes:
        """Return a bit for each token: all but the ends, and those that would say more than the closer.

        *matched* is how much of the closer has just been written.
        """
        bits = bytearray(b"\xff" * self.mask_bytes)
        forbidden = set(self.ends)
        for token in self._closing:
            _, rest = self.go_on(matched, self.pieces[token])
            if rest is not None and not self.may_follow(rest):
                forbidden.add(token)
        for token in forbidden:
            bits[token // 8] &= ~(1 << token % 8)
        return bytes(bits)


def _jumps(text: bytes) -> Sequence[int]:
    """Return, for each beginning of *text*, the length of its longest end that *text* begins with as well."""
    jumps = [0] * len(text)
    for place in range(1, len(text)):
        length = jumps[place - 1]
        while length and text[place] != text[length]:
            length = jumps[length - 1]
        jumps[place] = length + (text[place] == text[length])
    return jumps


class AfterThinking:
    """A constraint behind a gate. For one thread, the engine's."""

    def __init__(self, tables: GateTables, inner: Inner) -> None:
        self._tables = tables
        # At its beginning: what was tried before the thoughts began is not the answer.
        self._fresh = inner
        self._inner: Inner | None = None
        self._literals: list[tuple[bytes, bool]] = []
        # How much of the closer has just been written; None while the model does not think.
        self._matched: int | None = None
        self._space_left = 0
        self._literals.append((tables.opener, True))
        if tables.lead:
            self._literals.append((tables.lead, False))
        else:
            self._inner = inner.copy()

    def opened(self) -> AfterThinking:
        """Return the same for an answer whose prompt ends inside thoughts."""
        other = AfterThinking(self._tables, self._fresh)
        other._enter(thinks=True)
        return other

    @property
    def thinking(self) -> bool:
        """Whether it still thinks."""
        return self._matched is not None

    @property
    def complete(self) -> bool:
        """Nothing but the end can follow."""
        return self._alone is not None and self._alone.complete

    @property
    def accepting(self) -> bool:
        """The text so far is valid as a whole."""
        return self._inner is not None and self._inner.accepting

    @property
    def _alone(self) -> Inner | None:
        """The inner constraint, where nothing else is possible."""
        return self._inner if not self._literals else None

    def allowed(self) -> bytes:
        """Return a bit for each token, lowest first, in whole 32-bit words: whether it may come next."""
        if self._matched is not None:
            return self._tables.thinking(self._matched)
        bits = bytearray(self._inner.allowed() if self._inner is not None else bytes(self._tables.mask_bytes))
        for text, _ in self._literals:
            _set(bits, self._tables.begins_with(text))
        if self._space_left:
            _set(bits, self._tables.spaces(self._space_left))
        return bytes(bits)

    def mask(self, logits_address: int, count: int) -> None:
        """Set the logits of tokens that may not come next to negative infinity, as `Constraint.mask` does."""
        forbid(self.allowed(), logits_address, count)

    def accept(self, token: int) -> bool:
        """Go on with a token. Returns False, and stays where it is, when the token may not come next."""
        tables = self._tables
        piece = tables.pieces[token] if 0 <= token < len(tables.pieces) and token not in tables.ends else b""
        if self._matched is not None:
            return token not in tables.ends and self._think(piece)
        goes_on = self._inner is not None and self._inner.accept(token)
        literals = [(text[len(piece) :], thinks) for text, thinks in self._literals if piece and text.startswith(piece)]
        done = [thinks for text, thinks in literals if not text]
        if done:
            self._enter(thinks=done[0])
            return True
        if goes_on or literals:
            self._literals = literals
            if not goes_on:
                self._inner = None
            self._space_left = 0
            return True
        if piece and len(piece) <= self._space_left and not piece.strip(_SPACE):
            self._space_left -= len(piece)
            return True
        return False

    def copy(self) -> AfterThinking:
        """Return an independent one at the same place."""
        other = AfterThinking(self._tables, self._fresh)
        other._inner = self._inner.copy() if self._inner is not None else None
        other._literals, other._matched = list(self._literals), self._matched
        other._space_left = self._space_left
        return other

    def _think(self, piece: bytes) -> bool:
        assert self._matched is not None, "it thinks"
        matched, rest = self._tables.go_on(self._matched, piece)
        if rest is None:
            self._matched = matched
            return True
        if not self._tables.may_follow(rest):
            return False
        self._matched = None
        if self._tables.lead_after:
            self._inner, self._literals = None, [(self._tables.lead_after, False)]
        else:
            self._enter(thinks=False)
            self._space_left = max(0, _SPACE_AFTER - len(rest))
        return True

    def _enter(self, *, thinks: bool) -> None:
        """Begin the thoughts, or what the inner constraint is for."""
        self._literals = []
        self._matched = 0 if thinks else None
        self._inner = None if thinks else self._fresh.copy()


def _set(bits: bytearray, tokens: Iterable[int]) -> None:
    for token in tokens:
        bits[token // 8] |= 1 << token % 8
