"""`lm ps`, `lm load`, `lm pin`, `lm unpin` and `lm stop`, against a daemon that only pretends."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from lmd.cli.output import table_lines
from lmd.cli.runners import runner_lines
from lmd.cli.terminal import cell_width
from lmd.v1 import runtime_service_pb2 as pb
from lmd.v1.endpoint import home_socket
from tests.support.cli import lm, terminal
from tests.support.fake_daemon import FakeDaemon, FakeFailure

Capture = pytest.CaptureFixture[str]
MIB = 1 << 20


@pytest.fixture
def daemon(lmd_home: Path) -> Iterator[FakeDaemon]:
    with FakeDaemon(home_socket(lmd_home)) as fake:
        fake.add("poet:latest")
        yield fake


def runner(name: str = "poet:latest", **fields: object) -> pb.Runner:
    values = {"state": pb.Runner.STATE_READY, "device": "cpu", "memory_bytes": 100 * MIB, "slots": 4} | fields
    return pb.Runner(name=name, digest=f"sha256:{'a' * 64}", context_length=4096, **values)  # type: ignore[arg-type]


def picture(*runners: pb.Runner, event: tuple[pb.Runner.State.ValueType, str] | None = None) -> pb.WatchRunnersResponse:
    seen = pb.WatchRunnersResponse(runners=runners)
    if event is not None:
        seen.events.add(name="poet:latest", state=event[0], reason=event[1]).time.FromSeconds(1_700_000_000)
    return seen


# ps


def test_ps_tells_pins_and_shares(daemon: FakeDaemon, capsys: Capture) -> None:
    shares = [pb.DeviceShare(device="cuda0", bytes=75 * MIB), pb.DeviceShare(device="cpu", bytes=25 * MIB)]
    daemon.runners = [runner(pinned=True, shares=shares, slots_busy=1, queued=3, reason="is b's turn")]
    shown = lm(capsys, "ps").out.splitlines()
    assert shown[0].split() == "NAME STATE DEVICE MEMORY CONTEXT SLOTS QUEUED CACHE UNTIL REASON".split()
    row = shown[1].split()
    assert row[:8] == ["poet:latest", "ready", "cuda0:75%", "cpu:25%", "100", "MiB", "4096", "1/4"]
    assert row[8:] == ["3", "pinned", "is", "b's", "turn"]
    (as_json,) = json.loads(lm(capsys, "ps", "--json").out)
    assert as_json["pinned"] is True
    assert as_json["shares"][1] == {"device": "cpu", "bytes": 25 * MIB}


@pytest.mark.parametrize("columns", [20, 40, 60, 80, 200])
def test_a_live_line_never_wraps(columns: int) -> None:
    runners = [runner(f"model-{n}:latest", reason="waits for a long time 詩人 " * n) for n in range(5)]
    lines = runner_lines(runners, 0.0, columns)
    assert len(lines) == 6
    assert all(cell_width(line) <= columns for line in lines)


def test_watching_in_a_pipe_prints_a_line_for_each_event(daemon: FakeDaemon, capsys: Capture) -> None:
    daemon.watched = [
        picture(),
        picture(runner(), event=(pb.Runner.STATE_READY, "")),
        picture(event=(pb.Runner.STATE_UNSPECIFIED, "was not used")),
    ]
    done = lm(capsys, "ps", "--watch")
    assert done.out.splitlines() == [
        "2023-11-14T22:13:20.000Z  poet:latest  ready",
        "2023-11-14T22:13:20.000Z  poet:latest  gone  was not used",
    ]
    assert "the daemon shuts down" in done.err
    assert done.code == 0


def test_a_line_is_printed_only_for_news(daemon: FakeDaemon, capsys: Capture) -> None:
    loading, ready = pb.Runner.STATE_LOADING, pb.Runner.STATE_READY
    at_once = picture(event=(loading, "starts the runner"))
    at_once.events.append(picture(event=(loading, "waits for memory: 1.7 GiB needed, 584.1 MiB free")).events[0])
    daemon.watched = [
        at_once,
        picture(event=(loading, "waits for memory: 1.7 GiB needed, 0 B free")),
        picture(event=(loading, "reads the weights")),
        picture(event=(ready, "")),
        picture(event=(loading, "reads the weights")),
    ]
    assert [line.split("  ", 2)[2] for line in lm(capsys, "ps", "--watch").out.splitlines()] == [
        "loading  waits for memory: 1.7 GiB needed, 584.1 MiB free",
        "loading  reads the weights",
        "ready",
        "loading  reads the weights",
    ]


def test_watching_as_json_prints_a_line_for_each_picture(daemon: FakeDaemon, capsys: Capture) -> None:
    daemon.watched = [picture(), picture(runner(), event=(pb.Runner.STATE_READY, ""))]
    first, second = map(json.loads, lm(capsys, "ps", "-w", "--json").out.splitlines())
    assert first == {"runners": [], "events": []}
    assert second["runners"][0]["name"] == "poet:latest"
    assert second["events"][0] == {
        "time": "2023-11-14T22:13:20.000Z",
        "name": "poet:latest",
        "digest": "",
        "state": "ready",
        "reason": "",
    }


def test_watching_ends_with_the_connection(daemon: FakeDaemon, capsys: Capture) -> None:
    daemon.failures["WatchRunners"] = FakeFailure(grpc.StatusCode.UNAVAILABLE, "DRAINING", "the daemon shuts down")
    done = lm(capsys, "ps", "--watch")
    assert done.code != 0
    assert "error: " in done.err


def test_watching_on_a_terminal_keeps_one_table(daemon: FakeDaemon) -> None:
    daemon.watched = [picture(), picture(runner()), picture(runner(state=pb.Runner.STATE_DRAINING))]
    with terminal("ps", "--watch", columns=100) as shown:
        shown.expect("draining")
        shown.expect("the daemon shuts down")


# load, pin, unpin


def test_load_passes_parameters_and_keep_alive(daemon: FakeDaemon, capsys: Capture) -> None:
    done = lm(capsys, "load", "-o", "num_ctx=512", "--keep-alive", "1h", "poet")
    (request,) = daemon.requests("LoadModel")
    assert (request.name, request.parameters.num_ctx, request.keep_alive.seconds) == ("poet:latest", 512, 3600)
    assert "loaded poet:latest" in done.err
    assert done.out == ""


def test_load_of_several_as_json(daemon: FakeDaemon, capsys: Capture) -> None:
    daemon.add("critic:latest")
    loaded = json.loads(lm(capsys, "load", "poet", "critic", "--json").out)
    assert [entry["name"] for entry in loaded] == ["poet:latest", "critic:latest"]
    assert not daemon.requests("LoadModel")[0].HasField("keep_alive")


def test_load_that_fails_says_why(daemon: FakeDaemon, capsys: Capture) -> None:
    daemon.failures["LoadModel"] = FakeFailure(
        grpc.StatusCode.RESOURCE_EXHAUSTED, "DEVICE_MEMORY", "9 GiB needed, 3 GiB can be freed"
    )
    done = lm(capsys, "load", "poet")
    assert done.code == 1
    assert "9 GiB needed" in done.err


def test_pin_and_unpin(daemon: FakeDaemon, capsys: Capture) -> None:
    assert "pinned poet:latest" in lm(capsys, "pin", "-o", "num_ctx=512", "poet").err
    (request,) = daemon.requests("PinModel")
    assert (request.name, request.parameters.num_ctx) == ("poet:latest", 512)
    (pinned,) = json.loads(lm(capsys, "pin", "poet", "--json").out)
    assert pinned["pinned"]
    assert "unpinned poet:latest" in lm(capsys, "unpin", "poet").err
    assert json.loads(lm(capsys, "unpin", "poet", "--json").out) == [{"name": "poet:latest"}]
    assert lm(capsys, "unpin", "nobody").code == 1


@pytest.mark.parametrize("verb", ["load", "pin", "unpin"])
def test_a_model_has_to_be_named(daemon: FakeDaemon, capsys: Capture, verb: str) -> None:
    assert lm(capsys, verb).code == 2


# stop


def test_stop_says_that_a_pinned_model_comes_back(daemon: FakeDaemon, capsys: Capture) -> None:
    daemon.runners = [runner(pinned=True)]
    done = lm(capsys, "stop", "poet")
    assert "stopped poet:latest" in done.err
    assert "lm unpin poet:latest" in done.err
    (as_json,) = json.loads(lm(capsys, "stop", "poet", "--json").out)
    assert as_json["name"] == "poet:latest"


def test_stop_says_what_it_waits_for(daemon: FakeDaemon) -> None:
    daemon.runners = [runner()]
    daemon.unload_gate.clear()
    with terminal("stop", "poet") as stop:
        stop.expect("waiting for the runner of poet to end")
        daemon.unload_gate.set()
        stop.expect("stopped poet:latest")
        assert stop.wait() == 0


def test_stop_says_in_a_pipe_once_what_it_waits_for(
    daemon: FakeDaemon, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon.runners = [runner()]
    daemon.unload_gate.clear()
    said: list[str] = []

    def note(text: str) -> None:
        said.append(text)
        daemon.unload_gate.set()

    monkeypatch.setattr("lmd.cli.stopping.note", note)
    assert lm(capsys, "stop", "poet").err == "stopped poet:latest\n"
    assert said == ["waiting for the runner of poet to end"]


def test_stop_of_all_cuts_what_stops_already_only_by_force(daemon: FakeDaemon, capsys: Capture) -> None:
    daemon.runners = [runner(state=pb.Runner.STATE_DRAINING)]
    assert "no model is in memory" in lm(capsys, "stop", "--all").err
    assert daemon.requests("UnloadModel") == []
    lm(capsys, "stop", "--all", "--force")
    assert [request.name for request in daemon.requests("UnloadModel")] == ["poet:latest"]


# ps --plan


def decision(name: str, action: pb.Decision.Action.ValueType, reason: str) -> pb.Decision:
    made = pb.Decision(name=name, action=action, reason=reason, needed_bytes=5 * MIB, others=["poet:latest"])
    made.shares.add(device="cuda0", bytes=5 * MIB)
    made.waited.FromMilliseconds(2500)
    made.time.FromSeconds(1_700_000_000)
    return made


def test_ps_plan_tells_what_waits_and_what_was_decided(daemon: FakeDaemon, capsys: Capture) -> None:
    daemon.plan = pb.GetPlanResponse(
        waiting=[decision("b:latest", pb.Decision.ACTION_WAIT, "waits for `poet:latest`")],
        recent=[decision("b:latest", pb.Decision.ACTION_TURN, "`poet:latest` yields")],
    )
    shown = [line.split() for line in lm(capsys, "ps", "--plan").out.splitlines()]
    assert shown[0] == ["WAITING", "FOR", "NEEDS", "REASON"]
    assert shown[1] == ["b:latest", "2.5s", "5", "MiB", "waits", "for", "`poet:latest`"]
    assert shown[3] == ["DECIDED", "NAME", "ACTION", "REASON"]
    assert shown[4][-4:] == ["b:latest", "turn", "`poet:latest`", "yields"]
    as_json = json.loads(lm(capsys, "ps", "--plan", "--json").out)
    assert as_json["waiting"] == [
        {
            "name": "b:latest",
            "action": "wait",
            "shares": [{"device": "cuda0", "bytes": 5 * MIB}],
            "others": ["poet:latest"],
            "reason": "waits for `poet:latest`",
            "time": "2023-11-14T22:13:20.000Z",
            "needed_bytes": 5 * MIB,
            "waited_seconds": 2.5,
        }
    ]
    assert as_json["recent"][0]["action"] == "turn"


def test_reasons_go_on_below_each_other_on_a_narrow_terminal() -> None:
    rows = [["1 minute ago", "b:latest", "waits for memory that `poet:latest` holds, on main memory: 1.7 GiB needed"]]
    assert table_lines(["DECIDED", "NAME", "REASON"], rows, wrapped="REASON", columns=60) == [
        "DECIDED       NAME      REASON",
        "1 minute ago  b:latest  waits for memory that `poet:latest`",
        "                        holds, on main memory: 1.7 GiB",
        "                        needed",
    ]
    assert len(table_lines(["DECIDED", "NAME", "REASON"], rows, wrapped="REASON")) == 2


def test_reasons_leave_room_for_other_columns() -> None:
    rows = [["b:latest", "0 B", "a reason of many words that cannot stand beside the rest"]]
    shown = table_lines(["NAME", "MEMORY", "REASON"], rows, optional=("MEMORY",), wrapped="REASON", columns=50)
    assert shown[0] == "NAME      MEMORY  REASON"
    narrow = table_lines(["NAME", "MEMORY", "REASON"], rows, optional=("MEMORY",), wrapped="REASON", columns=38)
    assert narrow[0] == "NAME      REASON"


def test_ps_plan_is_not_watched(daemon: FakeDaemon, capsys: Capture) -> None:
    refused = lm(capsys, "ps", "--plan", "--watch")
    assert refused.code == 2
    assert "cannot be combined" in refused.err
