"""`lm lease`: the command it runs, its exit status and signals, and what becomes of both when the lease ends."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from lmd.v1 import runtime_service_pb2 as pb
from lmd.v1.endpoint import home_socket
from tests.support.cli import command, environment, lm, lm_process, terminal
from tests.support.fake_daemon import FakeDaemon, FakeFailure

Capture = pytest.CaptureFixture[str]

#: Says that it is there, and which signals came.
LISTENS = (
    "import os, signal, sys\n"
    "numbers = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1}\n"
    "signal.pthread_sigmask(signal.SIG_BLOCK, numbers)\n"
    "print('ready', flush=True)\n"
    "for _ in range(int(sys.argv[1])): print(signal.Signals(signal.sigwait(numbers)).name, flush=True)\n"
)


@pytest.fixture
def daemon(lmd_home: Path) -> Iterator[FakeDaemon]:
    with FakeDaemon(home_socket(lmd_home)) as fake:
        yield fake


@contextlib.contextmanager
def started(*args: str) -> Iterator[subprocess.Popen[str]]:
    """Run `lm` in a process group of its own, of which nothing is left afterwards."""
    process = subprocess.Popen(
        command(*args),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=30)


@contextlib.contextmanager
def listening(signals: int) -> Iterator[subprocess.Popen[str]]:
    """Run a leased command that has said that it is there, and ends after so many signals."""
    with started("lease", "1GiB", *python(LISTENS, str(signals))) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process


def python(code: str, *args: str) -> tuple[str, ...]:
    return ("--", sys.executable, "-c", code, *args)


def test_the_command_runs_with_what_was_asked_for(daemon: FakeDaemon) -> None:
    result = lm_process("lease", "--device", "cuda1", "8GiB", *python("print('out')"))
    assert (result.code, result.out, result.err) == (0, "out\n", "")
    [request] = daemon.requests("LeaseMemory")
    assert (request.bytes, request.device) == (8 << 30, "cuda1")
    assert request.purpose.endswith("-c 'print('\"'\"'out'\"'\"')'")
    assert request.pid > 0
    assert daemon.leased.hung_up.wait(10)


@pytest.mark.parametrize(("code", "status"), [("sys.exit(0)", 0), ("sys.exit(7)", 7), ("os.kill(os.getpid(), 9)", 137)])
def test_the_exit_status_is_the_commands(daemon: FakeDaemon, code: str, status: int) -> None:
    assert lm_process("lease", "1GiB", *python(f"import os, sys; {code}")).code == status


def test_options_of_the_command_are_its_own(daemon: FakeDaemon) -> None:
    """Also without the two dashes: what follows the command's name is not ours."""
    result = lm_process("lease", "1GiB", "echo", "--device", "-h", "--json")
    assert (result.code, result.out) == (0, "--device -h --json\n")
    assert daemon.requests("LeaseMemory")[0].device == ""


@pytest.mark.parametrize(
    ("args", "device", "out"),
    [
        (("--device", "cuda1", "1GiB", "echo", "a"), "cuda1", "a\n"),
        (("--device", "cuda1", "1GiB", "--", "echo", "a"), "cuda1", "a\n"),
        (("1GiB", "--device", "cuda1", "--", "echo", "a"), "cuda1", "a\n"),
        (("1GiB", "--", "echo", "--device", "x", "--", "y"), "", "--device x -- y\n"),
        (("1GiB", "echo", "--device", "x", "--", "y"), "", "--device x -- y\n"),
        (("1GiB", "echo", "-x", "--", "y"), "", "-x -- y\n"),
    ],
)
def test_whose_options_they_are(daemon: FakeDaemon, args: tuple[str, ...], device: str, out: str) -> None:
    result = lm_process("lease", *args)
    assert (result.code, result.out) == (0, out)
    assert daemon.requests("LeaseMemory")[0].device == device


def test_the_command_starts_only_when_the_memory_is_there(daemon: FakeDaemon, tmp_path: Path) -> None:
    granted, waiting = threading.Event(), threading.Event()

    def lease(request: pb.LeaseMemoryRequest, context: grpc.ServicerContext) -> Iterator[pb.LeaseMemoryResponse]:
        yield pb.LeaseMemoryResponse(waiting="waits for 1 GiB of cpu, which `llama` holds")
        waiting.set()
        assert granted.wait(30)
        assert not (tmp_path / "ran").exists()
        yield pb.LeaseMemoryResponse(granted=pb.DeviceShare(device="cpu", bytes=request.bytes))
        daemon.leased.wait(context)

    daemon.lease = lease
    with started("lease", "1GiB", "touch", str(tmp_path / "ran")) as process:
        assert waiting.wait(30)
        granted.set()
        assert process.wait(30) == 0
    assert (tmp_path / "ran").exists()


