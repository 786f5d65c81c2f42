"""What a request must pass before an adapter sees it: names, pages, kinds of bodies, callers, and the drain."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import pwd
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lmd.daemon.admission import Admission
from lmd.daemon.http.attribution import Attributor
from lmd.daemon.http.gateway import Gateway
from lmd.daemon.http.users import SocketUsers, may_connect
from tests.support.http_gateway import gateway
from tests.support.leaks import until

TOKEN = "a-token-of-sufficient-length"
JSON = "application/json"


def line(name: str, token: str) -> str:
    return f"{name} sha256:{hashlib.sha256(token.encode()).hexdigest()}\n"


@pytest.fixture
def tokens_file(tmp_path: Path) -> Path:
    file = tmp_path / "tokens"
    file.write_text("# who may come from outside\n" + line("laptop", TOKEN))
    file.chmod(0o600)
    return file


def change(file: Path, *, text: str | None = None, mode: int | None = None) -> None:
    """Write a file or change its mode; remove it when there is nothing to change."""
    if text is not None:
        file.write_text(text)
    elif mode is not None:
        file.chmod(mode)
    else:
        file.unlink()


def blind(running: Gateway) -> None:
    """Make the gateway know nobody's uid, as if all callers were remote."""
    running._state.attributor.uid_of_peer = lambda sock: None  # type: ignore[method-assign]


# Host


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "LOCALHOST:80",
        "127.0.0.1:11434",
        "127.8.9.1",
        "[::1]:1",
        "api.localhost",
        "localhost.",
        "a.internal",
    ],
)
async def test_names_of_this_machine_are_served(host: str) -> None:
    async with gateway() as rig:
        assert (await rig.request("GET", "/who", host=host)).status == 200
        assert (await rig.request("GET", "/who", host=socket.gethostname())).status == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "evil.example:11434",
        "10.0.0.1",
        "0.0.0.0",
        "8.8.8.8:80",
        "[::2]",
        "localhost:99999999",
        "localhost@evil.example",
        "a,localhost",
        "[::1",
        "",
    ],
)
async def test_other_names_are_not_which_ends_dns_rebinding(host: str) -> None:
    async with gateway() as rig:
        answer = await rig.request("GET", "/who", host=host)
        assert answer.status == 403
        assert b"http.allowed_hosts" in answer.body
        assert rig.probe.begun == 0


async def test_more_names_can_be_configured() -> None:
    async with gateway(allowed_hosts=["models.example.org", "*.lan"]) as rig:
        for host in ("models.example.org", "MODELS.example.org:443", "a.lan"):
            assert (await rig.request("GET", "/who", host=host)).status == 200
        for host in ("example.org", "x.models.example.org", "lan"):
            assert (await rig.request("GET", "/who", host=host)).status == 403


# Origin


@pytest.mark.parametrize(
    "origin",
    [
        "http://localhost",
        "http://localhost:3000",
        "https://127.0.0.1:8443",
        "http://[::1]:3000",
        "http://0.0.0.0:8080",
        "http://tauri.localhost",
        "app://obsidian.md",
        "tauri://localhost",
        "vscode-webview://1kq9",
        "file://",
    ],
)
async def test_pages_of_this_machine_and_desktop_applications_may_ask(origin: str) -> None:
    async with gateway() as rig:
        answer = await rig.request("POST", "/json", b"{}", origin=origin, content_type=f"{JSON}; charset=utf-8")
        assert answer.status == 200
        assert answer.header("access-control-allow-origin") == origin
        assert answer.header("vary") == "Origin"
        assert answer.header("access-control-allow-credentials") is None
        preflight = await rig.request(
            "OPTIONS",
            "/json",
            origin=origin,
            access_control_request_method="POST",
            access_control_request_headers="x-a",
        )
        assert (preflight.status, preflight.header("access-control-allow-headers")) == (204, "x-a")
        assert preflight.header("access-control-allow-origin") == origin
        assert rig.probe.begun == 1


