"""Starting the user's own daemon, with the real command line and a stand-in for `lmd.daemon.main`."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from lmd.cli.endpoints import find_daemon, place_from
from lmd.v1.endpoint import home_socket
from tests.support.cli import Result, command, environment
from tests.support.cli import lm_process as run_lm

_SERVES = """
import os, sys
from pathlib import Path
from lmd.v1.endpoint import home_socket
from tests.support.fake_daemon import serve
home = Path(os.environ["LMD_HOME"])
with (home / "started").open("a") as file:
    file.write(f"{os.getpid()} {os.getcwd()} {os.getsid(0) == os.getpid()} {sys.argv[1:]}\\n")
serve(home_socket(home), lambda daemon: daemon.add("here:latest") and None)
"""
_DIES = "import sys; print('reading the store', flush=True); sys.exit('the store is locked by pid 7')"


@pytest.fixture
def stand_in(tmp_path: Path, lmd_home: Path) -> Iterator[Path]:
    """A package that takes the daemon's place; its `main.py` is for the test to write."""
    package = tmp_path / "lmd" / "daemon"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "main.py").write_text(_SERVES)
    yield package / "main.py"
    lm_process(tmp_path, "serve", "--stop")


def _environment(tree: Path) -> dict[str, str]:
    inherited = environment()
    return {**inherited, "PYTHONPATH": f"{tree}{os.pathsep}{inherited['PYTHONPATH']}"}


def lm_process(tree: Path, *args: str) -> Result:
    return run_lm(*args, env=_environment(tree))


def test_the_first_command_starts_a_daemon_and_says_so_once(stand_in: Path, tmp_path: Path, lmd_home: Path) -> None:
    first = lm_process(tmp_path, "ls", "--json")
    assert first.code == 0
    assert [model["name"] for model in json.loads(first.out)] == ["here:latest"]
    pid, cwd, own_session, args = (lmd_home / "started").read_text().rstrip().split(" ", 3)
    assert first.err == f"started lmd (pid {pid}), log in {lmd_home / 'log' / 'lmd.log'}\n"
    assert (cwd, own_session, args) == ("/", "True", "[]")
    assert home_socket(lmd_home).parent.stat().st_mode & 0o077 == 0
    second = lm_process(tmp_path, "ls")
    assert (second.code, second.err) == (0, "")
    assert len((lmd_home / "started").read_text().splitlines()) == 1


def test_many_that_start_at_once_share_one_daemon(stand_in: Path, tmp_path: Path, lmd_home: Path) -> None:
    running = [
        subprocess.Popen(command("ls"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=_environment(tmp_path))
        for _ in range(4)
    ]
    results = [process.communicate(timeout=40) for process in running]
    assert [process.returncode for process in running] == [0, 0, 0, 0]
    assert sum(b"started lmd" in err for _, err in results) == 1
    assert len((lmd_home / "started").read_text().splitlines()) == 1


def test_no_start_is_exit_status_three_and_starts_nothing(stand_in: Path, tmp_path: Path, lmd_home: Path) -> None:
    result = lm_process(tmp_path, "--no-start", "ls")
    assert (result.code, result.out) == (3, "")
    assert result.err == (f"error: no daemon answers at {home_socket(lmd_home)}\n\nhint: start one with `lm serve`\n")
    as_json = json.loads(lm_process(tmp_path, "--no-start", "ps", "--json").err)
    assert as_json["error"]["reason"] == "DAEMON_UNREACHABLE"
    assert not (lmd_home / "started").exists()


def test_a_named_socket_starts_nothing(stand_in: Path, tmp_path: Path, lmd_home: Path) -> None:
    assert lm_process(tmp_path, "--socket", str(tmp_path / "s"), "ls").code == 3
    assert not (lmd_home / "started").exists()


def test_a_daemon_that_dies_shows_its_last_words(stand_in: Path, tmp_path: Path, lmd_home: Path) -> None:
    stand_in.write_text(_DIES)
    log = lmd_home / "log" / "lmd.log"
    log.parent.mkdir()
    log.write_text("words of an older daemon\n")
    result = lm_process(tmp_path, "ls")
    assert result.code == 3
    assert result.err == (
        "error: the daemon ended at once (exit status 1)\n"
        "\n"
        f"  the last lines of {log}:\n"
        "    reading the store\n"
        "    the store is locked by pid 7\n"
        "\n"
        "hint: `lm serve` runs it in the foreground, where you can watch it\n"
    )


def _has_ended(pid: str) -> bool:
    """Return whether a process is gone, or waits only for its parent to ask how it ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_structured_log_lines_are_put_into_words(stand_in: Path, tmp_path: Path) -> None:
    event = {"event": "daemon_crashed", "level": "critical", "timestamp": "2026-01-01T00:00:00Z", "pid": 7,
             "exception": "Traceback (most recent call last):\n  File\nOSError: no"}  # fmt: skip
    stand_in.write_text(f"import sys; print({json.dumps(json.dumps(event))}, flush=True); sys.exit(3)")
    result = lm_process(tmp_path, "ls")
    assert "\n    critical: daemon_crashed pid=7: OSError: no\n" in result.err


def test_stop_waits_until_the_daemon_is_gone(stand_in: Path, tmp_path: Path, lmd_home: Path) -> None:
    lm_process(tmp_path, "ls")
    pid = (lmd_home / "started").read_text().split()[0]
    result = lm_process(tmp_path, "serve", "--stop")
    assert (result.code, result.err) == (0, f"stopped lmd (pid {pid})\n")
    assert _has_ended(pid)
    assert find_daemon(place_from(os.environ, None)) is None
    assert lm_process(tmp_path, "serve", "--stop").code == 3


def test_serve_becomes_the_daemon(stand_in: Path, tmp_path: Path) -> None:
    stand_in.write_text("import os, sys; print(os.getpid(), *sys.argv[1:])")
    process = subprocess.Popen(
        command("serve", "--config", "x.toml"), stdout=subprocess.PIPE, text=True, env=_environment(tmp_path)
    )
    out, _ = process.communicate(timeout=30)
    assert out == f"{process.pid} --config x.toml\n"


def test_a_home_whose_socket_path_is_too_long(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 100)
    result = run_lm("ls", env={"LMD_HOME": str(deep)})
    assert result.code == 3
    assert "the system allows 107" in result.err
    assert not deep.exists()
