"""What commands print: tables, JSON shapes, and what goes to which stream."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from lmd.cli.output import shorten
from lmd.cli.shapes import enum_text
from lmd.v1 import runtime_service_pb2 as runtime_pb
from lmd.v1 import store_service_pb2 as store_pb
from lmd.v1.endpoint import home_socket
from lmd.v1.version import API_VERSION, __version__
from tests.support.cli import command, environment, lm, lm_process, terminal
from tests.support.fake_daemon import MIB, FakeDaemon, FakeFailure

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def daemon(lmd_home: Path) -> Iterator[FakeDaemon]:
    with FakeDaemon(home_socket(lmd_home)) as fake:
        yield fake


def test_ls_is_a_table_that_lines_up(daemon: FakeDaemon, capsys: Capture) -> None:
    daemon.add("llama3:latest", size_bytes=4_900_000_000, parameter_count=8_030_000_000, quantization="Q4_K_M")
    daemon.add("s:latest", age_s=7200)
    result = lm(capsys, "ls")
    assert (result.code, result.err) == (0, "")
    digest = daemon.models["s:latest"].model.digest[7:19]
    header, first, second = result.out.splitlines()
    assert header == "NAME           ID            PARAMS  QUANT       SIZE  OWN  MODIFIED"
    assert first.endswith(" 8.03B  Q4_K_M  4.56 GiB  0 B  2 minutes ago")
    assert second == f"s:latest       {digest}    260K  F32     1.13 MiB  0 B  2 hours ago"


def test_ls_json_is_a_list_of_models(daemon: FakeDaemon, capsys: Capture) -> None:
    info = daemon.add("llama3:latest")
    [entry] = json.loads(lm(capsys, "ls", "--json").out)
    assert entry["name"] == "llama3:latest"
    assert entry["digest"] == info.model.digest
    assert entry["size_bytes"] == 1_185_472
    assert entry["modified_at"].endswith("Z")
    assert entry["capabilities"] == ["completion", "chat"]


def test_ls_of_an_empty_store_is_an_empty_list(daemon: FakeDaemon, capsys: Capture) -> None:
    assert json.loads(lm(capsys, "ls", "--json").out) == []
    assert lm(capsys, "ls").out.split()[0] == "NAME"


def test_ls_hands_on_the_prefix(daemon: FakeDaemon, capsys: Capture) -> None:
    lm(capsys, "ls", "hf.co/")
    assert daemon.requests("ListModels")[0].prefix == "hf.co/"


def _runner(**fields: object) -> runtime_pb.Runner:
    runner = runtime_pb.Runner(
        name="a:latest", state=runtime_pb.Runner.STATE_READY, memory_bytes=5 * MIB, device="cpu", slots=4, pid=77
    )
    for key, value in fields.items():
        setattr(runner, key, value)
    return runner


def test_ps_shows_memory_slots_and_time_to_unload(daemon: FakeDaemon, capsys: Capture) -> None:
    ready = _runner(slots_busy=1, queued=2, context_length=4096)
    ready.expire_time.FromSeconds(int(time.time()) + 300)
    ready.stats.prompt_tokens, ready.stats.cached_tokens = 1000, 902
    daemon.runners += [ready, _runner(name="b:latest", keep_forever=True), _runner(name="c:latest", slots_busy=1)]
    header, first, second, third = lm(capsys, "ps").out.splitlines()
    assert header.split() == ["NAME", "STATE", "DEVICE", "MEMORY", "CONTEXT", "SLOTS", "QUEUED", "CACHE", "UNTIL"]
    assert first.split()[:9] == ["a:latest", "ready", "cpu", "5", "MiB", "4096", "1/4", "2", "90%"]
    assert first.endswith("5 minutes from now")
    assert second.endswith("for ever")
    assert third.endswith("in use")


def test_ps_gives_the_reason_of_a_failed_runner(daemon: FakeDaemon, capsys: Capture) -> None:
    daemon.runners.append(_runner(state=runtime_pb.Runner.STATE_FAILED, reason="out of memory"))
    header, line = lm(capsys, "ps").out.splitlines()
    assert header.endswith("REASON")
    assert line.endswith("out of memory")


def test_ps_json(daemon: FakeDaemon, capsys: Capture) -> None:
    daemon.runners.append(_runner(vram_bytes=MIB))
    daemon.runners[0].stats.cache_hits = 3
    [entry] = json.loads(lm(capsys, "ps", "--json").out)
    expected = {"name": "a:latest", "state": "ready", "memory_bytes": 5 * MIB, "device": "cpu", "pid": 77, "slots": 4}
    assert expected.items() <= entry.items()
    assert entry["expires_at"] is None
    assert entry["stats"]["cache_hits"] == 3
    assert entry["stats"].keys() == {field.name for field in runtime_pb.EngineStats.DESCRIPTOR.fields}
    assert {"context_length", "slots_busy", "queued", "vram_bytes", "digest", "keep_forever"} <= entry.keys()


def test_a_state_of_a_newer_daemon_is_its_number() -> None:
    assert enum_text(_runner(state=99), "state") == "99"


def test_status_json(daemon: FakeDaemon, capsys: Capture) -> None:
    status = json.loads(lm(capsys, "status", "--json").out)
    assert status["pid"] == daemon.status.pid
    assert status["version"] == __version__
    assert status["socket"] == str(daemon.socket)
    assert status["http"] == "http://127.0.0.1:11434"
    assert status["usage"]["blob_bytes"] == 4 * MIB
    assert status["devices"][0]["id"] == "cpu"


def test_status_shows_saved_kv_when_there_is_any(daemon: FakeDaemon, capsys: Capture) -> None:
    assert "saved KV" not in lm(capsys, "status").out
    daemon.usage.kv_bytes = 3 * MIB
    assert "saved KV  3 MiB" in lm(capsys, "status").out
    assert json.loads(lm(capsys, "status", "--json").out)["usage"]["kv_bytes"] == 3 * MIB


def test_status_says_why_the_gateway_is_off(daemon: FakeDaemon, capsys: Capture) -> None:
    daemon.status.http, daemon.status.http_detail = "", "port 11434 is taken"
    assert "off (port 11434 is taken)" in lm(capsys, "status").out


def test_show_prints_what_a_model_is(daemon: FakeDaemon, capsys: Capture) -> None:
    info = daemon.add("llama3:latest")
    info.system = "You are kind."
    info.licenses.append("MIT License\n\nPermission is hereby granted\nmore")
    info.parameters.temperature = 0.7
    info.parameters.stop.append("</s>")
    info.origin.commit = "c0ffee"
    out = lm(capsys, "show", "llama3").out
    for expected in ("llama3:latest", "260K", "F32", "512 tokens", "1.13 MiB", "completion, chat", "c0ffee",
                     "You are kind.", "temperature", "0.7", '"</s>"', "MIT License", "`--license`"):  # fmt: skip
        assert expected in out


def test_show_prints_one_part_as_it_is(daemon: FakeDaemon, capsys: Capture) -> None:
    info = daemon.add("llama3:latest")
    info.template, info.system = "{{ x }}\n", "You are\nkind."
    info.licenses.extend(["MIT", "Apache-2.0"])
    info.parameters.top_k = 5
    parts = {
        "--modelfile": "FROM llama3:latest\n",
        "--template": "{{ x }}\n",
        "--system": "You are\nkind.\n",
        "--license": "MIT\n\nApache-2.0\n",
        "--parameters": "top_k 5\n",
    }
    for option, text in parts.items():
        assert lm(capsys, "show", "llama3", option).out == text


def test_show_takes_one_part_at_a_time(daemon: FakeDaemon, capsys: Capture) -> None:
    assert lm(capsys, "show", "llama3", "--system", "--json").code == 2


def test_show_json_holds_everything(daemon: FakeDaemon, capsys: Capture) -> None:
    info = daemon.add("llama3:latest")
    info.metadata["general.name"] = "Llama"
    shown = json.loads(lm(capsys, "show", "--json", "llama3").out)
    assert shown["metadata"] == {"general.name": "Llama"}
    assert shown["files"][0]["role"] == "weights"
    origin = dict.fromkeys(("commit", "quantize", "quantized_from", "imatrix"), "")
    assert shown["origin"] == {"ref": "llama3:latest", **origin, "pulled_at": None}


def test_version_names_both_sides_and_warns_when_they_differ(daemon: FakeDaemon, capsys: Capture) -> None:
    daemon.status.version = "9.9.9"
    result = lm(capsys, "version")
    assert result.out.splitlines()[0] == f"lm   {__version__}"
    assert "9.9.9" in result.out
    assert result.err.startswith("warning: ")
    assert json.loads(lm(capsys, "version", "--json").out)["daemon"]["version"] == "9.9.9"


def test_version_without_a_daemon_is_no_error(capsys: Capture) -> None:
    result = lm(capsys, "version", "--json")
    assert (result.code, json.loads(result.out)) == (
        0,
        {"version": __version__, "api_version": API_VERSION, "daemon": None},
    )
    assert "not running" in lm(capsys, "version").out


def test_gc_lists_what_goes_and_sums_up_on_stderr(daemon: FakeDaemon, capsys: Capture) -> None:
    item = store_pb.GarbageItem(kind=store_pb.GarbageItem.KIND_INGEST, digest="sha256:aa", size_bytes=3 * MIB)
    item.modified_time.FromSeconds(int(time.time()) - 86400)
    daemon.garbage.append(item)
    result = lm(capsys, "gc", "--dry-run", "--grace", "10m")
    assert result.out.splitlines()[1].split() == ["ingest", "sha256:aa", "3", "MiB", "1", "day", "ago"]
    assert "would free 3 MiB in 1 thing" in result.err
    request = daemon.requests("CollectGarbage")[0]
    assert (request.dry_run, request.grace_period.seconds) == (True, 600)
    as_json = json.loads(lm(capsys, "gc", "--json").out)
    assert (as_json["freed_bytes"], as_json["items"][0]["kind"]) == (3 * MIB, "ingest")
    assert not daemon.requests("CollectGarbage")[1].HasField("grace_period")


def test_gc_of_a_clean_store(daemon: FakeDaemon, capsys: Capture) -> None:
    result = lm(capsys, "gc")
    assert (result.code, result.out) == (0, "")
    assert result.err == "nothing to free; spared 1 younger than the grace period\n"


def test_rm_says_what_it_frees(daemon: FakeDaemon, capsys: Capture) -> None:
    daemon.add("a:latest")
    daemon.pending_bytes = 2 * MIB
    result = lm(capsys, "rm", "a")
    assert (result.code, result.out) == (0, "")
    assert result.err == "removed a  1 MiB freed, 2 MiB to come when it stops\n"


def test_rm_goes_on_after_a_name_that_fails(daemon: FakeDaemon, capsys: Capture) -> None:
    daemon.add("a:latest")
    result = lm(capsys, "rm", "x", "a", "y")
    assert result.code == 1
    assert "removed a" in result.err
    assert "model `x` not found" in result.err
    assert "model `y` not found" in result.err
    assert not daemon.models
    assert lm(capsys, "rm", "--missing-ok", "x").code == 0


def test_cp_names_the_copy(daemon: FakeDaemon, capsys: Capture) -> None:
    daemon.add("a:latest")
    assert lm(capsys, "cp", "a", "b").err == "copied a to b:latest\n"


def test_stop_says_when_answers_run(daemon: FakeDaemon, capsys: Capture) -> None:
    daemon.runners.append(_runner())
    assert lm(capsys, "stop", "a").err == "stopped a:latest\n"
    daemon.running_answers = 2
    assert "when 2 answers are done; `--force` cuts them" in lm(capsys, "stop", "a").err
    daemon.running_answers = 1
    assert "when 1 answer is done; `--force` cuts it" in lm(capsys, "stop", "a").err
    daemon.running_answers = 2
    assert "2 answers cut" in lm(capsys, "stop", "--force", "--all").err
    assert daemon.requests("UnloadModel")[-1].force
    assert daemon.requests("UnloadModel")[-1].name == "a:latest"


def test_stop_all_without_anything_in_memory(daemon: FakeDaemon, capsys: Capture) -> None:
    result = lm(capsys, "stop", "--all")
    assert (result.code, result.err) == (0, "no model is in memory\n")
    assert lm(capsys, "stop").code == 2


def test_json_errors_go_to_stderr(daemon: FakeDaemon, capsys: Capture) -> None:
    result = lm(capsys, "show", "--json", "nope")
    assert (result.code, result.out) == (1, "")
    error = json.loads(result.err)["error"]
    assert error == {
        "reason": "MODEL_NOT_FOUND",
        "message": "model `nope` not found",
        "hint": "see `lm ls`",
        "metadata": {"name": "nope"},
    }


def test_names_that_steer_a_terminal_are_made_harmless(daemon: FakeDaemon, capsys: Capture) -> None:
    daemon.failures["GetModel"] = FakeFailure(
        grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND", "no \x1b[2Jmodel \u202egnp", log="\x1b]0;owned\x07"
    )
    result = lm(capsys, "show", "x")
    assert "\x1b" not in result.err
    assert "\u202e" not in result.err


def test_a_reader_that_leaves_ends_the_command_quietly(daemon: FakeDaemon) -> None:
    for number in range(3000):
        daemon.add(f"model-with-a-long-name-{number}:latest")
    listing = subprocess.Popen(
        command("ls", "--json"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()
    )
    assert listing.stdout is not None
    assert listing.stderr is not None
    listing.stdout.read(1)
    listing.stdout.close()
    assert listing.stderr.read() == b""
    listing.stderr.close()
    assert listing.wait(30) == 1


def test_ls_into_a_pipe_loads_no_rich(daemon: FakeDaemon) -> None:
    daemon.add("a:latest")
    script = "import sys; from lmd.cli.main import run; run(['ls']); print('rich' in sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment(), check=True)
    assert done.stderr == "False\n"


@pytest.mark.parametrize(
    ("columns", "header"), [(100, "NAME ID PARAMS QUANT SIZE OWN MODIFIED"), (64, "NAME PARAMS QUANT SIZE MODIFIED"),
                            (30, "NAME SIZE MODIFIED")]
)  # fmt: skip
def test_a_narrow_terminal_gets_fewer_columns_and_whole_names(daemon: FakeDaemon, columns: int, header: str) -> None:
    daemon.add("hf.co/org/repo:q4_k_m")
    with terminal("ls", columns=columns) as screen:
        screen.expect(r"\s+".join(header.split()) + r"\s")
        screen.expect("hf.co/org/repo:q4_k_m")
        assert screen.wait() == 0


def test_a_long_name_is_shortened_in_its_middle() -> None:
    assert shorten("hf.co/organisation/repository:latest", 20) == "hf.co/organi…:latest"
    assert shorten("short", 20) == "short"


def test_no_colour_without_a_terminal(daemon: FakeDaemon) -> None:
    daemon.add("a:latest")
    assert "\x1b" not in lm_process("ls").out
