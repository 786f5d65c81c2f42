"""Writes GGUF files byte by byte, well-formed or not, so that tests can lie in every field."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

from lmd.registry.gguf_types import TENSOR_TYPES

UINT8, INT8, UINT16, INT16, UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY, UINT64, INT64, FLOAT64 = range(13)
_FORMATS = {
    UINT8: "<B",
    INT8: "<b",
    UINT16: "<H",
    INT16: "<h",
    UINT32: "<I",
    INT32: "<i",
    FLOAT32: "<f",
    BOOL: "<?",
    UINT64: "<Q",
    INT64: "<q",
    FLOAT64: "<d",
}


@dataclass(frozen=True)
class Typed:
    """A metadata value of an explicit type; *payload* is written as it is."""

    type_id: int
    payload: bytes


@dataclass(frozen=True)
class Tensor:
    """A tensor to describe; *offset* None puts it after the one before."""

    name: str | bytes
    shape: Sequence[int]
    type_id: int = 0
    offset: int | None = None

    @property
    def size_bytes(self) -> int:
        kind = TENSOR_TYPES[self.type_id]
        return prod(self.shape) // kind.block_items * kind.block_bytes


Value = str | bytes | bool | int | float | Sequence[str] | Sequence[int] | Sequence[float] | Typed


def string(text: str | bytes, *, length: int | None = None) -> bytes:
    """A length and text; *length* lies about it."""
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data) if length is None else length) + data


def scalar(type_id: int, value: float) -> Typed:
    """A number of one of the scalar types."""
    return Typed(type_id, struct.pack(_FORMATS[type_id], value))


def array(item_type: int, items: Sequence[float | str], *, length: int | None = None) -> Typed:
    """An array; *length* lies about the number of items."""
    body = b"".join(string(item) if isinstance(item, str) else struct.pack(_FORMATS[item_type], item) for item in items)
    return Typed(ARRAY, struct.pack("<IQ", item_type, len(items) if length is None else length) + body)


def _typed(value: Value) -> Typed:
    if isinstance(value, Typed):
        return value
    if isinstance(value, str | bytes):
        return Typed(STRING, string(value))
    if isinstance(value, bool):
        return scalar(BOOL, value)
    if isinstance(value, int):
        return scalar(UINT32, value)
    if isinstance(value, float):
        return scalar(FLOAT32, value)
    items: list[float | str] = list(value)
    item_types = {str: STRING, float: FLOAT32, int: INT32}
    return array(item_types[type(items[0])] if items else STRING, items)


def gguf(
    metadata: Mapping[str, Value] | Sequence[tuple[str | bytes, Value]] = (),
    tensors: Sequence[Tensor] = (),
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    alignment: int = 32,
    entry_count: int | None = None,
    tensor_count: int | None = None,
    fill: int = 0,
) -> bytes:
    """A whole file: header, padding, and *fill* bytes as the weights."""
    entries = list(metadata.items()) if isinstance(metadata, Mapping) else list(metadata)
    parts = [
        magic,
        struct.pack(
            "<IQQ",
            version,
            len(tensors) if tensor_count is None else tensor_count,
            len(entries) if entry_count is None else entry_count,
        ),
    ]
    for key, value in entries:
        typed = _typed(value)
        parts += [string(key), struct.pack("<I", typed.type_id), typed.payload]
    end = 0
    for tensor in tensors:
        offset = end if tensor.offset is None else tensor.offset
        known = tensor.type_id in TENSOR_TYPES and tensor.size_bytes < 2**32
        end = -(-(offset + (tensor.size_bytes if known else 0)) // alignment) * alignment
        dims = struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *tensor.shape)
        parts += [string(tensor.name), dims, struct.pack("<IQ", tensor.type_id, offset)]
    header = b"".join(parts)
    if not tensors:
        return header
    padding = -len(header) % alignment
    return header + bytes(padding) + bytes([fill]) * min(end, 2**24)


@dataclass
class TinyModel:
    """A header that passes for a small llama; not meant to run."""

    architecture: str = "llama"
    extra: Mapping[str, Value] = field(default_factory=dict)
    tensors: Sequence[Tensor] = (
        Tensor("token_embd.weight", (32, 16)),
        Tensor("blk.0.attn_q.weight", (32, 32)),
        Tensor("output_norm.weight", (32,)),
    )
    fill: int = 0

    def to_bytes(self) -> bytes:
        arch = self.architecture
        metadata: dict[str, Value] = {
            "general.architecture": arch,
            "general.name": "Tiny",
            f"{arch}.context_length": 256,
            f"{arch}.embedding_length": 32,
            f"{arch}.block_count": 1,
            f"{arch}.attention.head_count": 4,
            f"{arch}.attention.head_count_kv": 2,
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": [f"t{number}" for number in range(16)],
            **self.extra,
        }
        return gguf(metadata, self.tensors, fill=self.fill)


def adapter(
    matrices: Mapping[str, tuple[int, ...]] | None = None,
    *,
    rank: int = 2,
    architecture: str = "llama",
    extra: Mapping[str, Value] | None = None,
    fill: int = 0,
) -> bytes:
    """A LoRA adapter for matrices of these shapes; by default it fits `TinyModel`."""
    halves: list[Tensor] = []
    for name, (columns, rows, *experts) in (matrices or {"blk.0.attn_q.weight": (32, 32)}).items():
        halves += [
            Tensor(f"{name}.lora_a", (columns, rank, *experts)),
            Tensor(f"{name}.lora_b", (rank, rows, *experts)),
        ]
    metadata: dict[str, Value] = {
        "general.architecture": architecture,
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": 8.0,
    }
    return gguf({**metadata, **(extra or {})}, halves, fill=fill)
