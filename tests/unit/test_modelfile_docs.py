"""The reference of Modelfiles names all that there is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lmd.gotemplate.parser import FUNCTIONS, MAX_CHARACTERS
from lmd.registry.lm_config import MAX_SCALE
from lmd.registry.modelfile import DIRECTIVES, MAX_BYTES

_DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGE = (_DOCS / "reference" / "modelfile.md").read_text()


def _section(title: str) -> str:
    """The text below a heading, to the next one of the same level."""
    level = "#" * (len(title) - len(title.lstrip("#")))
    found = re.search(rf"^{re.escape(title)}\n(.*?)(?=^{level} |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    assert found is not None, title
    return found[1]


def test_every_directive_has_a_row_and_a_section_and_no_other_has() -> None:
    directives = _section("## Directives")
    assert set(re.findall(r"^\| \[`([A-Z]+)`\]", directives, re.MULTILINE)) == set(DIRECTIVES)
    assert set(re.findall(r"^### ([A-Z]+)$", directives, re.MULTILINE)) == set(DIRECTIVES)


def test_every_function_of_go_templates_is_named_and_no_other_is() -> None:
    table = re.search(r"^\| function \|.*?\n\n", _section("### Ollama's language"), re.MULTILINE | re.DOTALL)
    assert table is not None
    named = {name for row in table[0].strip().splitlines()[2:] for name in re.findall(r"`(\w+)`", row.split("|")[1])}
    assert named == FUNCTIONS


@pytest.mark.parametrize(
    "limit",
    [
        f"at most {MAX_BYTES >> 20} MiB",
        f"from -{MAX_SCALE:g} to {MAX_SCALE:g}",
        f"at most {MAX_CHARACTERS:,} characters",
    ],
)
def test_limits_are_those_of_the_program(limit: str) -> None:
    assert limit in PAGE


@pytest.mark.parametrize("page", ["guides/modelfile.md", "reference/modelfile.md"])
def test_links_lead_somewhere(page: str) -> None:
    path = _DOCS / page
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text()):
        assert (path.parent / target).exists(), target
