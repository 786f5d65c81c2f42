"""The journal of an ingest: which ranges have arrived, and which of them would survive a power cut.

The file is a header followed by records of a fixed length, all little-endian:

    header   magic ``LMDJ0001``, length of the JSON (u32), its CRC-32 (u32), the JSON {boot, key, total_bytes}
    record   kind (u8), two numbers (u64), CRC-32 of the 17 bytes before, started at the record's position (u32)

    N offset length    these bytes were written
    C count 0          the bytes of the first *count* N records were synced before this record was written

Reading stops at the first record that does not check: a torn tail, or zeros that a power cut left. Bytes written in the
present boot are in the page cache or on the disk even when their process was killed, so all N records count; after a
boot only those that a C record covers do. The digest of the whole decides in any case.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from lmd.registry.store.ranges import RangeSet

MAGIC = b"LMDJ0001"
HEADER = struct.Struct("<8sII")
RECORD = struct.Struct("<BQQ")
CRC = struct.Struct("<I")
RECORD_BYTES = RECORD.size + CRC.size
NOTE = ord("N")
CHECKPOINT = ord("C")
# The longest journal that is read; writers rewrite theirs long before.
JOURNAL_MAX_BYTES = 64 << 20
OFFSET_MAX = 1 << 62


@dataclass(frozen=True, slots=True)
class JournalHeader:
    """Whose journal it is: the ingest's key, its size if known, and the boot in which it was written."""

    key: str
    total_bytes: int | None
    boot_id: str


@dataclass(frozen=True, slots=True)
class Replay:
    """What a journal tells: ranges to trust now, and those among them that are durable."""

    header: JournalHeader
    received: RangeSet
    durable: RangeSet


def read_boot_id() -> str:
    """Name the present boot of the machine. Source: random(4), ``/proc/sys/kernel/random/boot_id``."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def encode_header(header: JournalHeader) -> bytes:
    """Write a header."""
    content = json.dumps({"boot": header.boot_id, "key": header.key, "total_bytes": header.total_bytes}).encode()
    return HEADER.pack(MAGIC, len(content), zlib.crc32(content)) + content


def encode_record(position: int, kind: int, first: int, second: int) -> bytes:
    """Write the record that is number *position* of its journal, counted from 0."""
    body = RECORD.pack(kind, first, second)
    return body + CRC.pack(zlib.crc32(body, position))


def encode_journal(
    header: JournalHeader, durable: Iterable[tuple[int, int]], rest: Iterable[tuple[int, int]]
) -> tuple[bytes, int, int]:
    """Write a whole journal; return it, its number of records, and its number of N records."""
    durable, rest = list(durable), list(rest)
    entries = [(NOTE, start, end - start) for start, end in durable]
    if durable:
        entries.append((CHECKPOINT, len(durable), 0))
    entries += [(NOTE, start, end - start) for start, end in rest]
    records = b"".join(encode_record(position, *entry) for position, entry in enumerate(entries))
    return encode_header(header) + records, len(entries), len(durable) + len(rest)


def read_header(data: bytes) -> tuple[JournalHeader, int] | None:
    """Read a header and its length; None when there is no valid one."""
    if len(data) < HEADER.size:
        return None
    magic, length, crc = HEADER.unpack_from(data)
    content = data[HEADER.size : HEADER.size + length]
    if magic != MAGIC or len(content) != length or zlib.crc32(content) != crc:
        return None
    try:
        fields = json.loads(content)
        key, total_bytes, boot_id = fields["key"], fields["total_bytes"], fields["boot"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    if not isinstance(key, str) or not isinstance(boot_id, str) or not isinstance(total_bytes, int | None):
        return None
    return JournalHeader(key, total_bytes, boot_id), HEADER.size + length


def replay(data: bytes, boot_id: str) -> Replay | None:
    """Read a journal as of the boot *boot_id*; None when it has no valid header."""
    found = read_header(data)
    if found is None:
        return None
    header, offset = found
    notes: list[tuple[int, int]] = []
    covered = 0
    for position, start in enumerate(range(offset, len(data) - RECORD_BYTES + 1, RECORD_BYTES)):
        body = data[start : start + RECORD.size]
        (crc,) = CRC.unpack_from(data, start + RECORD.size)
        kind, first, second = RECORD.unpack(body)
        if zlib.crc32(body, position) != crc:
            break
        if kind == NOTE and first + second <= OFFSET_MAX:
            notes.append((first, first + second))
        elif kind == CHECKPOINT and covered <= first <= len(notes):
            covered = first
        else:
            break
    durable = RangeSet(notes[:covered])
    return Replay(header, RangeSet(notes) if header.boot_id == boot_id else durable, durable)
