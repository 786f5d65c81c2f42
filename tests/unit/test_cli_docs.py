"""The reference of the command line is what the program says."""

from __future__ import annotations

from lmd.cli.command_table import COMMANDS
from tests.support.cli_docs import PAGE, documented, updated


def test_every_command_is_documented_once() -> None:
    assert documented(PAGE.read_text()) == ["", *COMMANDS]


def test_the_help_texts_are_current() -> None:
    page = PAGE.read_text()
    assert updated(page) == page, "run `python -m tests.support.cli_docs`"


def test_every_environment_variable_is_named() -> None:
    page = PAGE.read_text()
    for name in ("LMD_HOME", "LMD_SOCKET", "HF_TOKEN", "HF_ENDPOINT", "NO_COLOR", "LMD_NO_PROGRESS"):
        assert f"`{name}`" in page
