"""Shell completion: the scripts, and what they ask `lm` for."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from lmd.cli.command_table import COMMANDS
from lmd.v1 import runtime_service_pb2 as runtime_pb
from lmd.v1.endpoint import home_socket
from tests.support.cli import command, environment, lm_process
from tests.support.fake_daemon import FakeDaemon


@pytest.fixture
def daemon(lmd_home: Path) -> Iterator[FakeDaemon]:
    with FakeDaemon(home_socket(lmd_home)) as fake:
        fake.add("llama3:latest")
        fake.add("hf.co/a/b:q8_0")
        yield fake


def _completed(line: str) -> list[str]:
    words = line.split(" ")
    result = subprocess.run(
        command(),
        capture_output=True,
        text=True,
        check=True,
        env=environment({"_LM_COMPLETE": "bash_complete", "COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)}),
    )
    assert result.stderr == ""
    return [entry.split(",", 1)[1] for entry in result.stdout.splitlines() if entry]


def test_commands_come_from_the_table() -> None:
    assert _completed("lm ") == list(COMMANDS)
    assert _completed("lm st") == ["stop", "status"]
    assert "--no-start" in _completed("lm --")


def test_options_of_a_command() -> None:
    assert "--detach" in _completed("lm pull --d")


def test_names_come_from_a_running_daemon(daemon: FakeDaemon) -> None:
    assert _completed("lm run ") == ["llama3:latest", "hf.co/a/b:q8_0"]
    assert _completed("lm rm hf") == ["hf.co/a/b:q8_0"]


def test_what_is_in_memory_completes_what_can_leave_it(daemon: FakeDaemon) -> None:
    daemon.runners = [runtime_pb.Runner(name="llama3:latest"), runtime_pb.Runner(name="poet:latest", pinned=True)]
    assert _completed("lm stop ") == ["llama3:latest", "poet:latest"]
    assert _completed("lm unpin ") == ["poet:latest"]
    assert _completed("lm stop po") == ["poet:latest"]


def test_without_a_daemon_there_are_no_names_and_none_is_started(lmd_home: Path) -> None:
    assert _completed("lm run ") == []
    assert not home_socket(lmd_home).parent.exists()


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_scripts_parse(shell: str, tmp_path: Path) -> None:
    result = lm_process("completion", shell)
    assert result.code == 0
    assert "_LM_COMPLETE" in result.out
    path = shutil.which(shell)
    if path is not None:
        script = tmp_path / "script"
        script.write_text(result.out)
        subprocess.run([path, "-n", str(script)], check=True)


def test_another_shell_is_a_mistake() -> None:
    result = lm_process("completion", "tcsh")
    assert result.code == 2
    assert "'bash', 'zsh', 'fish'" in result.err
