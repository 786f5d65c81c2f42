"""What is different between two models, as `diff -u` would show it."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from lmd.cli.shapes import Json, parameters_json
from lmd.cli.units import format_size

if TYPE_CHECKING:
    from lmd.v1 import model_pb2

_SHORT_DIGEST = len("sha256:") + 12
_NO_LINE_FEED = "\\ No newline at end of file"


def parts(info: model_pb2.ModelInfo) -> dict[str, str]:
    """Return what is compared, as texts by the name of the part."""
    from lmd.cli.describe import parameter_pairs

    return {
        "files": _lines([_file_line(file) for file in info.files]),
        "parameters": _lines([f"{name} {value}" for name, value in parameter_pairs(info.parameters)]),
        "template": info.template,
        "system": info.system,
        "messages": _lines([f"{message.role}: {message.content}" for message in info.messages]),
        "licenses": "\n".join(info.licenses),
        "origin": _lines([line for line in (info.origin.ref, info.origin.commit) if line]),
        "requires": info.requires,
    }


def _file_line(file: model_pb2.ModelFile) -> str:
    scale = f" scale {file.scale:g}" if file.role == "adapter" else ""
    return f"{file.role} {file.filename} {file.digest[:_SHORT_DIGEST]} {format_size(file.size_bytes)}{scale}"


def _lines(lines: list[str]) -> str:
    return "".join(f"{line}\n" for line in lines)


def unified(old: str, new: str, old_name: str, new_name: str) -> Iterator[str]:
    """Yield the lines of a unified diff of two texts; none when they are equal.

    That a text does not end its last line is told only where the other one does.
    """
    if old != new and not old.endswith("\n") and not new.endswith("\n"):
        old, new = (f"{text}\n" if text else "" for text in (old, new))
    lines = difflib.unified_diff(old.splitlines(True), new.splitlines(True), old_name, new_name)
    for line in lines:
        yield line.removesuffix("\n")
        if not line.endswith("\n"):
            yield _NO_LINE_FEED


def difference_lines(old: model_pb2.ModelInfo, new: model_pb2.ModelInfo, names: tuple[str, str]) -> Iterator[str]:
    """Yield a unified diff of each part that differs, under the names the models were asked for by."""
    after = parts(new)
    for part, text in parts(old).items():
        yield from unified(text, after[part], f"{names[0]} {part}", f"{names[1]} {part}")


def difference_json(old: model_pb2.ModelInfo, new: model_pb2.ModelInfo, names: tuple[str, str]) -> Json:
    """Return `lm diff --json`: parameters one by one, files that came and went, and a unified diff of each text."""
    before, after = parts(old), parts(new)
    texts = ("template", "system", "messages", "licenses")
    return {
        "old": {"model": names[0], "digest": old.model.digest},
        "new": {"model": names[1], "digest": new.model.digest},
        "equal": before == after,
        "parameters": _parameters(parameters_json(old.parameters), parameters_json(new.parameters)),
        "files": {"removed": _files(old, new), "added": _files(new, old)},
        "origin": _change(before["origin"], after["origin"]),
        "requires": _change(before["requires"], after["requires"]),
        **{
            part: "\n".join(unified(before[part], after[part], f"{names[0]} {part}", f"{names[1]} {part}")) or None
            for part in texts
        },
    }


def _change(old: str, new: str) -> Json | None:
    return None if old == new else {"old": old.rstrip("\n"), "new": new.rstrip("\n")}


def _parameters(old: Json, new: Json) -> Json:
    return {
        name: {"old": old.get(name), "new": new.get(name)}
        for name in sorted({*old, *new})
        if old.get(name) != new.get(name)
    }


def _files(these: model_pb2.ModelInfo, those: model_pb2.ModelInfo) -> list[Json]:
    others = {(file.role, file.digest, file.filename, file.scale) for file in those.files}
    return [
        {
            "role": file.role,
            "filename": file.filename,
            "digest": file.digest,
            "size_bytes": file.size_bytes,
            **({"scale": file.scale} if file.role == "adapter" else {}),
        }
        for file in these.files
        if (file.role, file.digest, file.filename, file.scale) not in others
    ]
