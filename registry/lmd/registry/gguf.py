"""A bounded parser for GGUF headers, and what a header says about a model.

The daemon reads headers of files that anybody may have made, so nothing here trusts a number of the file: counts,
lengths, dimensions and offsets are checked against the file's size and against caps before they are used. Python's
integers do not overflow; products are capped all the same, because the engine's do.

Source: the format as described in ``gguf.h`` of llama.cpp (vendored in llama-cpp-python 0.3.36). What that reader
refuses is refused here too (nested arrays, empty keys, names above 63 bytes), so that a bad file fails at import.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from types import MappingProxyType
from typing import BinaryIO

from lmd.registry.errors import GgufInvalid
from lmd.registry.gguf_cursor import DEFAULT_LIMITS, Cursor, Limits
from lmd.registry.gguf_types import FILE_TYPES, FULL_PRECISION, REMOVED_TENSOR_TYPES, TENSOR_TYPES

MAGIC = b"GGUF"
DEFAULT_ALIGNMENT = 32
MAX_DIMENSIONS = 4
MAX_TENSOR_NAME_BYTES = 63
# A tensor of more weights than this would overflow the engine's size arithmetic.
MAX_TENSOR_ITEMS = 2**62

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_SCALARS: dict[int, tuple[str, struct.Struct]] = {
    0: ("uint8", struct.Struct("<B")),
    1: ("int8", struct.Struct("<b")),
    2: ("uint16", struct.Struct("<H")),
    3: ("int16", struct.Struct("<h")),
    4: ("uint32", _U32),
    5: ("int32", struct.Struct("<i")),
    6: ("float32", struct.Struct("<f")),
    7: ("bool", struct.Struct("<B")),
    10: ("uint64", _U64),
    11: ("int64", struct.Struct("<q")),
    12: ("float64", struct.Struct("<d")),
}
_BOOL, _STRING, _ARRAY = 7, 8, 9
_FLOAT32 = struct.Struct("<f")

Scalar = str | int | float | bool

#: How families write the tokens around a gap: before the text before it, before the text after it, where it is filled.
#: Source: `llama_vocab::impl::load` of llama.cpp, which finds them by these names when the metadata has no ids.
INSERT_NAMES = tuple(
    (
        f"<|fim_{long}|>",
        f"<fim-{long}>",
        f"<fim_{long}>",
        f"<\uff5cfim\u2581{deepseek}\uff5c>",
        f"<{short}>",
        f"\u2581<{short}>",
        f"<|code_{long}|>",
        f"<|{long}|>",
    )
    for long, short, deepseek in (("prefix", "PRE", "begin"), ("suffix", "SUF", "hole"), ("middle", "MID", "end"))
)
INSERT_TOKENS = frozenset(name for names in INSERT_NAMES for name in names)
_SCAN_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class GgufArray:
    """An array of the metadata.

    Short arrays (1024 items) are whole; of longer ones, such as the tokens, *values* holds the first few only.
    """

    item_type: str
    length: int
    values: tuple[Scalar, ...]

    @property
    def complete(self) -> bool:
        """Whether *values* holds every item."""
        return len(self.values) == self.length


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """The description of one tensor.

    *shape* is in the file's order: the length of a row first. *offset* counts from the header's ``data_offset``.
    """

    name: str
    shape: tuple[int, ...]
    type_name: str
    offset: int
    size_bytes: int

    @property
    def item_count(self) -> int:
        """The number of weights."""
        return prod(self.shape)


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """All that a GGUF file says before its weights. Immutable; bounded in memory by the parser's limits."""

    version: int
    alignment: int
    metadata: Mapping[str, Scalar | GgufArray]
    tensors: tuple[TensorInfo, ...]
    data_offset: int
    file_size: int
    #: Of `INSERT_TOKENS`, those that the vocabulary has.
    insert_tokens: frozenset[str] = frozenset()

    def text(self, key: str) -> str:
        """The value of *key* when it is a string, else ""."""
        value = self.metadata.get(key)
        return value if isinstance(value, str) else ""

    def number(self, key: str) -> int:
        """The value of *key* when it is a non-negative integer that the engine can hold (31 bits), else 0."""
        value = self.metadata.get(key)
        return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31 else 0

    def arch_number(self, key: str) -> int:
        """Like :meth:`number` for a key of the architecture: ``context_length`` reads ``llama.context_length``."""
        return self.number(f"{self.architecture}.{key}")

    @property
    def architecture(self) -> str:
        """``general.architecture``; "" when there is none."""
        return _one_line(self.text("general.architecture"))

    @property
    def kind(self) -> str:
        """``general.type``: "model", "adapter", "mmproj" ...; projectors of before that key are recognised."""
        kind = self.text("general.type")
        if not kind and self.architecture == "clip":
            return "mmproj"
        return kind or "model"

    @property
    def title(self) -> str:
        """``general.name`` on one line; "" when there is none."""
        return _one_line(self.text("general.name"))

    @property
    def license(self) -> str:
        """``general.license``, an SPDX name as a rule; "" when there is none."""
        return _one_line(self.text("general.license"))

    @property
    def context_length(self) -> int:
        """The context the model was trained with, in tokens; 0 when unknown."""
        return self.arch_number("context_length")

    @property
    def embedding_length(self) -> int:
        """The width of the embedding; 0 when unknown."""
        return self.arch_number("embedding_length")

    @property
    def block_count(self) -> int:
        """The number of blocks; 0 when unknown."""
        return self.arch_number("block_count")

    @property
    def vocabulary_size(self) -> int:
        """The number of tokens; 0 when unknown."""
        tokens = self.metadata.get("tokenizer.ggml.tokens")
        return tokens.length if isinstance(tokens, GgufArray) else self.arch_number("vocab_size")

    @property
    def chat_template(self) -> str | None:
        """The chat template (Jinja); None when there is none."""
        return self.text("tokenizer.chat_template") or None

    @property
    def tool_template(self) -> str | None:
        """The chat template for chats with functions; None when there is none of its own for those."""
        return self.text("tokenizer.chat_template.tool_use") or None

    @property
    def special_tokens(self) -> dict[str, int]:
        """Ids of the special tokens by name, such as ``bos``, ``eos``, ``eot``, ``fim_pre``."""
        pattern = re.compile(r"tokenizer\.ggml\.(\w+)_token_id")
        return {match[1]: self.number(key) for key in self.metadata if (match := pattern.fullmatch(key))}

    @property
    def split_count(self) -> int:
        """The number of files the model is split into; 1 when it is not split."""
        return max(self.number("split.count"), 1)

    @property
    def split_no(self) -> int:
        """The place of this file among those, from 0."""
        return self.number("split.no")

    @property
    def parameter_count(self) -> int:
        """The number of weights, counted from the shapes."""
        return sum(tensor.item_count for tensor in self.tensors)

    @property
    def weights_bytes(self) -> int:
        """Bytes of all tensors without padding."""
        return sum(tensor.size_bytes for tensor in self.tensors)

    @property
    def quantization(self) -> str:
        """The name of the quantization, such as "Q4_K_M"; "" when there is nothing to go by.

        Most weight bytes decide, among matrices (vectors are never quantized) and leaving out the embedding and
        output matrices if there are others (quantizers give them a type of their own). ``general.file_type`` knows
        more, such as the M of Q4_K_M, and wins if the tensors bear it out.
        """
        bytes_by_type: dict[str, int] = {}
        for tensor in self._quantizable():
            bytes_by_type[tensor.type_name] = bytes_by_type.get(tensor.type_name, 0) + tensor.size_bytes
        file_type = FILE_TYPES.get(self.number("general.file_type")) if "general.file_type" in self.metadata else None
        if not bytes_by_type:
            return file_type.name if file_type else ""
        dominant = max(bytes_by_type, key=lambda name: (bytes_by_type[name], name))
        if file_type is None:
            return dominant
        if file_type.evidence in FULL_PRECISION:
            return file_type.name if file_type.evidence == dominant else dominant
        return file_type.name if any(t.type_name == file_type.evidence for t in self.tensors) else dominant

    def _quantizable(self) -> Sequence[TensorInfo]:
        matrices = [tensor for tensor in self.tensors if len(tensor.shape) >= 2]
        inner = [tensor for tensor in matrices if not tensor.name.startswith(("token_embd", "output."))]
        return inner or matrices or self.tensors

    def text_metadata(self) -> dict[str, str]:
        """Scalars and short arrays as text, in the file's order; the chat template and long values are left out."""
        shown: dict[str, str] = {}
        for key, value in self.metadata.items():
            if isinstance(value, GgufArray):
                if value.complete and value.length <= 16:
                    shown[_one_line(key)] = "[" + ", ".join(_scalar_text(item) for item in value.values) + "]"
            elif not (isinstance(value, str) and (key == "tokenizer.chat_template" or len(value) > 4096)):
                shown[_one_line(key)] = _scalar_text(value)
        return shown


