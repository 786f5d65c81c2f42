"""`lm status`: what it tells of the drop-in folder."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lmd.v1.endpoint import home_socket
from tests.support.cli import lm
from tests.support.fake_daemon import FakeDaemon

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def daemon(lmd_home: Path) -> Iterator[FakeDaemon]:
    with FakeDaemon(home_socket(lmd_home)) as fake:
        yield fake


def add_problem(daemon: FakeDaemon, file: str, message: str, *, waiting: bool = False) -> None:
    problem = daemon.status.dropin_problems.add(file=file, message=message, waiting=waiting)
    problem.since_time.FromSeconds(int(time.time()) - 7200)
    daemon.status.dropin_problem_count += 1


def test_files_that_are_no_models(daemon: FakeDaemon, capsys: Capture) -> None:
    assert "Drop-in folder" not in lm(capsys, "status").out
    add_problem(daemon, "bad.modelfile", "line 1:1: unknown directive `FORM`\x1b[31m")
    add_problem(daemon, "big/Modelfile", "big-00002-of-00003.gguf of ./ is not there yet", waiting=True)
    daemon.status.dropin_problem_count = 5
    shown = lm(capsys, "status").out
    section = shown[shown.index("Drop-in folder") : shown.index("Devices")].splitlines()
    assert [line.split("  ")[1:] for line in section[1:3]] == [
        ["bad.modelfile", "line 1:1: unknown directive `FORM`[31m (for 2 hours)"],
        ["big/Modelfile", "big-00002-of-00003.gguf of ./ is not there yet (waiting for 2 hours)"],
    ]
    assert section[3].strip() == "and 3 more"


def test_programs_get_them_too(daemon: FakeDaemon, capsys: Capture) -> None:
    add_problem(daemon, "bad.modelfile", "model `x` not found")
    told = json.loads(lm(capsys, "status", "--json").out)
    [problem] = told["dropin_problems"]
    assert (problem["file"], problem["message"], problem["waiting"]) == ("bad.modelfile", "model `x` not found", False)
    assert problem["since"].endswith("Z")
    assert told["dropin_problem_count"] == 1
