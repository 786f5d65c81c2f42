"""The life of a daemon process, from its first line to its last, with an application that serves no models."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status

from lmd.v1 import system_service_pb2 as pb
from lmd.v1.system_service_pb2_grpc import SystemServiceStub
from lmd.v1.version import __version__

pytestmark = pytest.mark.e2e

DEADLINE_S = 30


class Daemon:
    """A running process."""

    def __init__(self, home: Path, process: asyncio.subprocess.Process) -> None:
        self.home = home
        self.process = process
        self.stderr = ""

    def channel(self) -> grpc.aio.Channel:
        return grpc.aio.insecure_channel(
            f"unix:{self.home}/run/lmd.sock", options=[("grpc.use_local_subchannel_pool", 1)]
        )

    def events(self) -> list[str]:
        return (self.home / "events").read_text().split()

    def logged(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.stderr.splitlines() if line.startswith("{")]

    async def until(self, text: str) -> None:
        """Read the log until *text* appears."""
        assert self.process.stderr is not None
        async with asyncio.timeout(DEADLINE_S):
            while text not in self.stderr:
                line = await self.process.stderr.readline()
                assert line, f"ended without {text!r}:\n{self.stderr}"
                self.stderr += line.decode()

    async def end(self) -> int:
        async with asyncio.timeout(DEADLINE_S):
            assert self.process.stderr is not None
            self.stderr += (await self.process.stderr.read()).decode()
            return await self.process.wait()


@asynccontextmanager
async def daemon(home: Path, *, ready: bool = True, **env: str) -> AsyncIterator[Daemon]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tests.support.fake_application",
        stderr=subprocess.PIPE,
        env=os.environ | {"LMD_HOME": str(home)} | env,
        cwd=Path(__file__).parents[2],
    )
    running = Daemon(home, process)
    try:
        if ready:
            await running.until('"ready"')
        yield running
    finally:
        if process.returncode is None:
            process.kill()
            await running.end()


def unary(channel: grpc.aio.Channel, method: str, request: bytes = b"", **kwargs: Any) -> Any:
    call: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(f"/probe/{method}")
    return call(request, **kwargs)


def reason(error: grpc.aio.AioRpcError) -> str:
    from google.rpc import error_details_pb2

    info = error_details_pb2.ErrorInfo()
    status = rpc_status.from_call(error)
    assert status is not None
    assert status.details[0].Unpack(info)
    return str(info.reason)


async def test_it_tells_about_itself(lmd_home: Path) -> None:
    (lmd_home / "config.toml").write_text("[dropin]\nenabled = false\n")
    async with daemon(lmd_home) as running, running.channel() as channel:
        status = await SystemServiceStub(channel).GetStatus(pb.GetStatusRequest())
        health = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        child = psutil.Process(running.process.pid)
        assert status.pid == running.process.pid
        assert status.rss_bytes == pytest.approx(child.memory_info().rss, rel=0.2)
    assert (status.version, status.uid) == (__version__, os.getuid())
    assert status.socket == f"{lmd_home}/run/lmd.sock"
    assert status.store == f"{lmd_home}/store"
    assert status.config_file == f"{lmd_home}/config.toml"
    assert status.dropin == ""
    assert re.fullmatch(r"http://127\.0\.0\.1:[1-9][0-9]+", status.http)
    assert status.http_detail == ""
    assert status.engine_version
    assert status.devices[0].id == "cpu"
    assert not status.draining
    assert status.start_time.seconds > 1_700_000_000
    assert health.status == health_pb2.HealthCheckResponse.SERVING


async def test_its_services_can_be_listed(lmd_home: Path) -> None:
    async with daemon(lmd_home) as running, running.channel() as channel:
        stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
        call = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
        answer = await call.read()
        names = {service.name for service in answer.list_services_response.service}
    assert {"lmd.v1.SystemService", "grpc.health.v1.Health"} <= names


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
async def test_an_idle_daemon_ends_at_once_and_leaves_nothing(lmd_home: Path, number: signal.Signals) -> None:
    async with daemon(lmd_home) as running:
        running.process.send_signal(number)
        assert await running.end() == 0
    assert running.events() == ["started", "drained", "stopped"]
    assert [entry["event"] for entry in running.logged()][-1] == "stopped"
    assert [path.name for path in (lmd_home / "run").rglob("*") if path.is_socket()] == []


async def test_running_answers_finish_and_new_work_is_refused_while_it_drains(lmd_home: Path) -> None:
    async with daemon(lmd_home) as running, running.channel() as channel, running.channel() as late:
        call: grpc.aio.StreamUnaryMultiCallable[bytes, bytes] = channel.stream_unary("/probe/Sink")
        upload = call()
        await upload.write(b"one")
        assert await unary(channel, "Echo", b"x") == b"x"  # so the upload has begun
        running.process.terminate()
        await running.until('"draining"')
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await unary(late, "Echo")
        assert reason(refused.value) == "DRAINING"
        status = await SystemServiceStub(late).GetStatus(pb.GetStatusRequest())
        assert status.draining
        await upload.write(b"two")
        await upload.done_writing()
        assert await upload == b"6"
        assert await running.end() == 0


async def test_an_answer_that_outlasts_the_drain_is_cut_with_a_reason(lmd_home: Path) -> None:
    async with daemon(lmd_home, LMD_RUNTIME_DRAIN_TIMEOUT="200ms") as running, running.channel() as channel:
        answer = unary(channel, "Hang")
        assert await unary(channel, "Echo", b"x") == b"x"
        running.process.terminate()
        with pytest.raises(grpc.aio.AioRpcError) as cut:
            await answer
        assert reason(cut.value) == "DRAINING"
        assert await running.end() == 0


async def test_a_second_signal_does_not_wait(lmd_home: Path) -> None:
    async with daemon(lmd_home, LMD_RUNTIME_DRAIN_TIMEOUT="1h") as running, running.channel() as channel:
        answer = unary(channel, "Hang")
        assert await unary(channel, "Echo", b"x") == b"x"
        running.process.terminate()
        await running.until('"draining"')
        running.process.terminate()
        with pytest.raises(grpc.aio.AioRpcError) as cut:
            await answer
        assert reason(cut.value) == "DRAINING"
        assert await running.end() == 0
    assert running.events() == ["started", "drained", "stopped"]


async def test_shutdown_over_the_api_drains(lmd_home: Path) -> None:
    async with daemon(lmd_home) as running:
        async with running.channel() as channel:
            await SystemServiceStub(channel).Shutdown(pb.ShutdownRequest())
        assert await running.end() == 0


async def test_a_signal_ends_a_start_that_hangs(lmd_home: Path) -> None:
    async with daemon(lmd_home, ready=False, TEST_START="hangs") as running:
        async with asyncio.timeout(DEADLINE_S):
            while not (lmd_home / "events").exists():  # noqa: ASYNC110 - another process writes it
                await asyncio.sleep(0.01)
        running.process.terminate()
        assert await running.end() == 0
    assert running.events() == ["starting", "stopped"]


async def test_a_second_daemon_on_one_store_says_who_has_it(lmd_home: Path) -> None:
    async with daemon(lmd_home) as first:
        async with daemon(lmd_home, ready=False) as second:
            assert await second.end() == 1
        pid = first.process.pid
        assert second.stderr == f"error: the store is in use by pid {pid}\n\nhint: kill {pid}\n"
        async with first.channel() as channel:
            assert await unary(channel, "Echo", b"still here") == b"still here"


async def test_a_second_daemon_on_one_socket_says_who_has_it(lmd_home: Path, tmp_path: Path) -> None:
    async with daemon(lmd_home) as first:
        path = f"{lmd_home}/run/lmd.sock"
        async with daemon(tmp_path, ready=False, LMD_SERVER_SOCKET=path) as second:
            assert await second.end() == 1
        assert f"error: a daemon with pid {first.process.pid} already serves {path}\n\nhint: " in second.stderr
        assert second.events() == ["started", "stopped"]


async def test_the_place_of_a_killed_daemon_is_taken_over(lmd_home: Path) -> None:
    async with daemon(lmd_home) as first:
        first.process.kill()
        await first.end()
    assert (lmd_home / "run" / "lmd.sock").is_socket()
    async with daemon(lmd_home) as second, second.channel() as channel:
        assert await unary(channel, "Echo", b"again") == b"again"


async def test_a_wrong_configuration_ends_it_before_it_touches_anything(lmd_home: Path) -> None:
    (lmd_home / "config.toml").write_text("[runtime]\nslots = 0\n")
    async with daemon(lmd_home, ready=False) as running:
        assert await running.end() == 2
    assert running.stderr.startswith(f"error: {lmd_home}/config.toml, line 2: `runtime.slots` = 0: ")
    assert "\n\nhint: " in running.stderr
    assert os.listdir(lmd_home) == ["config.toml"]


async def test_a_defect_at_start_is_logged_and_ends_it(lmd_home: Path) -> None:
    async with daemon(lmd_home, ready=False, TEST_START="fails") as running:
        assert await running.end() == 1
    (crash,) = [entry for entry in running.logged() if entry["event"] == "daemon_crashed"]
    assert "ZeroDivisionError: a defect" in crash["exception"]
    assert running.events() == ["stopped"]


async def test_a_full_disk_at_start_is_no_reason_to_ask_the_daemon_for_room(lmd_home: Path) -> None:
    """The hint of every full disk was `lm rm` and `lm gc`, which need the very daemon that does not start."""
    async with daemon(lmd_home, ready=False, TEST_START="finds the disk full") as running:
        assert await running.end() == 1
    assert "hint: make room there" in running.stderr
    assert "lm rm" not in running.stderr


async def test_a_home_that_cannot_be_made_is_said_with_a_next_step() -> None:
    """It was once said as Python says it, with the number of the error and no hint."""
    async with daemon(Path("/proc/nowhere"), ready=False) as running:
        assert await running.end() == 1
    assert "error: cannot start in /proc/nowhere" in running.stderr
    assert "hint: set `LMD_HOME`" in running.stderr


async def test_systemd_is_told(lmd_home: Path, tmp_path: Path) -> None:
    address = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(address)
        manager.settimeout(DEADLINE_S)
        async with daemon(lmd_home, NOTIFY_SOCKET=address, WATCHDOG_USEC="200000") as running:
            told = ""
            while "WATCHDOG=1" not in told:
                told += (await asyncio.to_thread(manager.recv, 4096)).decode() + "\n"
            assert re.search(r"^READY=1$", told, re.MULTILINE)
            assert f"STATUS=serving {lmd_home}/run/lmd.sock" in told
            running.process.terminate()
            while "STOPPING=1" not in told:
                told += (await asyncio.to_thread(manager.recv, 4096)).decode() + "\n"
            assert re.search(r"^EXTEND_TIMEOUT_USEC=\d+$", told, re.MULTILINE)
            assert await running.end() == 0


@pytest.mark.skipif(shutil.which("systemd-socket-activate") is None, reason="systemd is not installed")
async def test_a_client_starts_it_through_systemds_socket(lmd_home: Path) -> None:
    path = lmd_home / "activated.sock"
    manager = await asyncio.create_subprocess_exec(
        "systemd-socket-activate",
        f"--listen={path}",
        *[f"--setenv={name}" for name in ("LMD_HOME", "LMD_HTTP_LISTEN", "PYTHONPATH", "PATH")],
        sys.executable,
        "-m",
        "tests.support.fake_application",
        stderr=subprocess.PIPE,
        env=os.environ | {"LMD_HOME": str(lmd_home)},
        cwd=Path(__file__).parents[2],
    )
    running = Daemon(lmd_home, manager)
    try:
        await running.until("Listening on")
        assert not (lmd_home / "events").exists()
        async with grpc.aio.insecure_channel(f"unix:{path}") as channel, asyncio.timeout(DEADLINE_S):
            # The first connection starts it, and waits in the backlog until it serves.
            status = await SystemServiceStub(channel).GetStatus(pb.GetStatusRequest(), wait_for_ready=True)
            assert (status.socket, status.pid) == (str(path), manager.pid)
            assert not (lmd_home / "run" / "lmd.sock").exists()
        manager.terminate()
        assert await running.end() == 0
        assert path.is_socket()
    finally:
        if manager.returncode is None:
            manager.kill()
            await running.end()


async def test_secrets_leave_the_environment(lmd_home: Path) -> None:
    """Runners inherit nothing of it, whoever starts them and how."""
    code = (
        "import os; from lmd.daemon.main import launch;"
        "launch(os.environ, lambda: None, check_only=True);"
        "print(sorted({'HF_TOKEN', 'NOTIFY_SOCKET', 'LISTEN_FDS'} & set(os.environ)))"
    )
    env = os.environ | {"HF_TOKEN": "hf_secret", "NOTIFY_SOCKET": "/x", "LISTEN_FDS": "1"}
    child = await asyncio.create_subprocess_exec(sys.executable, "-c", code, stdout=subprocess.PIPE, env=env)
    out, _ = await child.communicate()
    assert out.decode().splitlines()[-1] == "[]"


async def test_an_idle_daemon_is_small_and_never_loads_the_engine(lmd_home: Path) -> None:
    async with daemon(lmd_home) as running, running.channel() as channel:
        await SystemServiceStub(channel).GetStatus(pb.GetStatusRequest())
        process = psutil.Process(running.process.pid)
        mapped = {Path(region.path).name for region in process.memory_maps()}
        assert not [name for name in mapped if re.search("llama|ggml|numpy|multiarray", name)]
        assert process.memory_info().rss < 84 << 20


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["--version"], 0, f"lmd {__version__}"),
        (["--check-config"], 0, "the configuration is good"),
        (["--check-config", "--config", "/nowhere.toml"], 2, "error: /nowhere.toml: there is no such file"),
        (["--help"], 0, "--check-config"),
        (["--nonsense"], 2, "No such option"),
    ],
)
def test_the_command_line(arguments: list[str], status: int, says: str) -> None:
    run = subprocess.run([sys.executable, "-m", "lmd.daemon.main", *arguments], capture_output=True, text=True)
    assert run.returncode == status
    assert says in run.stdout + run.stderr