@pytest.mark.parametrize(
    "origin",
    [
        "https://evil.example",
        "http://localhost.evil.example",
        "http://evil.example:80#localhost",
        "http://localhost@evil.example",
        "http://127.0.0.1.evil.example",
        "null",
        "chrome-extension://abc",
        "http://",
        "localhost",
        "*",
        "ftp://localhost",
        "http://local host",
        "http://[::1",
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST", "DELETE", "OPTIONS"])
async def test_other_pages_may_not(origin: str, method: str) -> None:
    async with gateway() as rig:
        answer = await rig.request(method, "/json", b"{}", origin=origin, content_type=JSON)
        assert answer.status == 403
        assert answer.header("access-control-allow-origin") is None
        assert b"http.allowed_origins" in answer.body
        assert rig.probe.begun == 0


async def test_more_pages_can_be_configured() -> None:
    async with gateway(allowed_origins=["https://chat.example.org", "chrome-extension://*"]) as rig:
        for origin in ("https://chat.example.org", "chrome-extension://abc"):
            assert (await rig.request("GET", "/who", origin=origin)).status == 200
        for origin in ("http://chat.example.org", "https://chat.example.org:444", "https://a.chat.example.org"):
            assert (await rig.request("GET", "/who", origin=origin)).status == 403


async def test_no_answer_ever_allows_every_page() -> None:
    async with gateway() as rig:
        for method in ("GET", "OPTIONS"):
            answer = await rig.request(method, "/who")
            assert answer.status < 300
            assert answer.header("access-control-allow-origin") is None


async def test_a_page_cannot_hide_its_origin() -> None:
    async with gateway() as rig:
        image = {"sec_fetch_site": "cross-site", "sec_fetch_mode": "no-cors"}
        assert (await rig.request("GET", "/who", None, **image)).status == 403
        form = {"sec_fetch_site": "cross-site", "sec_fetch_mode": "navigate", "content_type": JSON}
        assert (await rig.request("POST", "/json", b"{}", **form)).status == 403
        link = {"sec_fetch_site": "cross-site", "sec_fetch_mode": "navigate"}
        assert (await rig.request("GET", "/who", None, **link)).status == 200
        own = {"sec_fetch_site": "same-origin", "sec_fetch_mode": "cors"}
        assert (await rig.request("GET", "/who", None, **own)).status == 200


@pytest.mark.parametrize(
    "kind",
    ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "application/jsonx", ""],
)
async def test_a_form_cannot_forge_a_request(kind: str) -> None:
    async with gateway() as rig:
        for marks in ({"origin": "http://localhost:3000"}, {"sec_fetch_site": "same-origin"}):
            answer = await rig.request("POST", "/json", b"{}", content_type=kind, **marks)
            assert answer.status == 415
        assert rig.probe.begun == 0
        # A program that is no browser need not say what it sends, as with Ollama.
        assert (await rig.request("POST", "/json", b"{}", content_type=kind)).status == 200


# Callers


async def test_a_user_of_this_machine_needs_no_token() -> None:
    me = f"uid:{os.getuid()}"
    async with gateway() as rig:
        for more in ({}, {"authorization": "Bearer ollama"}, {"authorization": "Bearer sk-no-key"}, {"x_api_key": "x"}):
            assert json.loads((await rig.request("GET", "/who", None, **more)).body) == {"caller": me}


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
async def test_another_user_of_this_machine_is_told_apart() -> None:
    other = pwd.getpwnam("nobody").pw_uid
    code = (
        "import os, socket, sys; os.setuid(int(sys.argv[2])); s = socket.socket();"
        "s.connect((b'127.0.0.1', int(sys.argv[1])));"
        "s.sendall(b'GET /who HTTP/1.1\\r\\nHost: localhost\\r\\nConnection: close\\r\\n\\r\\n');"
        "print(b''.join(iter(lambda: s.recv(4096), b'')).decode().splitlines()[-1])"
    )
    async with gateway() as rig:
        child = await asyncio.create_subprocess_exec(
            sys.executable, "-c", code, str(rig.port), str(other), stdout=subprocess.PIPE, env={}
        )
        out, _ = await child.communicate()
        assert json.loads(out) == {"caller": f"uid:{other}"}


async def test_a_user_who_may_not_use_the_socket_may_not_use_http_either(tokens_file: Path) -> None:
    async with gateway(serves=lambda uid: uid != os.getuid(), tokens_file=str(tokens_file)) as rig:
        answer = await rig.request("GET", "/who")
        assert answer.status == 403
        assert b"may not use this daemon" in answer.body
        answer = await rig.request("GET", "/who", authorization=f"Bearer {TOKEN}")
        assert json.loads(answer.body) == {"caller": "token:laptop"}


NOBODY = pwd.getpwnam("nobody")


def test_the_modes_of_the_socket_say_who_may_connect(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
        path.chmod(0o666)
        tmp_path.chmod(0o700)
        assert may_connect(path, os.getuid())
        assert may_connect(path, 0)
        assert not may_connect(path, NOBODY.pw_uid)


@pytest.mark.parametrize(
    ("mode", "group", "allowed"),
    [(0o666, "", True), (0o660, "", False), (0o660, "nobody", True), (0o606, "nobody", False), (0o600, "", False)],
)
@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a file to another group")
def test_the_group_of_the_socket_counts(mode: int, group: str, allowed: bool) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as directory, socket.socket(socket.AF_UNIX) as sock:
        Path(directory).chmod(0o755)
        path = Path(directory) / "s"
        sock.bind(str(path))
        path.chmod(mode)
        if group:
            os.chown(path, -1, NOBODY.pw_gid)
        assert may_connect(path, NOBODY.pw_uid) is allowed
        assert may_connect(path, 4_000_000_000) is (mode & 0o2 != 0)
        Path(directory).chmod(0o700)
        assert not may_connect(path, NOBODY.pw_uid)


def test_who_may_connect_is_not_looked_up_for_every_request(tmp_path: Path) -> None:
    users = SocketUsers(tmp_path / "none")
    assert users.allow(os.getuid())
    assert not users.allow(NOBODY.pw_uid)
    assert users._known.keys() == {os.getuid(), NOBODY.pw_uid}


async def test_who_is_not_known_needs_a_token(tokens_file: Path) -> None:
    async with gateway(change=blind, tokens_file=str(tokens_file)) as rig:
        for more in (
            {},
            {"authorization": "Bearer wrong"},
            {"authorization": f"Basic {TOKEN}"},
            {"x_api_key": "wrong"},
        ):
            answer = await rig.request("GET", "/who", None, **more)
            assert answer.status == 401
            assert answer.header("www-authenticate") == 'Bearer realm="lmd"'
            assert b"http.tokens_file" in answer.body
            assert TOKEN.encode() not in answer.body
        for more in ({"authorization": f"Bearer {TOKEN}"}, {"authorization": f"bearer {TOKEN}"}, {"x_api_key": TOKEN}):
            answer = await rig.request("GET", "/who", None, **more)
            assert json.loads(answer.body) == {"caller": "token:laptop"}


async def test_a_token_can_be_required_of_everyone(tokens_file: Path) -> None:
    async with gateway(require_token=True, tokens_file=str(tokens_file)) as rig:
        assert (await rig.request("GET", "/who")).status == 401
        assert (await rig.request("GET", "/who", authorization="Bearer wrong")).status == 401
        answer = await rig.request("GET", "/who", authorization=f"Bearer {TOKEN}")
        assert json.loads(answer.body) == {"caller": "token:laptop"}
        # The browser asks this itself, and knows no token.
        assert (await rig.request("OPTIONS", "/who", origin="http://localhost:3000")).status == 204


@pytest.mark.parametrize("header", ["x_forwarded_for", "forwarded", "x_real_ip"])
async def test_who_comes_through_a_proxy_is_not_the_proxys_user(header: str, tokens_file: Path) -> None:
    async with gateway(tokens_file=str(tokens_file)) as rig:
        answer = await rig.request("GET", "/who", None, **{header: "203.0.113.7"})
        assert answer.status == 401
        assert b"behind a proxy" in answer.body
        answer = await rig.request("GET", "/who", None, **{header: "203.0.113.7", "authorization": f"Bearer {TOKEN}"})
        assert json.loads(answer.body) == {"caller": "token:laptop"}


async def test_a_changed_file_of_tokens_is_read_again(tokens_file: Path) -> None:
    async with gateway(change=blind, tokens_file=str(tokens_file)) as rig:

        async def status(token: str) -> int:
            return (await rig.request("GET", "/who", authorization=f"Bearer {token}")).status

        assert (await status(TOKEN), await status("another")) == (200, 401)
        change(tokens_file, text=line("desk", "another"))
        assert (await status(TOKEN), await status("another")) == (401, 200)
        change(tokens_file, mode=0o644)
        assert await status("another") == 401
        change(tokens_file, mode=0o600)
        assert await status("another") == 200
        change(tokens_file)
        assert await status("another") == 401


# The end


async def test_a_draining_daemon_takes_no_new_work_and_still_tells() -> None:
    admission = Admission()
    async with gateway(admission=admission) as rig:
        running = await rig.connect()
        await running.send(b"POST /stream HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n{}")
        await until(lambda: rig.probe.streams == 1)
        assert admission.running == 1
        admission.drain()
        refused = await rig.request("POST", "/json", b"{}")
        assert (refused.status, refused.header("connection")) == (503, "close")
        assert int(refused.header("retry-after") or 0) >= 1
        assert b"shutting down" in refused.body
        assert (await rig.request("GET", "/who")).status == 200
        rig.probe.release.set()
        assert (await running.answer()).body == b"first\nlast\n"
        await asyncio.wait_for(admission.wait_idle(), 20)


async def test_what_still_runs_when_the_drain_time_is_over_is_cut_and_does_not_look_whole() -> None:
    admission = Admission()
    async with gateway(admission=admission) as rig:
        streaming, hanging = await rig.connect(), await rig.connect()
        await streaming.send(b"POST /stream HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n{}")
        await hanging.send(b"POST /hang HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n{}")
        await until(lambda: admission.running == 2 and rig.probe.streams == 1)
        await streaming.reader.readuntil(b"first\n")
        admission.expire()
        assert (await hanging.answer()).status == 503
        rest = await streaming.ended()
        assert b"0\r\n\r\n" not in rest
        await rig.idle()


# Attribution


@pytest.fixture(params=["netlink", "proc"])
def attributor(request: pytest.FixtureRequest) -> Iterator[Attributor]:
    with contextlib.closing(Attributor(netlink=request.param == "netlink")) as made:
        yield made


Pair = Callable[[], tuple[socket.socket, socket.socket]]


@pytest.fixture(params=["127.0.0.1", "::1", "::ffff:127.0.0.1"])
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    """Connections of a client over IPv4, IPv6, and IPv4 from an IPv6 socket."""
    host: str = request.param
    server_host, family = ("::1", socket.AF_INET6) if host == "::1" else ("127.0.0.1", socket.AF_INET)
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(socket.create_server((server_host, 0), family=family))

        def connect() -> tuple[socket.socket, socket.socket]:
            client = stack.enter_context(socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET))
            client.connect((host, server.getsockname()[1]))
            accepted, _ = server.accept()
            return client, stack.enter_context(accepted)

        yield connect


def test_the_kernel_tells_whose_the_other_end_is(attributor: Attributor, pair: Pair) -> None:
    client, accepted = pair()
    assert attributor.uid_of_peer(accepted) == os.getuid()
    client.shutdown(socket.SHUT_WR)
    assert attributor.uid_of_peer(accepted) == os.getuid()


def test_who_is_gone_is_nobody_and_above_all_not_root(attributor: Attributor, pair: Pair) -> None:
    client, accepted = pair()
    client.sendall(b"GET / HTTP/1.1\r\n")
    client.close()
    assert attributor.uid_of_peer(accepted) is None
    client, accepted = pair()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    client.close()
    assert attributor.uid_of_peer(accepted) is None


def test_a_listener_on_the_port_of_who_is_gone_is_not_taken_for_it(attributor: Attributor) -> None:
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        while True:
            client = stack.enter_context(socket.socket())
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            client.connect(server.getsockname())
            accepted = stack.enter_context(server.accept()[0])
            address = client.getsockname()
            client.close()
            # Some other program may have got the port meanwhile.
            with contextlib.suppress(OSError):
                stack.enter_context(socket.create_server(address))
                break
        assert attributor.uid_of_peer(accepted) is None
