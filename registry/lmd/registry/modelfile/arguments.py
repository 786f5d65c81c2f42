"""The arguments that have a grammar of their own: of ADAPTER, QUANTIZE and REQUIRES."""

from __future__ import annotations

import math
import re

from lmd.registry.errors import InvalidRequest
from lmd.registry.lm_config import MAX_SCALE
from lmd.registry.modelfile.text import SPACES, quoted
from lmd.registry.quantization import QUANT_TYPES, parse_quant_type

QUANTIZATIONS = tuple(kind.name for kind in QUANT_TYPES)
"""Every quantization that can be asked for, as the engine spells it."""

_NUMBER = re.compile(r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?|[+-]?(?:inf|nan)", re.IGNORECASE | re.ASCII)
_QUOTED = re.compile(r'(?P<quotes>"""|")(?P<path>.*)(?P=quotes)(?:[ \t]+(?P<rest>[^ \t"]+))?')
_VERSION = re.compile(r"v?(\d{1,9}(?:\.\d{1,9}){0,2}(?:-[0-9A-Za-z.-]{1,40})?)", re.ASCII)


def split_adapter(text: str) -> tuple[str, str]:
    """Split the argument of ADAPTER, a line without the spaces around it, into the path and the scale as written.

    A path that has a number for its last word must be quoted; the scale is "" when there is none.
    """
    found = _QUOTED.fullmatch(text)
    if found is not None:
        return found["path"], found["rest"] or ""
    path, _, last = text.replace("\t", " ").rpartition(" ")
    stem = text[: len(path)].rstrip(SPACES)
    # After a GGUF's name anything that is no path was meant for a scale, and is better refused than looked for.
    meant = stem.lower().endswith(".gguf") and "/" not in last and not last.lower().endswith(".gguf")
    if stem and (_NUMBER.fullmatch(last) or meant):
        return stem, last
    return text, ""


def read_scale(text: str) -> float:
    """Read the scale of an adapter; "" is 1. Raises: InvalidRequest."""
    if not text:
        return 1.0
    value = float(text) if _NUMBER.fullmatch(text) else math.nan
    if not -MAX_SCALE <= value <= MAX_SCALE:
        raise InvalidRequest(
            f"the scale of an adapter must be a number from {-MAX_SCALE:g} to {MAX_SCALE:g}, not `{text[:32]}`",
            field="adapter",
            hint="1 applies it as it was trained",
        )
    # Minus zero would print as another text than zero and mean the same.
    return value or 0.0


def format_adapter(path: str, scale: float) -> str | None:
    """Write the argument of ADAPTER such that it reads back; None when the path cannot be written."""
    written = quoted(path)
    if written is None or "\n" in path:
        return None
    number = "" if scale == 1 else f" {scale!r}"
    for form in (written, f'"{path}"', f'"""{path}"""'):
        if split_adapter(form + number) == (path, number.lstrip()):
            return form + number
    return None


def read_quantization(text: str) -> str:
    """Read the name of a quantization, in any case, as the engine spells it. Raises: InvalidRequest."""
    return parse_quant_type(text).name


def read_version(text: str) -> str:
    """Read a version, without the `v` it may begin with. Raises: InvalidRequest."""
    found = _VERSION.fullmatch(text)
    if found is None:
        shown = f"`{text[:32]}`" if text else "an empty value"
        raise InvalidRequest(f"{shown} is no version", field="requires", hint="a version of Ollama looks like 0.14.0")
    return found[1]
