"""Keeps the tables in docs/reference/parameters.md those of the program.

`python -m tests.support.parameter_docs` writes them; a test compares.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from lmd.registry.parameters import PARAMETERS, Parameter

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reference" / "parameters.md"

_BLOCK = re.compile(r"<!-- parameters: (?P<part>load|request) -->\n.*?<!-- end -->", re.DOTALL)

# What depends on the model has its default in words.
_IN_WORDS = {
    "num_ctx": "4096, or what the model was trained with if that is less",
    "kv_type": "f16, unless the configuration says otherwise",
}


def updated(page: str) -> str:
    """Return *page* with the current tables."""

    def block(found: re.Match[str]) -> str:
        load_time = found["part"] == "load"
        lines = ["| name | legal | default | meaning |", "|---|---|---|---|"]
        lines += [_line(parameter) for parameter in PARAMETERS.values() if parameter.load_time is load_time]
        return f"<!-- parameters: {found['part']} -->\n" + "\n".join(lines) + "\n<!-- end -->"

    return _BLOCK.sub(block, page)


def _line(parameter: Parameter) -> str:
    return f"| `{parameter.name}` | {parameter.legal} | {_default(parameter)} | {parameter.doc} |"


def _default(parameter: Parameter) -> str:
    if parameter.name in _IN_WORDS:
        return _IN_WORDS[parameter.name]
    value = parameter.default
    if isinstance(value, tuple):
        # Written as JSON, since a newline is among them.
        return " ".join(f"`{json.dumps(text)}`" for text in value) or "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return value
    assert value is not None, f"the default of {parameter.name} is not in words"
    return f"{value:g}"


def main() -> None:
    """Write the page."""
    PAGE.write_text(updated(PAGE.read_text()))


if __name__ == "__main__":
    main()
