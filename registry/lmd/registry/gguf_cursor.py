"""Bounded reading of a GGUF header: never past the file, never past a cap, never much in memory."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import BinaryIO

from lmd.registry.errors import GgufInvalid

_CHUNK_BYTES = 256 * 1024
_U64 = struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class Limits:
    """The caps on a header. The defaults leave ample room above the largest models of mid 2026.

    Together they bound the parser's time to seconds and its memory to about twice *max_kept_bytes*, whatever the
    file says.
    """

    max_header_bytes: int = 512 * 1024**2
    """Metadata and tensor descriptions together, skipped parts included."""
    max_metadata_entries: int = 65_536
    max_tensors: int = 65_536
    max_key_bytes: int = 65_535
    """What the GGUF specification allows."""
    max_string_bytes: int = 4 * 1024**2
    """One scalar string; the largest honest ones are chat templates of some 100 KB."""
    max_kept_bytes: int = 16 * 1024**2
    """All keys, names and values that the header keeps, counted with a flat price for each object."""
    max_string_items: int = 8_388_608
    """Items of all arrays of strings together: each costs a step of the parser even though it is skipped."""
    max_kept_items: int = 1024
    """Arrays up to this length are kept whole; of longer ones only *kept_head_items* first values."""
    kept_head_items: int = 8
    max_alignment: int = 1024**2


DEFAULT_LIMITS = Limits()
_OBJECT_PRICE_BYTES = 64


class Cursor:
    """A forward-only position in a file, with a small buffer.

    Every method raises GgufInvalid when the file ends, or a cap is reached, inside of what it reads. Errors of the
    file itself (OSError) pass through.
    """

    def __init__(self, file: BinaryIO, file_size: int, limits: Limits) -> None:
        self._file = file
        self._file_size = file_size
        self._limits = limits
        self._buffer = b""
        self._buffer_offset = 0
        self._index = 0
        self._kept_bytes = 0
        self._string_items = 0
        file.seek(0)

    @property
    def offset(self) -> int:
        """The position in the file."""
        return self._buffer_offset + self._index

    def unpack(self, layout: struct.Struct, what: str) -> int | float:
        """Read one value of *layout*."""
        self._need(layout.size, what)
        (value,) = layout.unpack_from(self._buffer, self._index)
        self._index += layout.size
        number: int | float = value
        return number

    def count(self, layout: struct.Struct, what: str) -> int:
        """Read one unsigned integer of *layout*."""
        return int(self.unpack(layout, what))

    def raw(self, length: int, what: str) -> bytes:
        """Read *length* bytes, which the caller has checked against a cap."""
        self._need(length, what)
        data = self._buffer[self._index : self._index + length]
        self._index += length
        return data

    def string(self, max_bytes: int, what: str) -> bytes:
        """Read a length and that many bytes, to be kept."""
        length = self.count(_U64, what)
        if length > max_bytes:
            raise GgufInvalid(f"{what} has {length} bytes; at most {max_bytes} are allowed")
        self.keep(length)
        return self.raw(length, what)

    def keep(self, nbytes: int) -> None:
        """Account for an object of *nbytes* that the header keeps."""
        self._kept_bytes += nbytes + _OBJECT_PRICE_BYTES
        if self._kept_bytes > self._limits.max_kept_bytes:
            raise GgufInvalid(f"the metadata holds more than {self._limits.max_kept_bytes} bytes of text")

    def skip(self, length: int, what: str) -> None:
        """Move on by *length* bytes without reading those beyond the buffer."""
        self._check_end(self.offset + length, what)
        self._move_to(self.offset + length)

    def take_string_items(self, count: int, what: str) -> None:
        """Account for *count* items of an array of strings, before reading any."""
        self._string_items += count
        if self._string_items > self._limits.max_string_items:
            raise GgufInvalid(f"{what} and others have more than {self._limits.max_string_items} strings in arrays")
        # Each string has at least its length, so a count the file cannot hold is refused at once.
        self._check_end(self.offset + 8 * count, what)

    def skip_strings(self, count: int, what: str) -> None:
        """Move on by *count* strings.

        This is the hot loop of the parser (a tokenizer has some 400 000 strings), hence the bound method, the locals
        and the exception in place of a comparison for each item.
        """
        unpack_length = _U64.unpack_from
        while count:
            self._need(8, what)
            buffer = self._buffer
            index = self._index
            done = 0
            try:
                for done in range(1, count + 1):  # noqa: B007 - read after the exception too
                    index += 8 + unpack_length(buffer, index)[0]
                count = 0
            except (struct.error, OverflowError):
                # The length of string number `done` lies beyond the buffer.
                count -= done - 1
            target = self._buffer_offset + index
            self._check_end(target, what)
            self._move_to(target)

    def _move_to(self, target: int) -> None:
        index = target - self._buffer_offset
        if index <= len(self._buffer):
            self._index = index
        else:
            self._buffer, self._buffer_offset, self._index = b"", target, 0
            self._file.seek(target)

    def _check_end(self, end: int, what: str) -> None:
        if end > self._file_size:
            raise GgufInvalid(f"the file ends inside of {what}: {self._file_size} bytes, {end} needed")
        if end > self._limits.max_header_bytes:
            raise GgufInvalid(f"the header is larger than {self._limits.max_header_bytes} bytes")

    def _need(self, length: int, what: str) -> None:
        """Make *length* bytes available in the buffer at the index."""
        if len(self._buffer) - self._index >= length:
            return
        self._check_end(self.offset + length, what)
        parts = [self._buffer[self._index :]]
        have = len(parts[0])
        while have < length:
            part = self._file.read(max(_CHUNK_BYTES, length - have))
            if not part:
                raise GgufInvalid(f"the file ends inside of {what}, before its {self._file_size} bytes are there")
            parts.append(part)
            have += len(part)
        self._buffer_offset = self.offset
        self._buffer = b"".join(parts)
        self._index = 0
