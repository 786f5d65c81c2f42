"""Keeps the help texts in docs/reference/cli.md those of the program.

`python -m tests.support.cli_docs` writes them; a test compares.
"""

from __future__ import annotations

import re
from pathlib import Path

import click

from lmd.cli.command_table import COMMANDS
from lmd.cli.main import cli

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reference" / "cli.md"

_BLOCK = re.compile(r"<!-- help: (?P<name>[a-z ]+) -->\n.*?<!-- end -->", re.DOTALL)


def documented(page: str) -> list[str]:
    """Return the names of the commands whose help *page* has a place for, in order."""
    return [block["name"].removeprefix("lm").strip() for block in _BLOCK.finditer(page)]


def help_text(name: str) -> str:
    """Return what `lm NAME --help` prints on a terminal of 80 columns."""
    root = click.Context(cli, info_name="lm", terminal_width=80, **cli.context_settings)
    if not name:
        return cli.get_help(root)
    command = cli.get_command(root, name)
    assert command is not None
    return command.get_help(click.Context(command, info_name=name, parent=root, terminal_width=80))


def updated(page: str) -> str:
    """Return *page* with the current help texts."""

    def block(found: re.Match[str]) -> str:
        text = help_text(found["name"].removeprefix("lm").strip())
        return f"<!-- help: {found['name']} -->\n```text\n{text}\n```\n<!-- end -->"

    return _BLOCK.sub(block, page)


def main() -> None:
    """Write the page."""
    page = updated(PAGE.read_text())
    PAGE.write_text(page)
    missing = [name for name in COMMANDS if name not in documented(page)]
    if missing:
        raise SystemExit(f"no place for the help of {', '.join(missing)} in {PAGE}")


if __name__ == "__main__":
    main()
