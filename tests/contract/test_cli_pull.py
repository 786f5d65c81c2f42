"""`lm pull`: progress, detaching, cancelling, and Ctrl-C."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from lmd.cli.progress import BarReporter, LineReporter
from lmd.v1 import model_service_pb2 as pb
from lmd.v1.endpoint import home_socket
from tests.support.cli import lm, terminal
from tests.support.fake_daemon import MIB, FakeDaemon, FakeFailure, Gate
from tests.support.screen import Screen

Capture = pytest.CaptureFixture[str]
State = pb.PullProgress.State


@pytest.fixture
def daemon(lmd_home: Path) -> Iterator[FakeDaemon]:
    with FakeDaemon(home_socket(lmd_home)) as fake:
        yield fake


def _gated(gate: Gate, *, joined: bool = False) -> Any:
    def script(_request: Any, context: grpc.ServicerContext) -> Iterator[pb.PullModelResponse]:
        yield pb.PullModelResponse(started=pb.PullStarted(pull_id="p", name="big:latest", joined=joined))
        yield pb.PullModelResponse(
            progress=pb.PullProgress(
                filename="big.gguf",
                completed_bytes=600 * MIB,
                total_bytes=1024 * MIB,
                resumed_bytes=512 * MIB,
                state=State.STATE_DOWNLOADING,
            )
        )
        gate.wait(context)

    return script


def test_without_a_terminal_there_are_a_few_plain_lines(daemon: FakeDaemon, capsys: Capture) -> None:
    result = lm(capsys, "pull", "llama3")
    assert (result.code, result.out) == (0, "")
    *lines, last = result.err.splitlines()
    assert lines == [
        "pulling llama3:latest",
        "model.gguf: 0 B of 1 MiB, 0%",
        "model.gguf: writing to disk",
        "model.gguf: done, 1 MiB",
    ]
    assert last.startswith("pulled llama3:latest  1.13 MiB in ")


def test_progress_can_be_switched_off(daemon: FakeDaemon, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMD_NO_PROGRESS", "1")
    assert [line.split()[0] for line in lm(capsys, "pull", "llama3").err.splitlines()] == ["pulling", "pulled"]


def test_json_is_one_event_per_line(daemon: FakeDaemon, capsys: Capture) -> None:
    result = lm(capsys, "pull", "--json", "llama3")
    events = [json.loads(line) for line in result.out.splitlines()]
    assert [event["event"] for event in events] == ["started", "progress", "progress", "progress", "model"]
    assert events[0] == {"event": "started", "pull_id": "p1", "name": "llama3:latest", "joined": False}
    assert (events[1]["state"], events[1]["total_bytes"]) == ("downloading", MIB)
    assert events[-1]["digest"].startswith("sha256:")
    assert result.err == ""


def test_the_users_token_travels_with_the_request(
    daemon: FakeDaemon, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret\n")
    result = lm(capsys, "-v", "pull", "llama3")
    assert daemon.requests("PullModel")[0].token == "hf_secret"
    assert "hf_secret" not in result.err


def test_detach_returns_at_once(daemon: FakeDaemon, capsys: Capture) -> None:
    gate = Gate()
    daemon.pull = _gated(gate)
    result = lm(capsys, "pull", "--detach", "big")
    assert result.code == 0
    assert "pulling big:latest in the background" in result.err
    assert daemon.requests("PullModel")[0].detach


def test_the_list_of_pulls(daemon: FakeDaemon, capsys: Capture) -> None:
    daemon.pulls.append(
        pb.Pull(pull_id="p", ref="big", name="big:latest", state=pb.Pull.STATE_ACTIVE, completed_bytes=MIB,
                total_bytes=4 * MIB)
    )  # fmt: skip
    daemon.pulls.append(pb.Pull(pull_id="q", ref="bad", state=pb.Pull.STATE_FAILED, error_message="no such repository"))
    _, first, second = lm(capsys, "pull", "--list").out.splitlines()
    assert first.split()[:5] == ["big:latest", "active", "25%", "4", "MiB"]
    assert second.split()[:2] == ["bad", "failed"]
    assert second.endswith("no such repository")
    listed = json.loads(lm(capsys, "pull", "--list", "--json").out)
    assert [pull["state"] for pull in listed] == ["active", "failed"]


def test_cancel(daemon: FakeDaemon, capsys: Capture) -> None:
    assert lm(capsys, "pull", "--cancel", "big").code == 0
    assert daemon.requests("CancelPull")[0].pull_id == "big"


def test_a_gated_repository_says_how_to_get_in(daemon: FakeDaemon, capsys: Capture) -> None:
    daemon.failures["PullModel"] = FakeFailure(
        grpc.StatusCode.PERMISSION_DENIED,
        "SOURCE_ACCESS_DENIED",
        "hf.co/meta/x is gated",
        ref="hf.co/meta/x",
        hint="accept its terms, then set `HF_TOKEN`",
    )
    result = lm(capsys, "pull", "hf.co/meta/x")
    assert (result.code, result.err) == (
        1,
        "error: hf.co/meta/x is gated\n\nhint: accept its terms, then set `HF_TOKEN`\n",
    )


@pytest.mark.parametrize(
    ("joined", "said"), [(False, "`lm pull big` goes on from there"), (True, "it goes on while others watch it")]
)
def test_ctrl_c_hangs_up_and_says_what_becomes_of_the_pull(daemon: FakeDaemon, joined: bool, said: str) -> None:
    gate = Gate()
    daemon.pull = _gated(gate, joined=joined)
    with terminal("pull", "big", columns=100) as screen:
        screen.expect(r"big\.gguf .*58%.*600 MiB / 1 GiB")
        assert gate.reached.wait(10)
        screen.type("\x03")
        screen.expect(said)
        assert screen.wait() == 130
    assert gate.hung_up.wait(10)
    assert "\x1b[?25h" in screen.raw.rpartition("\x1b[?25l")[2]


def test_json_ctrl_c_has_no_chatter(daemon: FakeDaemon) -> None:
    gate = Gate()
    daemon.pull = _gated(gate)
    with terminal("pull", "--json", "big") as screen:
        screen.expect('"resumed_bytes": 536870912')
        screen.type("\x03")
        assert screen.wait() == 130


def _progress(done: int, state: State.ValueType, total: int = 100 * MIB, **more: Any) -> pb.PullProgress:
    return pb.PullProgress(filename="a.gguf", completed_bytes=done, total_bytes=total, state=state, **more)


class _Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class TestBars:
    def _shown(self, monkeypatch: pytest.MonkeyPatch, *steps: tuple[float, pb.PullProgress], columns: int = 100) -> str:
        screen, clock = Screen(columns), _Clock()
        monkeypatch.setenv("COLUMNS", str(columns))
        reporter = BarReporter(screen, clock)  # type: ignore[arg-type]
        for clock.now, progress in steps:
            reporter.progress(progress)
        return screen.text

    def test_rate_and_remaining_time(self, monkeypatch: pytest.MonkeyPatch) -> None:
        text = self._shown(
            monkeypatch,
            (0, _progress(0, State.STATE_DOWNLOADING)),
            (1, _progress(10 * MIB, State.STATE_DOWNLOADING)),
            (2, _progress(20 * MIB, State.STATE_DOWNLOADING)),
        )
        assert "20%" in text
        assert "20 MiB / 100 MiB" in text
        assert "10 MiB/s" in text
        assert text.endswith("0:08")

    def test_a_pause_is_shown_instead_of_a_speed_that_is_over(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Bars were redrawn only when something came, so a stalled transfer went on promising its last speed."""
        screen, clock = Screen(100), _Clock()
        monkeypatch.setenv("COLUMNS", "100")
        reporter = BarReporter(screen, clock)  # type: ignore[arg-type]
        for second in range(3):
            clock.now = second
            reporter.progress(_progress(second * 10 * MIB, State.STATE_DOWNLOADING))
        clock.now = 14.5
        reporter.refresh()
        assert screen.text.endswith("20 MiB / 100 MiB      no data for 12s")
        clock.now = 15
        reporter.progress(_progress(21 * MIB, State.STATE_DOWNLOADING))
        assert "no data" not in screen.text

    def test_what_stays_is_what_was_reached(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """After an error there stood a speed, a remaining time and `resolving`, as if it all went on."""
        screen = Screen(100)
        monkeypatch.setenv("COLUMNS", "100")
        reporter = BarReporter(screen, _Clock())  # type: ignore[arg-type]
        reporter.progress(_progress(100 * MIB, State.STATE_DONE))
        for name, done in (("b.gguf", 7 * MIB), ("c.gguf", 0)):
            progress = _progress(done, State.STATE_DOWNLOADING)
            progress.filename = name
            reporter.progress(progress)
        reporter.close()
        assert screen.text == "  a.gguf  done  100 MiB\n  b.gguf  7 MiB of 100 MiB"

    def test_a_source_that_was_never_found_leaves_no_line(self, monkeypatch: pytest.MonkeyPatch) -> None:
        screen = Screen(100)
        reporter = BarReporter(screen, _Clock())  # type: ignore[arg-type]
        reporter.progress(pb.PullProgress(state=State.STATE_RESOLVING))
        assert screen.text == "  source  resolving"
        reporter.close()
        assert screen.text == ""

    def test_a_resumed_pull_says_where_it_began_and_does_not_count_that_as_speed(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        text = self._shown(
            monkeypatch,
            (0, _progress(50 * MIB, State.STATE_DOWNLOADING, resumed_bytes=50 * MIB)),
            (1, _progress(51 * MIB, State.STATE_DOWNLOADING, resumed_bytes=50 * MIB)),
            columns=120,
        )
        assert "1 MiB/s" in text
        assert "resumed at 50 MiB" in text

    @pytest.mark.parametrize(
        ("state", "text"),
        [
            (State.STATE_DONE, "done  100 MiB"),
            (State.STATE_PRESENT, "already here  100 MiB"),
            (State.STATE_COMMITTING, "writing to disk"),
            (State.STATE_RETRYING, "retrying  connection reset"),
        ],
    )
    def test_states(self, monkeypatch: pytest.MonkeyPatch, state: State.ValueType, text: str) -> None:
        shown = self._shown(monkeypatch, (0, _progress(100 * MIB, state, detail="connection\nreset")))
        assert shown == f"  a.gguf  {text}"

    @pytest.mark.parametrize("columns", [30, 40, 60, 80, 200])
    def test_a_line_never_wraps(self, monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
        for state in (State.STATE_DOWNLOADING, State.STATE_RETRYING, State.STATE_DONE):
            progress = _progress(3 * MIB, state, detail="a long story " * 20, resumed_bytes=MIB)
            progress.filename = "a-very-long-file-name-of-a-model-" * 4
            text = self._shown(monkeypatch, (0, progress), (9, progress), columns=columns)
            assert "\n" not in text

    def test_a_size_that_is_not_known(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert "3 MiB" in self._shown(monkeypatch, (0, _progress(3 * MIB, State.STATE_DOWNLOADING, total=0)))

    def test_a_hostile_file_name_is_harmless(self, monkeypatch: pytest.MonkeyPatch) -> None:
        progress = _progress(0, State.STATE_DONE)
        progress.filename = "\x1b[2J\nx\u202e"
        assert self._shown(monkeypatch, (0, progress)).startswith("  [2J x  done")


def test_plain_lines_are_few() -> None:
    screen, clock = Screen(), _Clock()
    reporter = LineReporter(screen, clock)  # type: ignore[arg-type]
    for tenth in range(200):
        clock.now = tenth / 10
        reporter.progress(_progress(tenth * MIB // 4, State.STATE_DOWNLOADING))
    assert len(screen.text.splitlines()) == 4
    assert "2.5 MiB/s" in screen.text.splitlines()[-1]