def test_what_it_waits_for_shows_on_a_terminal(daemon: FakeDaemon) -> None:
    def lease(_request: pb.LeaseMemoryRequest, context: grpc.ServicerContext) -> Iterator[pb.LeaseMemoryResponse]:
        yield pb.LeaseMemoryResponse(waiting="waits for 1 GiB of cpu, which `llama` holds")
        daemon.leased.wait(context)

    daemon.lease = lease
    with terminal("lease", "1GiB", "true") as screen:
        screen.expect("waits for 1 GiB of cpu, which `llama` holds")
        screen.type("\x03")
        assert screen.wait() == 130
    assert daemon.leased.hung_up.wait(10)


def test_a_wait_has_an_end(daemon: FakeDaemon, tmp_path: Path) -> None:
    def lease(_request: pb.LeaseMemoryRequest, context: grpc.ServicerContext) -> Iterator[pb.LeaseMemoryResponse]:
        yield pb.LeaseMemoryResponse(waiting="waits for 1 GiB of cpu, which `llama` holds")
        daemon.leased.wait(context)

    daemon.lease = lease
    result = lm_process("lease", "--wait", "300ms", "1GiB", "touch", str(tmp_path / "ran"))
    assert result.code == 1
    assert "which `llama` holds" in result.err
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_signals_are_passed_on(daemon: FakeDaemon, number: signal.Signals) -> None:
    with listening(1) as process:
        process.send_signal(number)
        out, err = process.communicate(timeout=30)
        assert (out, err, process.returncode) == (f"{number.name}\n", "", 0)


def test_ctrl_c_reaches_the_command_once(daemon: FakeDaemon) -> None:
    """The terminal tells both; one that is told twice would take it as "at once"."""
    with terminal("lease", "1GiB", *python(LISTENS, "2")) as screen:
        screen.expect("ready")
        screen.type("\x03")
        screen.expect("SIGINT")
        os.kill(screen.process.pid, signal.SIGTERM)
        assert "SIGINT" not in screen.expect("SIGTERM")
        assert screen.wait() == 0


def test_the_command_ends_as_if_it_ran_alone(daemon: FakeDaemon) -> None:
    """Ignored signals and open files of ours are not its."""
    shell = "grep -E 'Sig(Ign|Blk)' /proc/self/status; ls /proc/self/fd | wc -l"
    leased = lm_process("lease", "1GiB", "sh", "-c", shell)
    alone = subprocess.run(["sh", "-c", shell], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True)
    assert leased.out == alone.stdout


def test_a_lost_lease_is_told_and_the_command_goes_on(daemon: FakeDaemon) -> None:
    def lease(request: pb.LeaseMemoryRequest, context: grpc.ServicerContext) -> Iterator[pb.LeaseMemoryResponse]:
        yield pb.LeaseMemoryResponse(granted=pb.DeviceShare(device="cpu", bytes=request.bytes))
        daemon.leased.wait(context)
        raise FakeFailure(grpc.StatusCode.UNAVAILABLE, "DRAINING", "the daemon is shutting down")

    daemon.lease = lease
    with listening(1) as process:
        assert process.stderr is not None
        daemon.leased.opened.set()
        assert "the lease is lost: the daemon is shutting down; the command goes on" in process.stderr.readline()
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=30)
        assert (out, process.returncode) == ("SIGTERM\n", 0)


def test_a_lease_ends_when_lm_is_killed(daemon: FakeDaemon) -> None:
    with listening(1) as process:
        process.kill()
        assert daemon.leased.hung_up.wait(10)


def test_memory_that_cannot_be_had_is_told_with_numbers(daemon: FakeDaemon, tmp_path: Path) -> None:
    message = "cuda0 cannot have 80 GiB free: 24 GiB can be freed"
    daemon.failures["LeaseMemory"] = FakeFailure(grpc.StatusCode.RESOURCE_EXHAUSTED, "DEVICE_MEMORY", message)
    result = lm_process("lease", "80GiB", "touch", str(tmp_path / "ran"))
    assert (result.code, result.out) == (1, "")
    assert message in result.err
    assert not (tmp_path / "ran").exists()


