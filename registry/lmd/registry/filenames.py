"""File names as sources announce them: which are safe to repeat in a URL, a manifest or a message."""

from __future__ import annotations

import unicodedata
from urllib.parse import unquote

MAX_NAME_BYTES = 1024
MAX_PART_BYTES = 255
_HOSTILE_CATEGORIES = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})


def why_hostile(name: str) -> str:
    """Say what is wrong with a file's name that should be a plain relative path; "" when nothing is.

    The answer continues a sentence: "has a backslash". Percent-encoded tricks count, since names become parts of URLs.
    """
    if not name:
        return "is empty"
    if "\\" in name:
        return "has a backslash"
    if any(unicodedata.category(char) in _HOSTILE_CATEGORIES for char in name):
        return "has control or invisible characters"
    if len(name.encode("utf-8")) > MAX_NAME_BYTES:
        return f"is longer than {MAX_NAME_BYTES} bytes"
    parts = name.split("/")
    if any(len(part.encode("utf-8")) > MAX_PART_BYTES for part in parts):
        return f"has a part longer than {MAX_PART_BYTES} bytes"
    decoded = unquote(name, errors="replace")
    if any(part in ("", ".", "..") for part in (*parts, *decoded.split("/"))):
        return "is not a plain relative path"
    if decoded.count("/") != len(parts) - 1 or "\\" in decoded or "\0" in decoded:
        return "hides a separator behind percent signs"
    return ""


def plain_basename(path: str) -> str:
    """The last part of *path*, with characters that do not belong in a name replaced; "model.gguf" when empty."""
    base = path.replace("\\", "/").rstrip("/").rpartition("/")[2]
    clean = "".join("_" if unicodedata.category(char) in _HOSTILE_CATEGORIES or char == "%" else char for char in base)
    while len(clean.encode("utf-8")) > MAX_PART_BYTES:
        clean = clean[1:]
    return clean if clean not in ("", ".", "..") else "model.gguf"
