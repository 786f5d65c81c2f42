"""What the front promises to clients, over real sockets, with real processes."""

from __future__ import annotations

import asyncio
import grp
import hashlib
import json
import os
import pwd
import socket
import stat
import subprocess
import sys
import textwrap
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from lmd.daemon.front import BUFFER_BYTES
from lmd.daemon.listener import SocketUnusable, check_path_length, open_listener, prepare_directory
from tests.support.shell_daemon import Shell, shell


@pytest.fixture
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a short path: socket addresses hold 107 bytes."""
    directory = tmp_path_factory.mktemp("f")
    directory.chmod(0o700)
    return directory


def unary(channel: grpc.aio.Channel, method: str, request: bytes = b"", **kwargs: Any) -> Any:
    call: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(f"/probe/{method}")
    return call(request, **kwargs)


def stream(channel: grpc.aio.Channel, count: int, size: int) -> grpc.aio.UnaryStreamCall[bytes, bytes]:
    call: grpc.aio.UnaryStreamMultiCallable[bytes, bytes] = channel.unary_stream("/probe/Stream")
    return call(json.dumps([count, size]).encode())


async def connections(server: Shell, count: int) -> None:
    """Wait until exactly *count* connections are open."""
    async with asyncio.timeout(20):
        while server.front.connections != count:  # noqa: ASYNC110 - the front has no event for each number
            await asyncio.sleep(0.01)


def raw_connection(path: Path) -> socket.socket:
    """Connect; raises BlockingIOError when the backlog is full."""
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(20)
    try:
        sock.connect(str(path))
    except BaseException:
        sock.close()
        raise
    return sock


async def test_a_handler_knows_its_caller(run_dir: Path) -> None:
    async with shell(run_dir) as server, server.channel() as channel:
        answer = json.loads(await unary(channel, "WhoAmI"))
    assert answer == [os.getuid(), os.getpid(), pwd.getpwuid(os.getuid()).pw_name]


CLIENT_OF_ANOTHER_USER = textwrap.dedent(
    """
    import os, sys
    import grpc

    def who_am_i():
        with grpc.insecure_channel("unix:" + sys.argv[1], options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
            return channel.unary_unary("/probe/WhoAmI")(b"", timeout=20).decode()

    who_am_i()  # imports what it needs while it still may
    os.setgroups([])
    os.setgid(65534)
    os.setuid(int(sys.argv[2]))
    print(os.getpid(), who_am_i())
    """
)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody else")
async def test_another_user_is_told_apart(run_dir: Path) -> None:
    for directory in [run_dir, *run_dir.parents][:-2]:
        directory.chmod(directory.stat().st_mode | 0o711)
    async with shell(run_dir) as server, server.channel() as mine:
        server.path.chmod(0o666)
        child = await asyncio.create_subprocess_exec(
            sys.executable, "-c", CLIENT_OF_ANOTHER_USER, str(server.path), "4242", stdout=subprocess.PIPE
        )
        out, _ = await child.communicate()
        pid, answer = out.decode().split(" ", 1)
        assert json.loads(answer) == [4242, int(pid), "4242"]
        assert json.loads(await unary(mine, "WhoAmI"))[0] == 0


async def test_who_goes_around_the_front_is_refused(run_dir: Path) -> None:
    async with shell(run_dir) as server, grpc.aio.insecure_channel(f"unix:{server.rpc.socket}") as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await unary(channel, "WhoAmI")
    assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED


async def test_a_large_stream_arrives_intact(run_dir: Path) -> None:
    count, size = 400, 250_000
    expected = hashlib.sha256()
    for number in range(count):
        expected.update(number.to_bytes(4, "big") * (size // 4))
    received = hashlib.sha256()
    async with shell(run_dir) as server, server.channel() as channel:
        async for chunk in stream(channel, count, size):
            received.update(chunk)
    assert received.digest() == expected.digest()


async def test_a_large_upload_arrives_whole(run_dir: Path) -> None:
    async def chunks() -> Any:
        for _ in range(100):
            yield b"x" * 1_000_000

    async with shell(run_dir) as server, server.channel() as channel:
        call: grpc.aio.StreamUnaryMultiCallable[bytes, bytes] = channel.stream_unary("/probe/Sink")
        assert await call(chunks()) == b"100000000"


async def test_a_message_above_the_limit_is_refused(run_dir: Path) -> None:
    async with shell(run_dir) as server, server.channel() as channel:
        assert len(await unary(channel, "Echo", b"x" * 4_000_000)) == 4_000_000
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await unary(channel, "Echo", b"x" * (5 << 20))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_a_reader_that_stops_holds_little_and_disturbs_nobody(run_dir: Path) -> None:
    """Without backpressure through the front, the whole stream would pile up in the daemon's memory."""
    async with shell(run_dir) as server, server.channel() as slow, server.channel() as other:
        call = stream(slow, 2000, 100_000)
        chunks = aiter(call)
        assert await anext(chunks)
        sent = -1
        while server.probe.streamed_bytes != sent:  # until it stands still
            sent = server.probe.streamed_bytes
            for _ in range(20):
                assert await unary(other, "Echo", b"hello") == b"hello"
        assert sent < 50_000_000
        rest = [chunk async for chunk in chunks]
        assert len(rest) == 1999


async def test_bytes_pass_with_half_closes_in_both_directions(run_dir: Path) -> None:
    """A client may end its direction and still read; the front must not take that for the end of the connection."""
    answer = b"answer" * 200_000

    async def upstream(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        question = await reader.read()  # until the client ends its direction
        writer.write(question + answer)
        await writer.drain()
        writer.close()

    private = run_dir / "upstream"
    async with await asyncio.start_unix_server(upstream, private), shell(run_dir, upstream=private) as server:
        reader, writer = await asyncio.open_unix_connection(server.path)
        writer.write(b"question" * 100_000)
        writer.write_eof()
        async with asyncio.timeout(20):
            assert await reader.read() == b"question" * 100_000 + answer
        await connections(server, 0)
        writer.close()


async def test_a_client_that_dies_ends_its_calls(run_dir: Path) -> None:
    async with shell(run_dir) as server:
        child = await asyncio.create_subprocess_exec(
            sys.executable,
            "-c",
            "import grpc, sys; grpc.insecure_channel('unix:' + sys.argv[1]).unary_unary('/probe/Hang')(b'')",
            str(server.path),
        )
        async with asyncio.timeout(20):
            await server.probe.hanging.wait()
        assert server.admission.running == 1
        child.kill()
        await child.wait()
        async with asyncio.timeout(20):
            await server.admission.wait_idle()
        await connections(server, 0)


async def test_one_user_has_no_more_connections_than_allowed(run_dir: Path) -> None:
    async with shell(run_dir, max_per_uid=3) as server:
        with ExitStack() as stack:
            held = [stack.enter_context(raw_connection(server.path)) for _ in range(3)]
            await connections(server, 3)
            fourth = stack.enter_context(raw_connection(server.path))
            assert await asyncio.to_thread(fourth.recv, 1) == b""
            assert server.front.connections == 3
            held[0].close()
            await connections(server, 2)
            async with server.channel() as channel:
                assert await unary(channel, "Echo", b"x") == b"x"


async def test_all_users_together_have_no_more_connections_than_allowed(run_dir: Path) -> None:
    async with shell(run_dir, max_total=2) as server:
        with raw_connection(server.path), raw_connection(server.path):
            await connections(server, 2)
            with raw_connection(server.path) as third:
                assert await asyncio.to_thread(third.recv, 1) == b""


async def test_service_recovers_during_a_flood_of_silent_connections(run_dir: Path) -> None:
    """A connection that never speaks is dropped by the handshake time-out, so the flood cannot keep the door shut."""
    async with shell(run_dir, max_per_uid=64) as server:
        with ExitStack() as stack:
            flood = 0
            while flood < 300:
                try:
                    stack.enter_context(raw_connection(server.path))
                    flood += 1
                except BlockingIOError:
                    await asyncio.sleep(0)
            async with server.channel() as channel, asyncio.timeout(20):
                assert await unary(channel, "Echo", b"in", wait_for_ready=True) == b"in"
        await connections(server, 0)


async def test_http_1_runs_no_handler(run_dir: Path) -> None:
    """A web page can make a browser send this; it must not reach a service."""
    request = (
        b"POST /probe/Echo HTTP/1.1\r\nHost: x\r\nContent-Type: application/grpc\r\nContent-Length: 5\r\n\r\n\0\0\0\0\0"
    )
    async with shell(run_dir) as server:
        with raw_connection(server.path) as sock:
            sock.sendall(request)
            answer = bytearray()
            while data := await asyncio.to_thread(sock.recv, 65536):
                answer += data
        assert not answer.startswith(b"HTTP/1.1 200")
        await connections(server, 0)
        assert server.probe.calls == []


async def test_a_connection_waits_for_a_private_server_whose_backlog_is_full(run_dir: Path) -> None:
    """A unix socket with a full backlog says EAGAIN, which is not a connection in progress as on TCP."""
    backend = socket.socket(socket.AF_UNIX)
    backend.bind(str(run_dir / "backend"))
    backend.listen(0)
    async with shell(run_dir, upstream=run_dir / "backend") as server:
        with raw_connection(run_dir / "backend"), raw_connection(server.path) as waiting:
            await connections(server, 1)
            backend.accept()[0].close()
            waiting.sendall(b"through")
            accepted, _ = await asyncio.to_thread(backend.accept)
            accepted.settimeout(20)
            assert await asyncio.to_thread(accepted.recv, 100) == b"through"
            accepted.close()
    backend.close()


def test_the_buffer_is_bounded() -> None:
    assert BUFFER_BYTES <= 1 << 20


# The listening socket


AS_SYSTEMD_STARTS = textwrap.dedent(
    """
    import os, sys
    os.dup2(int(sys.argv[1]), 3)
    os.environ |= {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "1"}
    os.execv(sys.argv[2], sys.argv[2:])
    """
)

ACTIVATED = textwrap.dedent(
    """
    import asyncio, os, sys
    from pathlib import Path
    from lmd.daemon.listener import open_listener
    from tests.support.shell_daemon import shell

    async def main():
        listener = open_listener(Path("/nowhere/lmd.sock"), os.environ, pid=os.getpid())
        async with shell(Path(sys.argv[1]), listener=listener):
            print(listener.path, listener.activated, flush=True)
            await asyncio.to_thread(sys.stdin.read)

    asyncio.run(main())
    """
)


async def test_a_socket_that_systemd_passes_is_served_and_left_behind(run_dir: Path) -> None:
    path = run_dir / "activated.sock"
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen()
        child = await asyncio.create_subprocess_exec(
            sys.executable,
            "-c",
            AS_SYSTEMD_STARTS,
            str(listening.fileno()),
            sys.executable,
            "-c",
            ACTIVATED,
            str(run_dir),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=[listening.fileno()],
        )
        assert child.stdin is not None
        assert child.stdout is not None
        # A client that connects before the daemon runs waits in the backlog.
        async with grpc.aio.insecure_channel(f"unix:{path}") as channel, asyncio.timeout(20):
            assert await unary(channel, "Echo", b"early", wait_for_ready=True) == b"early"
        assert (await child.stdout.readline()).decode().split() == [str(path), "True"]
        child.stdin.close()
        assert await child.wait() == 0
    assert path.exists()


def test_passed_sockets_of_another_process_are_ignored(run_dir: Path) -> None:
    listener = open_listener(run_dir / "lmd.sock", {"LISTEN_PID": "1", "LISTEN_FDS": "1"}, pid=os.getpid())
    assert not listener.activated
    listener.close()


def test_more_than_one_passed_socket_is_refused(run_dir: Path) -> None:
    with pytest.raises(SocketUnusable, match="passes 2 sockets"):
        open_listener(run_dir / "lmd.sock", {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "2"}, pid=os.getpid())


def test_a_bound_socket_is_for_its_owner_and_disappears_at_the_end(run_dir: Path) -> None:
    path = run_dir / "sub" / "deeper" / "lmd.sock"
    old = os.umask(0)
    try:
        listener = open_listener(path, {}, pid=0)
    finally:
        os.umask(old)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    listener.close()
    listener.close()
    assert not path.exists()


@pytest.mark.skipif(os.getuid() != 0, reason="only root gives files to a group")
def test_the_systems_socket_is_for_its_group(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = run_dir / "system" / "lmd.sock"
    group = grp.getgrgid(65534 if os.path.exists("/etc/alpine-release") else 1)
    monkeypatch.setattr("lmd.daemon.listener.SYSTEM_SOCKET", path)
    monkeypatch.setattr("lmd.daemon.listener.SOCKET_GROUP", group.gr_name)
    listener = open_listener(path, {}, pid=0)
    found = path.stat()
    assert (stat.S_IMODE(found.st_mode), found.st_gid) == (0o660, group.gr_gid)
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o755
    listener.close()


def test_a_stale_socket_is_replaced(run_dir: Path) -> None:
    path = run_dir / "lmd.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    listener = open_listener(path, {}, pid=0)
    with raw_connection(path):
        pass
    listener.close()


def test_a_live_socket_is_refused_and_left_alone(run_dir: Path) -> None:
    path = run_dir / "lmd.sock"
    with socket.socket(socket.AF_UNIX) as alive:
        alive.bind(str(path))
        alive.listen()
        with pytest.raises(SocketUnusable, match=f"a daemon with pid {os.getpid()} already serves {path}") as caught:
            open_listener(path, {}, pid=0)
        assert caught.value.hint
        with raw_connection(path):
            pass


def test_a_live_socket_whose_backlog_is_full_is_refused(run_dir: Path) -> None:
    path = run_dir / "lmd.sock"
    with socket.socket(socket.AF_UNIX) as busy:
        busy.bind(str(path))
        busy.listen(0)
        with raw_connection(path), pytest.raises(SocketUnusable, match="another daemon already serves"):
            open_listener(path, {}, pid=0)


def test_two_daemons_never_share_a_path(run_dir: Path) -> None:
    first = open_listener(run_dir / "lmd.sock", {}, pid=0)
    with pytest.raises(SocketUnusable, match="already serves"):
        open_listener(run_dir / "lmd.sock", {}, pid=0)
    with raw_connection(run_dir / "lmd.sock"):
        pass
    first.close()
    open_listener(run_dir / "lmd.sock", {}, pid=0).close()


def test_a_socket_that_somebody_replaced_is_not_removed(run_dir: Path) -> None:
    path = run_dir / "lmd.sock"
    listener = open_listener(path, {}, pid=0)
    path.unlink()
    path.write_text("mine")
    listener.close()
    assert path.read_text() == "mine"


def test_a_file_in_the_place_of_the_socket_is_left_alone(run_dir: Path) -> None:
    path = run_dir / "lmd.sock"
    path.write_text("precious")
    with pytest.raises(SocketUnusable, match="is not a socket"):
        open_listener(path, {}, pid=0)
    assert path.read_text() == "precious"


def test_a_path_that_does_not_fit_says_by_how_much() -> None:
    check_path_length(Path("/" + "x" * 106))
    with pytest.raises(SocketUnusable, match="is 3 bytes longer than the 107") as caught:
        check_path_length(Path("/" + "x" * 109))
    assert "LMD_HOME" in caught.value.hint


def test_a_directory_that_others_may_write_to_is_refused(run_dir: Path) -> None:
    open_to_all = run_dir / "open"
    open_to_all.mkdir()
    open_to_all.chmod(0o777)
    with pytest.raises(SocketUnusable, match="other users may write"):
        prepare_directory(open_to_all, 0o700)


def test_a_symlink_in_the_place_of_the_directory_is_refused(run_dir: Path) -> None:
    (run_dir / "real").mkdir()
    (run_dir / "link").symlink_to(run_dir / "real")
    with pytest.raises(SocketUnusable, match="is not a directory"):
        prepare_directory(run_dir / "link", 0o700)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a directory away")
def test_a_directory_of_somebody_else_is_refused(run_dir: Path) -> None:
    theirs = run_dir / "theirs"
    theirs.mkdir(mode=0o700)
    os.chown(theirs, 4242, 4242)
    with pytest.raises(SocketUnusable, match="belongs to uid 4242"):
        prepare_directory(theirs, 0o700)
