"""The files of one model that was split: their order, and whether they are all of one set."""

from __future__ import annotations

import re
from collections.abc import Sequence

from lmd.registry.errors import GgufInvalid, ShardsInvalid
from lmd.registry.gguf import GgufHeader
from lmd.registry.manifest import FileLayer

_NUMBER = re.compile(r"-\d{5}-of-\d{5}(?=\.gguf$)", re.IGNORECASE)
_MOST_NAMED = 5

Paired = tuple[FileLayer, GgufHeader]


def in_shard_order(weights: Sequence[FileLayer], headers: Sequence[GgufHeader]) -> list[Paired]:
    """Pair the weights with their headers in the order of the shards, and make sure that they are one whole model.

    Raises:
        GgufInvalid: naming the file that is too many, missing, of another set, or of another kind.
    """
    if not weights:
        raise GgufInvalid("no file has a model's weights")
    pairs = sorted(zip(weights, headers, strict=True), key=lambda pair: pair[1].split_no)
    for file, header in pairs:
        if header.kind != "model":
            raise GgufInvalid(f"`{file.filename}` is of the kind `{ascii(header.kind[:40])[1:-1]}`, not a model")
    _check_numbers(pairs)
    first = pairs[0][1]
    if not first.architecture:
        raise GgufInvalid("it does not say its architecture")
    if not any(header.tensors for _, header in pairs):
        raise GgufInvalid("it has no tensors, only metadata")
    if len(pairs) > 1:
        _check_tensors(pairs)
    return pairs


def whole_name(first: str) -> str:
    """Return the name of the file that all shards are together, of which *first* is one."""
    return _NUMBER.sub("", first)


def _check_numbers(pairs: Sequence[Paired]) -> None:
    """Make sure that the shards are numbered as those of one model, each of them there once."""
    counts = {header.split_count for _, header in pairs}
    if len(counts) > 1:
        one, header = pairs[0]
        other, other_header = next(pair for pair in pairs if pair[1].split_count != header.split_count)
        raise ShardsInvalid(
            f"`{one.filename}` is {_place(header)}, `{other.filename}` is {_place(other_header)}; "
            "they are not of one model"
        )
    by_number: dict[int, FileLayer] = {}
    for file, header in pairs:
        before = by_number.setdefault(header.split_no, file)
        if before is not file:
            raise ShardsInvalid(f"`{before.filename}` and `{file.filename}` are both {_place(header)}")
    (count,) = counts
    last, header = pairs[-1]
    if header.split_no >= count:
        raise ShardsInvalid(f"`{last.filename}` says that it is file {header.split_no + 1} of {count}")
    missing = [number + 1 for number in range(count) if number not in by_number]
    if missing:
        shown = ", ".join(map(str, missing[:_MOST_NAMED])) + (", …" if len(missing) > _MOST_NAMED else "")
        what = f"number {shown} is" if len(missing) == 1 else f"numbers {shown} are"
        given = f"`{pairs[0][0].filename}` is {_place(pairs[0][1])}" if len(pairs) == 1 else f"{len(pairs)} were given"
        raise ShardsInvalid(f"{given}, but of the {count} files of the model, {what} missing")


def _check_tensors(pairs: Sequence[Paired]) -> None:
    """Make sure that the shards are of the same split: what each says of the whole, and what they hold together."""
    first_file, first = pairs[0]
    held = sum(len(header.tensors) for _, header in pairs)
    for file, header in pairs:
        if "split.tensors.count" in header.metadata and header.number("split.tensors.count") != held:
            raise ShardsInvalid(
                f"`{file.filename}` is of a model of {header.number('split.tensors.count')} tensors, but the "
                f"{len(pairs)} files have {held}; they are not of one model"
            )
        if header.architecture not in ("", first.architecture):
            raise ShardsInvalid(
                f"`{file.filename}` is of the architecture `{header.architecture}`, `{first_file.filename}` is of "
                f"`{first.architecture}`; they are not of one model"
            )
    holder: dict[str, str] = {}
    for file, header in pairs:
        for tensor in header.tensors:
            before = holder.setdefault(tensor.name, file.filename)
            if before != file.filename:
                shown = ascii(tensor.name)[1:-1]
                raise ShardsInvalid(f"`{before}` and `{file.filename}` both have the tensor `{shown}`")


def _place(header: GgufHeader) -> str:
    return f"file {header.split_no + 1} of {header.split_count}" if header.split_count > 1 else "a whole model"
