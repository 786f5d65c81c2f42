"""The static table of commands, and what a start of `lm` may load."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import click
import pytest

from lmd.cli import commands
from lmd.cli.command_table import COMMANDS
from lmd.cli.main import cli
from tests.support.cli import environment

_HEAVY = {"grpc", "google", "rich", "prompt_toolkit", "markdown_it", "platformdirs", "lmd.cli.client"}


def _command(name: str) -> click.Command:
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    return command


def _loaded(script: str) -> set[str]:
    """Return the modules that a fresh interpreter has loaded after *script*.

    Not `-X importtime`: that does not see what `importlib.import_module` loads.
    """
    script += "\nimport sys; print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment(), check=True)
    return set(done.stderr.split())


def _loaded_by(*args: str) -> set[str]:
    return _loaded(f"from lmd.cli.main import run\nassert run({args!r}) == 0")


def test_every_module_is_in_the_table() -> None:
    directory = Path(next(iter(commands.__path__)))
    assert {path.stem for path in directory.glob("*.py")} - {"__init__"} == set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_the_table_says_what_the_command_says(name: str) -> None:
    command = _command(name)
    assert command.name == name
    assert command.short_help == COMMANDS[name]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself_with_examples(name: str) -> None:
    command = _command(name)
    assert command.help
    assert "Examples:" in command.help
    assert f"lm {name}" in command.help.partition("Examples:")[2]
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, f"{name} {parameter.opts} has no help"


def test_help_loads_no_command_and_nothing_heavy() -> None:
    loaded = _loaded_by("--help")
    assert "click" in loaded
    assert not {name for name in loaded if name.split(".")[0] in _HEAVY or name in _HEAVY}
    assert not {name for name in loaded if name.startswith("lmd.cli.commands")}


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_loads_nothing_heavy(name: str) -> None:
    loaded = _loaded_by(name, "--help")
    assert not {module for module in loaded if module.split(".")[0] in _HEAVY or module in _HEAVY}


def test_the_client_imports_nothing_of_the_daemon() -> None:
    script = "import pkgutil, lmd.cli, importlib\n"
    script += "for m in pkgutil.walk_packages(lmd.cli.__path__, 'lmd.cli.'): importlib.import_module(m.name)"
    loaded = _loaded(script)
    assert "lmd.cli.repl.prompt" in loaded
    assert not {name for name in loaded if name.startswith(("lmd.daemon", "lmd.registry", "lmd.runner", "grpc_status"))}
