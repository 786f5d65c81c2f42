"""The format of a file of saved KV: one prefix, its tokens and whose they are, and the engine's state after them.

All numbers are in the byte order of the machine, as the state is; in a file from another kind of machine the magic is
another.

    offset  bytes
    0       8      magic, which also says the version of the format
    8       4      CRC-32 of all that follows up to the state
    12      4      bytes of the scope
    16      4      tokens
    20      4      1 when the tokens are public, else 0
    24      8      bytes of the state
    32      4      CRC-32 of the state
    36      16     fingerprint of the engine and the context that made it
    52             the scope, UTF-8; then the tokens, 4 bytes each; then zeros up to the next multiple of 4,096
                   the state, up to the end of the file

Every byte is under one of the checksums, under the magic, or one of the two. The parser believes nothing: sizes are
bounded before anything is read, and have to add up to the size of the file.
"""

from __future__ import annotations

import os
import stat
import struct
import zlib
from array import array
from dataclasses import dataclass
from pathlib import Path

from lmd.runner.scopes import uses_public

#: The longest scope, and the most tokens, that a file may have; beyond every use, they bound what is read of a head.
MAX_SCOPE_BYTES = 4096
MAX_TOKENS = 1 << 24
FINGERPRINT_BYTES = 16

_HEAD = struct.Struct("=QIIIIQI16s")
_MAGIC = int.from_bytes(b"lmd-kv\x00\x01", "little")
_CHECKED_FROM = 12
_PAGE = 4096
_TOKEN_BYTES = 4


class Damaged(Exception):
    """Raised when a file is not what it should be."""


@dataclass(slots=True, eq=False)
class SavedPrefix:
    """A prefix that is on disk.

    Attributes:
        tokens: all that the state covers, from position 0.
        scope: whose it is; nobody else may use it, unless it is public.
        public: whether the tokens are nobody's secret, so that every scope may use it.
        size_bytes: of the file.
        used_at: when it was used last, in seconds since the epoch.
        state_offset: where in the file the state begins; it goes on to the end.
        state_crc: the CRC-32 that it has to have.
    """

    tokens: array[int]
    scope: str
    public: bool
    size_bytes: int
    path: Path
    used_at: float
    state_offset: int
    state_crc: int

    def open_to(self, scope: str) -> bool:
        """Tell whether a request of *scope* may use it."""
        return uses_public(scope) if self.public else self.scope == scope


class Head:
    """All of a file but its state, in the making: the checksums come last."""

    def __init__(self, tokens: array[int], scope: str, public: bool, state_bytes: int, fingerprint: bytes) -> None:
        """Lay it out. Raises: ValueError when a bound is exceeded."""
        scope_bytes = scope.encode()
        if not 0 < len(tokens) <= MAX_TOKENS or len(scope_bytes) > MAX_SCOPE_BYTES or state_bytes <= 0:
            raise ValueError("a file cannot hold that")
        self._fields = (len(scope_bytes), len(tokens), int(public), state_bytes)
        self._fingerprint = fingerprint
        self._body = scope_bytes + tokens.tobytes()
        #: Where the state begins, and the size of the whole file.
        self.state_offset = _state_offset(len(scope_bytes), len(tokens))
        self.file_bytes = self.state_offset + state_bytes

    def sealed(self, state_crc: int) -> bytes:
        """Return its bytes, up to where the state begins."""
        head = bytearray(self.state_offset)
        _HEAD.pack_into(head, 0, _MAGIC, 0, *self._fields, state_crc, self._fingerprint)
        head[_HEAD.size : _HEAD.size + len(self._body)] = self._body
        struct.pack_into("=I", head, 8, zlib.crc32(memoryview(head)[_CHECKED_FROM:]))
        return bytes(head)


def read_head(path: Path, fingerprint: bytes, used_at: float) -> SavedPrefix:
    """Read and check all of a file but its state. Raises: Damaged, also for another fingerprint; OSError."""
    # Not blocking: whatever has the name, a pipe for one, is not waited for.
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(fd, "rb", buffering=0) as file:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise Damaged
        fixed = file.read(_HEAD.size)
        if len(fixed) < _HEAD.size:
            raise Damaged
        magic, crc, scope_bytes, count, public, state_bytes, state_crc, made_by = _HEAD.unpack(fixed)
        if magic != _MAGIC or made_by != fingerprint or public > 1:
            raise Damaged
        if not 0 < count <= MAX_TOKENS or scope_bytes > MAX_SCOPE_BYTES:
            raise Damaged
        offset = _state_offset(scope_bytes, count)
        if status.st_size != offset + state_bytes or state_bytes == 0:
            raise Damaged
        rest = file.read(offset - _HEAD.size)
    if len(rest) != offset - _HEAD.size or zlib.crc32(rest, zlib.crc32(fixed[_CHECKED_FROM:])) != crc:
        raise Damaged
    tokens = array("i")
    tokens.frombytes(rest[scope_bytes : scope_bytes + _TOKEN_BYTES * count])
    try:
        scope = rest[:scope_bytes].decode()
    except UnicodeDecodeError:
        raise Damaged from None
    return SavedPrefix(tokens, scope, bool(public), status.st_size, path, used_at, offset, state_crc)


def _state_offset(scope_bytes: int, tokens: int) -> int:
    # A page boundary, so that the state can be mapped by itself.
    return -(-(_HEAD.size + scope_bytes + _TOKEN_BYTES * tokens) // _PAGE) * _PAGE