def combine(headers: Sequence[GgufHeader]) -> GgufHeader:
    """One header for a model in several files: the first file's metadata, everybody's tensors.

    The offsets of the tensors still count from their own file's data.
    """
    if len(headers) == 1:
        return headers[0]
    return replace(
        headers[0],
        tensors=tuple(tensor for header in headers for tensor in header.tensors),
        file_size=sum(header.file_size for header in headers),
    )


def read_header(file: BinaryIO, file_size: int, limits: Limits = DEFAULT_LIMITS) -> GgufHeader:
    """Parse the header at the start of *file*, which has *file_size* bytes when complete.

    Only the header is read, so *file* may still be arriving: tensors are checked against *file_size* alone.
    The position of *file* afterwards is unspecified.

    Raises:
        GgufInvalid: when the bytes are not a well-formed header, or a cap of *limits* is exceeded.
    """
    cursor = Cursor(file, file_size, limits)
    version = _read_preamble(cursor, file_size)
    tensor_count = cursor.count(_U64, "the tensor count")
    entry_count = cursor.count(_U64, "the metadata count")
    if tensor_count > limits.max_tensors:
        raise GgufInvalid(f"{tensor_count} tensors; at most {limits.max_tensors} are allowed")
    if entry_count > limits.max_metadata_entries:
        raise GgufInvalid(f"{entry_count} metadata entries; at most {limits.max_metadata_entries} are allowed")
    metadata: dict[str, Scalar | GgufArray] = {}
    for number in range(1, entry_count + 1):
        key = _read_name(cursor, limits.max_key_bytes, f"key {number} of {entry_count}")
        if key in metadata:
            raise GgufInvalid(f"the key {_quoted(key)} is there twice")
        metadata[key] = _read_value(cursor, limits, key)
    alignment = _alignment(metadata, limits)
    tensors = [_read_tensor(cursor, f"tensor {number} of {tensor_count}") for number in range(1, tensor_count + 1)]
    data_offset = -(-cursor.offset // alignment) * alignment
    _check_tensors(tensors, alignment, data_offset, file_size)
    return GgufHeader(
        version,
        alignment,
        MappingProxyType(metadata),
        tuple(tensors),
        data_offset,
        file_size,
        _insert_tokens(file, cursor.offset, metadata.get("tokenizer.ggml.tokens")),
    )


def _insert_tokens(file: BinaryIO, size_bytes: int, tokens: object) -> frozenset[str]:
    """Return which of `INSERT_TOKENS` there are among the tokens, which lie in the first *size_bytes* of *file*."""
    if not isinstance(tokens, GgufArray) or tokens.item_type != "string":
        return frozenset()
    if tokens.complete:
        return INSERT_TOKENS.intersection(value for value in tokens.values if isinstance(value, str))
    found = _scan(file, size_bytes, INSERT_NAMES[0])
    return found | _scan(file, size_bytes, INSERT_TOKENS - found) if found else found


def _scan(file: BinaryIO, size_bytes: int, names: Iterable[str]) -> frozenset[str]:
    """Return which strings there are, each with its length before it, in the first *size_bytes* of *file*.

    Faster than going through the strings: 15 instead of 100 ms for eight names and 150,000 tokens (measured).
    """
    wanted = {name: _U64.pack(len(name.encode())) + name.encode() for name in names}
    overlap = max(len(item) for item in wanted.values()) - 1
    found: set[str] = set()
    file.seek(0)
    before = b""
    while size_bytes > 0 and (data := file.read(min(_SCAN_BYTES, size_bytes))):
        size_bytes -= len(data)
        window = before + data
        found.update(name for name, item in wanted.items() if item in window)
        before = window[-overlap:]
    return frozenset(found)


def iter_strings(file: BinaryIO, file_size: int, key: str, limits: Limits = DEFAULT_LIMITS) -> Iterator[bytes]:
    """Yield the items of the array of strings *key*, of which a header keeps the first only; none when it is not there.

    One item is in memory at a time. *file* must not be used for anything else meanwhile.

    Raises:
        GgufInvalid: as `read_header`, as far as it comes.
    """
    cursor = Cursor(file, file_size, limits)
    _read_preamble(cursor, file_size)
    cursor.count(_U64, "the tensor count")
    entry_count = min(cursor.count(_U64, "the metadata count"), limits.max_metadata_entries)
    for number in range(1, entry_count + 1):
        name = _read_name(cursor, limits.max_key_bytes, f"key {number} of {entry_count}")
        if name != key:
            _read_value(cursor, limits, name)
            continue
        what = f"the value of {_quoted(key)}"
        if (cursor.count(_U32, what), cursor.count(_U32, what)) != (_ARRAY, _STRING):
            return
        length = cursor.count(_U64, what)
        cursor.take_string_items(length, what)
        for _ in range(length):
            size = cursor.count(_U64, what)
            if size > limits.max_string_bytes:
                raise GgufInvalid(f"{what} has an item of {size} bytes; at most {limits.max_string_bytes} are allowed")
            yield cursor.raw(size, what)
        return


def metadata_spans(file: BinaryIO, file_size: int, limits: Limits = DEFAULT_LIMITS) -> list[tuple[str, int, int]]:
    """Return the key of each entry of the metadata, and where its bytes begin and end in *file*.

    Raises:
        GgufInvalid: as `read_header`.
    """
    cursor = Cursor(file, file_size, limits)
    _read_preamble(cursor, file_size)
    cursor.count(_U64, "the tensor count")
    entry_count = cursor.count(_U64, "the metadata count")
    spans = []
    for number in range(1, entry_count + 1):
        start = cursor.offset
        key = _read_name(cursor, limits.max_key_bytes, f"key {number} of {entry_count}")
        _read_value(cursor, limits, key)
        spans.append((key, start, cursor.offset))
    return spans


def _read_preamble(cursor: Cursor, file_size: int) -> int:
    if file_size < 24:
        raise GgufInvalid(f"{file_size} bytes are too few for a header")
    magic = cursor.raw(4, "the magic")
    if magic != MAGIC:
        raise GgufInvalid(f"it starts with {ascii(magic)[1:]}, not with {ascii(MAGIC)[1:]}")
    version = cursor.count(_U32, "the version")
    if version in (2, 3):
        return version
    if version and not version & 0xFFFF:
        raise GgufInvalid("it is big-endian; only little-endian files are supported")
    if version == 1:
        raise GgufInvalid("version 1 is no longer supported; convert the model again")
    raise GgufInvalid(f"version {version} is not known; versions 2 and 3 are")


def _read_name(cursor: Cursor, max_bytes: int, what: str) -> str:
    data = cursor.string(max_bytes, what)
    if not data:
        raise GgufInvalid(f"{what} is empty")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise GgufInvalid(f"{what} is not UTF-8") from None


def _read_value(cursor: Cursor, limits: Limits, key: str) -> Scalar | GgufArray:
    what = f"the value of {_quoted(key)}"
    type_id = cursor.count(_U32, what)
    if type_id == _ARRAY:
        return _read_array(cursor, limits, what)
    return _read_scalar(cursor, limits, type_id, what)


def _read_scalar(cursor: Cursor, limits: Limits, type_id: int, what: str) -> Scalar:
    if type_id == _STRING:
        return cursor.string(limits.max_string_bytes, what).decode("utf-8", errors="replace")
    if type_id not in _SCALARS:
        raise GgufInvalid(f"{what} has the unknown type {type_id}")
    value = cursor.unpack(_SCALARS[type_id][1], what)
    if type_id != _BOOL:
        return value
    if value not in (0, 1):
        raise GgufInvalid(f"{what} is {value}, not true or false")
    return bool(value)


def _read_array(cursor: Cursor, limits: Limits, what: str) -> GgufArray:
    item_type = cursor.count(_U32, what)
    length = cursor.count(_U64, what)
    if item_type == _ARRAY:
        raise GgufInvalid(f"{what} is an array of arrays, which is not supported")
    if item_type != _STRING and item_type not in _SCALARS:
        raise GgufInvalid(f"{what} has items of the unknown type {item_type}")
    kept = length if length <= limits.max_kept_items else limits.kept_head_items
    if item_type == _STRING:
        cursor.take_string_items(length, what)
    values: list[Scalar] = []
    for _ in range(kept):
        cursor.keep(0)
        values.append(_read_scalar(cursor, limits, item_type, what))
    if item_type == _STRING:
        cursor.skip_strings(length - kept, what)
        return GgufArray("string", length, tuple(values))
    name, layout = _SCALARS[item_type]
    cursor.skip(layout.size * (length - kept), what)
    return GgufArray(name, length, tuple(values))


def _alignment(metadata: Mapping[str, Scalar | GgufArray], limits: Limits) -> int:
    value = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if (
        isinstance(value, bool)
        or not isinstance(value, int)
        or not 0 < value <= limits.max_alignment
        or value & (value - 1)
    ):
        shown = value if isinstance(value, int | float) else "not a number"
        raise GgufInvalid(f"general.alignment is {shown}; it must be a power of two up to {limits.max_alignment}")
    return value


def _read_tensor(cursor: Cursor, what: str) -> TensorInfo:
    name = _read_name(cursor, MAX_TENSOR_NAME_BYTES, f"the name of {what}")
    what = f"{what}, {_quoted(name)},"
    dimensions = cursor.count(_U32, what)
    if dimensions > MAX_DIMENSIONS:
        raise GgufInvalid(f"{what} has {dimensions} dimensions; at most {MAX_DIMENSIONS} are allowed")
    shape = tuple(cursor.count(_U64, what) for _ in range(dimensions))
    items = prod(shape)
    if not 0 < items <= MAX_TENSOR_ITEMS:
        raise GgufInvalid(f"{what} has the impossible shape {' x '.join(str(size) for size in shape)}")
    type_id = cursor.count(_U32, what)
    if type_id not in TENSOR_TYPES:
        old = REMOVED_TENSOR_TYPES.get(type_id)
        raise GgufInvalid(f"{what} has the {f'abandoned type {old}' if old else f'unknown type {type_id}'}")
    kind = TENSOR_TYPES[type_id]
    row = shape[0] if shape else 1
    if row % kind.block_items:
        raise GgufInvalid(f"{what} has rows of {row}, which is not a multiple of {kind.name}'s {kind.block_items}")
    offset = cursor.count(_U64, what)
    cursor.keep(6 * 32)
    return TensorInfo(name, shape, kind.name, offset, items // kind.block_items * kind.block_bytes)


def _check_tensors(tensors: Iterable[TensorInfo], alignment: int, data_offset: int, file_size: int) -> None:
    names: set[str] = set()
    for tensor in tensors:
        if tensor.name in names:
            raise GgufInvalid(f"the tensor {_quoted(tensor.name)} is there twice")
        names.add(tensor.name)
        if tensor.offset % alignment:
            raise GgufInvalid(f"the tensor {_quoted(tensor.name)} is not aligned to {alignment} bytes")
        end = data_offset + tensor.offset + tensor.size_bytes
        if end > file_size:
            raise GgufInvalid(
                f"the tensor {_quoted(tensor.name)} ends at byte {end}, but the file has {file_size} bytes"
            )


def _quoted(name: str) -> str:
    cut = name if len(name) <= 64 else name[:64] + "…"
    return f"`{_one_line(cut)}`"


def _one_line(text: str) -> str:
    """Replace what must not reach a terminal or a log line: control, format and separator characters."""
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)


def _scalar_text(value: Scalar) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return float_text(value)
    return str(value)


def float_text(value: float) -> str:
    """The shortest text that reads back as the same number, in single precision when the number is one."""
    if value != value or value in (float("inf"), float("-inf")):
        return str(value)
    try:
        packed = _FLOAT32.pack(value)
    except OverflowError:
        return repr(value)
    if _FLOAT32.unpack(packed)[0] != value:
        return repr(value)
    return next(text for digits in range(1, 10) if _FLOAT32.pack(float(text := f"{value:.{digits}g}")) == packed)
