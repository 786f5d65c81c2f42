"""The `context` of `/api/generate`: a conversation that the client keeps, as a list of numbers.

To clients the numbers mean nothing: they get them with an answer and send them with the next prompt. Ours hold the
turns themselves, not tokens, so the next prompt is rendered as a chat, by the model's template, whatever model it is
for. Three bytes go into each number, so that clients with numbers of 32 bits keep them whole.

Numbers: `_MARK`, the count of bytes, their CRC-32 in two halves of 16 bits, and the bytes: JSON, [[role, text], …].
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Sequence

from lmd.daemon.conversations import Turn
from lmd.daemon.http.ollama.failures import Refusal

_MARK = int.from_bytes(b"lmd", "big")
_HEAD = 4
_STEP = 3
_ROLES = ("system", "user", "assistant")


def remembered(turns: Sequence[Turn]) -> list[int]:
    """Return the numbers for turns."""
    data = json.dumps([[turn.role, turn.content] for turn in turns], ensure_ascii=False).encode(errors="replace")
    high, low = divmod(zlib.crc32(data), 1 << 16)
    return [_MARK, len(data), high, low, *_numbers(data)]


def recalled(numbers: Sequence[int] | None) -> list[Turn]:
    """Return the turns that numbers hold.

    Raises:
        Refusal: they are not from here; numbers of another server are tokens, and mean something else to each model.
    """
    if not numbers:
        return []
    mark, size, high, low = (*numbers[:_HEAD], *([-1] * _HEAD))[:_HEAD]
    data = _bytes(numbers[_HEAD:], size) if mark == _MARK else None
    if data is None or divmod(zlib.crc32(data), 1 << 16) != (high, low):
        raise _foreign()
    try:
        pairs = json.loads(data)
        turns = [Turn(role, text) for role, text in pairs]
    except (ValueError, TypeError, RecursionError):
        raise _foreign() from None
    if not all(turn.role in _ROLES and isinstance(turn.content, str) for turn in turns):
        raise _foreign()
    return turns


def continued(turns: Sequence[Turn], system: str, prompt: str) -> list[Turn]:
    """Return the turns with a next prompt; *system* replaces the system prompt of earlier ones, "" leaves it."""
    if system:
        turns = [Turn("system", system), *(turn for turn in turns if turn.role != "system")]
    return [*turns, Turn("user", prompt)]


def _numbers(data: bytes) -> tuple[int, ...]:
    """Return bytes as numbers of three each, the first byte the highest; the last number is filled up."""
    padded = data + bytes(-len(data) % _STEP)
    words = bytearray(len(padded) // _STEP * 4)
    for place in range(_STEP):
        words[_STEP - 1 - place :: 4] = padded[place::_STEP]
    return struct.unpack(f"<{len(words) // 4}I", words)


def _bytes(numbers: Sequence[int], size: int) -> bytes | None:
    """Return the *size* bytes of numbers; None when they are not what `_numbers` makes."""
    if size < 0 or len(numbers) != -(-size // _STEP):
        return None
    try:
        words = struct.pack(f"<{len(numbers)}I", *numbers)
    except struct.error:
        return None
    data = bytearray(len(numbers) * _STEP)
    for place in range(_STEP):
        data[place::_STEP] = words[_STEP - 1 - place :: 4]
    return None if any(words[_STEP::4]) else bytes(data[:size])


def _foreign() -> Refusal:
    return Refusal(400, "context must be what this server returned with an earlier answer; use /api/chat instead")
