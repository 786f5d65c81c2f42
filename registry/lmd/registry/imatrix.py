"""Importance matrices: the GGUF files that `llama-imatrix` makes, as far as the quantizer needs to know of them.

For each matrix of a model there are two tensors: ``NAME.in_sum2``, sums of squares for each column (of each expert),
and ``NAME.counts``, how often each was seen.

Source: ``tools/imatrix`` and ``tools/quantize`` of llama.cpp as vendored in llama-cpp-python 0.3.36.
"""

from __future__ import annotations

from dataclasses import dataclass

from lmd.registry.errors import InvalidRequest
from lmd.registry.gguf import GgufHeader

_SUMS, _COUNTS = ".in_sum2", ".counts"


@dataclass(frozen=True, slots=True)
class ImatrixEntry:
    """Where the importance of one matrix's columns lies in its file; offsets count from the start of the file."""

    name: str
    sums_offset: int
    counts_offset: int
    columns: int
    matrices: int


def imatrix_entries(header: GgufHeader, model: GgufHeader) -> tuple[ImatrixEntry, ...]:
    """Find the entries of an importance matrix, and make sure that it is one of *model*.

    Raises:
        InvalidRequest: when the file is something else, or is of another model.
    """
    if header.kind != "imatrix":
        raise _invalid(f"the file is of the kind `{ascii(header.kind[:40])[1:-1]}`")
    tensors = {tensor.name: tensor for tensor in header.tensors}
    shapes = {tensor.name: tensor.shape for tensor in model.tensors}
    entries = []
    for tensor in sorted(header.tensors, key=lambda tensor: tensor.offset):
        if not tensor.name.endswith(_SUMS):
            continue
        name = tensor.name.removesuffix(_SUMS)
        counts = tensors.get(name + _COUNTS)
        columns = tensor.shape[0]
        if counts is None or tensor.type_name != "F32" or counts.type_name != "F32":
            raise _invalid(f"`{name[:64]}` lacks its counts, or is not F32")
        if counts.item_count * columns != tensor.item_count:
            raise _invalid(f"`{name[:64]}` does not have one count for each matrix")
        if name in shapes and shapes[name][0] != columns:
            raise _invalid(f"`{name[:64]}` has {columns} columns there and {shapes[name][0]} in the model")
        start = header.data_offset
        entries.append(ImatrixEntry(name, start + tensor.offset, start + counts.offset, columns, counts.item_count))
    if not any(entry.name in shapes for entry in entries):
        raise _invalid("it names no matrix of the model")
    return tuple(entry for entry in entries if entry.name in shapes)


def _invalid(why: str) -> InvalidRequest:
    return InvalidRequest(
        f"the importance matrix cannot be used: {why}",
        field="imatrix",
        hint="make one of this model's F16 file with `llama-imatrix`",
    )
