from __future__ import annotations

import io
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog

from lmd.daemon.config import LogConfig
from lmd.daemon.logs import configure


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    root.handlers[:] = []  # pytest's own handlers must not be closed by configure()
    yield
    for handler in root.handlers:
        handler.close()
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.reset_defaults()


class Stderr(io.TextIOWrapper):
    """A real file that may claim to be a terminal."""

    tty = False

    def isatty(self) -> bool:
        return self.tty


@pytest.fixture
def stderr(tmp_path: Path) -> Iterator[Stderr]:
    with Stderr(open(tmp_path / "stderr", "wb"), write_through=True) as stream:
        yield stream


def written(stderr: Stderr) -> str:
    return Path(stderr.name).read_text()


def log_in(format_: str, stderr: Stderr, tmp_path: Path, **env: str) -> Any:
    config = LogConfig.model_validate({"format": format_, "level": "debug"})
    assert configure(config, tmp_path / "log", env, stderr) is None
    return structlog.get_logger("test")


def test_json_lines(stderr: Stderr, tmp_path: Path) -> None:
    log_in("auto", stderr, tmp_path).info("pull_started", name="m\x1b[31m", size_bytes=5)
    logging.getLogger("lmd.registry.x").warning("blob %s is odd", "abc")
    ours, foreign = map(json.loads, written(stderr).splitlines())
    assert ours.pop("timestamp").endswith("Z")
    assert ours == {"event": "pull_started", "level": "info", "name": "m\x1b[31m", "size_bytes": 5}
    assert (foreign["event"], foreign["level"]) == ("blob abc is odd", "warning")
    assert "\x1b" not in written(stderr)


def test_a_terminal_gets_readable_lines_without_control_characters(stderr: Stderr, tmp_path: Path) -> None:
    stderr.tty = False
    log_in("console", stderr, tmp_path).warning("odd_name", name="m\x1b[31m\nfake")
    (line,) = written(stderr).splitlines()
    assert "odd_name" in line
    assert "\x1b" not in line


def test_auto_on_a_terminal_is_console(stderr: Stderr, tmp_path: Path) -> None:
    stderr.tty = True
    log_in("auto", stderr, tmp_path).info("hello")
    assert not written(stderr).startswith("{")


def test_the_journal_gets_priorities_on_every_line(stderr: Stderr, tmp_path: Path) -> None:
    found = os.fstat(stderr.fileno())
    log = log_in("auto", stderr, tmp_path, JOURNAL_STREAM=f"{found.st_dev}:{found.st_ino}")
    log.info("ready", pid=7, note="two words", name="a\nb")
    try:
        raise KeyError("gone")
    except KeyError:
        log.exception("failed")
    first, second, *traceback = written(stderr).splitlines()
    assert first == r"<6>ready pid=7 note=two words name='a\nb'"
    assert second == "<3>failed"
    assert all(line.startswith("<3>") for line in traceback)
    assert traceback[-1] == "<3>KeyError: 'gone'"


@pytest.mark.parametrize("format_", ["json", "console", "journal"])
def test_tracebacks_show_no_values_and_fields_no_secrets(stderr: Stderr, tmp_path: Path, format_: str) -> None:
    """structlog's own default prints the local variables of every frame: prompts and tokens among them."""
    log = log_in(format_, stderr, tmp_path)
    secret = "_".join(["hf", "verysecret"])

    def fails(prompt: str) -> None:
        raise ValueError(len(prompt))

    try:
        fails(secret)
    except ValueError:
        log.exception("rpc_failed", hub_token=secret, authorization=f"Bearer {secret}", prompt_tokens=12)
    text = written(stderr)
    assert "ValueError" in text
    assert secret not in text
    assert "12" in text


def test_the_level_applies(stderr: Stderr, tmp_path: Path) -> None:
    configure(LogConfig.model_validate({"level": "warning"}), tmp_path, {}, stderr)
    structlog.get_logger("test").info("quiet")
    structlog.get_logger("test").warning("loud")
    assert [json.loads(line)["event"] for line in written(stderr).splitlines()] == ["loud"]


def test_what_nobody_would_see_goes_to_a_private_file(tmp_path: Path) -> None:
    with open(os.devnull, "w") as null:
        file = configure(LogConfig(), tmp_path / "log", {}, null)
    assert file == tmp_path / "log" / "lmd.log"
    structlog.get_logger("test").info("kept")
    assert json.loads(file.read_text())["event"] == "kept"
    assert file.stat().st_mode & 0o777 == 0o600


def test_a_daemon_whose_output_is_its_log_rotates_it(tmp_path: Path) -> None:
    own = tmp_path / "lmd.log"
    with own.open("a") as stream:
        assert configure(LogConfig(), tmp_path, {}, stream) == own


def test_a_configured_file_wins(tmp_path: Path, stderr: Stderr) -> None:
    file = tmp_path / "deep" / "own.log"
    assert configure(LogConfig.model_validate({"file": str(file)}), tmp_path, {}, stderr) == file
    structlog.get_logger("test").info("there")
    assert "there" in file.read_text()
    assert written(stderr) == ""
