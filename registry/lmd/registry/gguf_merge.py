"""One GGUF file of the shards of a model, piece by piece, so that no more than a buffer of it is ever in memory.

The result has the metadata of the first shard but for ``split.*``, and the tensors of all in the order of the shards:
what ``llama-gguf-split --merge`` makes, which leaves a ``split.count`` of 0 behind. The same shards always give the
same bytes.

Source: ``tools/gguf-split/gguf-split.cpp`` of llama.cpp (vendored in llama-cpp-python 0.3.36).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO

from lmd.registry.errors import GgufInvalid
from lmd.registry.gguf import MAGIC, GgufHeader, metadata_spans
from lmd.registry.gguf_types import TENSOR_TYPES

_VERSION = 3
_BUFFER_BYTES = 4 << 20
_TYPE_IDS = {kind.name: number for number, kind in TENSOR_TYPES.items()}


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes of one of the shards."""

    shard: int
    offset: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Merge:
    """What the merged file is made of, in its order."""

    pieces: tuple[bytes | Span, ...]

    @property
    def size_bytes(self) -> int:
        """The size of the merged file."""
        return sum(len(piece) if isinstance(piece, bytes) else piece.size_bytes for piece in self.pieces)


def plan_merge(first: BinaryIO, headers: Sequence[GgufHeader]) -> Merge:
    """Lay out the merged file of shards with these *headers*, in their order; *first* is the file of the first.

    Raises:
        GgufInvalid: the metadata of the first is not well-formed.
    """
    alignment = headers[0].alignment
    kept = [span for span in metadata_spans(first, headers[0].file_size) if not span[0].startswith("split.")]
    tensor_count = sum(len(header.tensors) for header in headers)
    preamble = struct.pack("<4sIQQ", MAGIC, _VERSION, tensor_count, len(kept))
    metadata = _joined([Span(0, start, end - start) for _, start, end in kept])
    descriptions = bytearray()
    data: list[bytes | Span] = []
    offset = 0
    for shard, header in enumerate(headers):
        for tensor in header.tensors:
            name = tensor.name.encode()
            descriptions += struct.pack("<Q", len(name)) + name
            descriptions += struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *tensor.shape)
            descriptions += struct.pack("<IQ", _TYPE_IDS[tensor.type_name], offset)
            padding_bytes = -tensor.size_bytes % alignment
            data.append(Span(shard, header.data_offset + tensor.offset, tensor.size_bytes))
            if padding_bytes:
                data.append(bytes(padding_bytes))
            offset += tensor.size_bytes + padding_bytes
    head_bytes = len(preamble) + sum(span.size_bytes for span in metadata) + len(descriptions)
    return Merge((preamble, *metadata, bytes(descriptions) + bytes(-head_bytes % alignment), *data))


def merged_bytes(merge: Merge, files: Sequence[BinaryIO]) -> Iterator[bytes | memoryview]:
    """Yield the bytes of the merged file; *files* are the shards in order. Each piece is good until the next one.

    Raises:
        GgufInvalid: a shard ends before its last byte.
    """
    buffer = memoryview(bytearray(_BUFFER_BYTES))
    for piece in merge.pieces:
        if isinstance(piece, bytes):
            yield piece
            continue
        file = files[piece.shard]
        file.seek(piece.offset)
        left_bytes = piece.size_bytes
        while left_bytes:
            count = file.readinto(buffer[:left_bytes])  # type: ignore[attr-defined]  # typeshed: every binary file has it
            if not count:
                raise GgufInvalid(f"file {piece.shard + 1} of {len(files)} ends too early")
            yield buffer[:count]
            left_bytes -= count


def _joined(spans: Sequence[Span]) -> list[Span]:
    """Join spans that follow one another without a gap."""
    joined: list[Span] = []
    for span in spans:
        if joined and joined[-1].offset + joined[-1].size_bytes == span.offset:
            joined[-1] = Span(span.shard, joined[-1].offset, joined[-1].size_bytes + span.size_bytes)
        else:
            joined.append(span)
    return joined