def test_a_command_that_is_not_there(daemon: FakeDaemon, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no program")
    assert lm_process("lease", "1GiB", "no-such-program-anywhere").code == 127
    result = lm_process("lease", "1GiB", str(tmp_path / "text"))
    assert result.code == 126
    assert result.err.startswith(f"error: cannot run `{tmp_path / 'text'}`: ")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("8GiB",), "which command?"),
        (("8GiB", "--"), "which command?"),
        (("8GiB", "--device", "cpu", "true"), "`--device` is no command"),
        (("8", "true"), "`8` is no size"),
        (("lots", "true"), "`lots` is no size"),
        (("0B", "true"), "a lease needs a SIZE above 0"),
        (("--wait", "soon", "8GiB", "true"), "no duration"),
    ],
)
def test_bad_usage(capsys: Capture, args: tuple[str, ...], message: str) -> None:
    result = lm(capsys, "lease", *args)
    assert result.code == 2
    assert message in result.err


FIT = pb.FitModelResponse(
    total_bytes=5 << 30,
    weights_bytes=4 << 30,
    kv_bytes=900 << 20,
    compute_bytes=124 << 20,
    fits=True,
    shares=[pb.DeviceShare(device="cuda0", bytes=5 << 30)],
    gpu_layers=33,
    layers=33,
    evicted=["old:latest"],
    context_length=8192,
    largest_context_length=32768,
    trained_context_length=131072,
    slots=4,
    tokens_per_second=104.2,
    active_bytes=4 << 30,
    calibrated=True,
    download_bytes=4 << 30,
    reason="loads on cuda0 once `old` has left",
)


def test_fit_tells_people(daemon: FakeDaemon, capsys: Capture) -> None:
    daemon.fits["llama"] = FIT
    result = lm(capsys, "fit", "llama", "-o", "num_ctx=8192")
    assert result.code == 0
    assert result.out == (
        "llama fits: loads on cuda0 once `old` has left\n"
        "\n"
        "Memory\n"
        "  total           5 GiB, computed from its header\n"
        "  weights         4 GiB\n"
        "  context         900 MiB, for 4 requests at once\n"
        "  compute         124 MiB\n"
        "\n"
        "Place\n"
        "  devices         5 GiB on cuda0\n"
        "  layers          33 of 33 on accelerators\n"
        "  leave for it    old:latest\n"
        "\n"
        "Context\n"
        "  asked for       8192 tokens for each request\n"
        "  largest         32768 tokens for each request\n"
        "  trained         131072 tokens\n"
        "\n"
        "Speed\n"
        "  expected        104 tokens/s for one answer, by what was measured here\n"
        "  each token      reads 4 GiB of weights\n"
        "\n"
        "Download\n"
        "  still to fetch  4 GiB\n"
    )
    [request] = daemon.requests("FitModel")
    assert (request.name, request.parameters.num_ctx) == ("llama", 8192)


def test_fit_leaves_out_the_place_of_what_does_not_fit(daemon: FakeDaemon, capsys: Capture) -> None:
    fit = pb.FitModelResponse()
    fit.CopyFrom(FIT)
    fit.fits, fit.reason = False, "does not fit on cuda0: 5.0 GiB needed, 2.0 GiB free"
    daemon.fits["llama"] = fit
    result = lm(capsys, "fit", "llama")
    assert result.code == 1
    assert "Place" not in result.out
    assert "on accelerators" not in result.out
    assert "Context" in result.out
    assert json.loads(lm(capsys, "fit", "--json", "llama").out)["devices"]


def test_fit_tells_programs_and_the_exit_status(daemon: FakeDaemon, capsys: Capture) -> None:
    daemon.fits["llama"] = pb.FitModelResponse(
        total_bytes=80 << 30, weights_bytes=70 << 30, kv_bytes=9 << 30, compute_bytes=1 << 30, reason="too large"
    )
    result = lm(capsys, "fit", "--json", "llama")
    assert result.code == 1
    shape = json.loads(result.out)
    assert (shape["fits"], shape["total_bytes"], shape["reason"]) == (False, 80 << 30, "too large")
    assert shape["weights_bytes"] + shape["kv_bytes"] + shape["compute_bytes"] == shape["total_bytes"]
    assert shape["tokens_per_second"] is None


def test_fit_of_nothing(daemon: FakeDaemon, capsys: Capture) -> None:
    result = lm(capsys, "fit", "--json", "nothing")
    assert result.code == 1
    assert json.loads(result.err)["error"]["reason"] == "MODEL_NOT_FOUND"
