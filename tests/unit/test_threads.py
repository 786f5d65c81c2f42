"""Thread counts that were measured beside others are not taken for what the machine can do."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from lmd.runner import threads


def stat(path: Path, busy_s: float) -> None:
    ticks = int(busy_s * os.sysconf("SC_CLK_TCK"))
    path.write_text(f"cpu  {ticks} 0 0 500 0 0 0 0 0 0\ncpu0 1 2 3 4 5 6 7 8 9 10\n")


@pytest.mark.parametrize(("others_s", "quiet"), [(0.0, True), (0.05, True), (0.5, False), (2.0, False)])
def test_what_others_compute_meanwhile_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, others_s: float, quiet: bool
) -> None:
    path = tmp_path / "stat"
    now, own = 100.0, os.times()
    monkeypatch.setattr(threads, "_STAT", path)
    monkeypatch.setattr(time, "monotonic", lambda: now)
    monkeypatch.setattr(os, "times", lambda: own)
    stat(path, 1000)
    others = threads._Others()
    now += 1.0
    stat(path, 1000 + others_s)
    assert (others.cores() <= threads._QUIET_CORES) is quiet


def test_a_system_that_does_not_tell_is_taken_for_quiet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "_STAT", tmp_path / "missing")
    assert threads._Others().cores() == 0
