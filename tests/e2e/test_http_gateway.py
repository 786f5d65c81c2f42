"""The gateway of a daemon process: where it listens, what `lm status` says, and how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import signal
import socket
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest

from lmd.v1 import system_service_pb2 as pb
from lmd.v1.system_service_pb2_grpc import SystemServiceStub
from tests.e2e.test_lifecycle import Daemon, daemon
from tests.support.product import Product, installed

pytestmark = pytest.mark.e2e


def port_of(url: str) -> int:
    port = urlsplit(url).port
    assert port is not None
    return port


def ask(url: str, method: str = "GET", path: str = "/who", body: str | None = None) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port_of(url), timeout=20)
    with contextlib.closing(connection):
        connection.request(method, path, body)
        response = connection.getresponse()
        return response.status, response.read()


async def http_of(running: Daemon) -> pb.GetStatusResponse:
    async with running.channel() as channel:
        return await SystemServiceStub(channel).GetStatus(pb.GetStatusRequest())


def test_the_product_answers_over_http_and_says_where(lmd_home: Path) -> None:
    with installed(lmd_home) as product:
        product.start()
        status = product.json("status")
        assert status["http_detail"] == ""
        assert status["http"] in product.lm("status").stdout
        assert ask(status["http"], path="/no/such/path") == (404, b"404 page not found")


def test_two_daemons_that_want_one_address_both_run(lmd_home: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other, installed(lmd_home) as product:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        started = product.start(LMD_HTTP_LISTEN=address)
        status = product.json("status")
        assert (status["http"], status["http_detail"]) == ("", f"{address} is taken")
        assert f"off ({address} is taken)" in product.lm("status").stdout
        assert "http_address_unusable" in started.log.read_text()
        assert started.stop() == 0
        # Of several addresses one is enough.
        product.start(LMD_HTTP_LISTEN=f"{address} 127.0.0.1:0")
        status = product.json("status")
        assert status["http_detail"] == f"{address} is taken"
        assert ask(status["http"])[0] == 404


def test_the_gateway_can_be_switched_off_and_then_costs_nothing(lmd_home: Path) -> None:
    with installed(lmd_home) as product:
        running = product.start(LMD_HTTP_ENABLED="false")
        status = product.json("status")
        assert (status["http"], status["http_detail"]) == ("", "switched off by `http.enabled`")
        kinds = {connection.type for connection in psutil.Process(running.pid).net_connections("inet")}
        assert not kinds
        maps = Path(f"/proc/{running.pid}/maps").read_text()
        assert "httptools" not in maps


def test_bad_tokens_are_told_before_anything_happens(lmd_home: Path) -> None:
    file = lmd_home / "tokens"
    file.write_text("nonsense")
    file.chmod(0o600)
    with installed(lmd_home, LMD_HTTP_TOKENS_FILE=str(file)) as product:
        message = refusal(product)
        assert f"environment variable LMD_HTTP_TOKENS_FILE: {file}, line 1: expected a name and sha256:" in message
        file.chmod(0o644)
        assert f"{file} can be read by others" in refusal(product)
        file.unlink()
        assert f"{file} cannot be read" in refusal(product)


def refusal(product: Product) -> str:
    with pytest.raises(AssertionError, match="lmd ended with 2") as caught:
        product.start()
    return str(caught.value)


async def test_a_drain_lets_streams_finish(lmd_home: Path) -> None:
    async with daemon(lmd_home, LMD_RUNTIME_DRAIN_TIMEOUT="20s") as running:
        url = (await http_of(running)).http
        reader, writer = await asyncio.open_connection("127.0.0.1", port_of(url))
        writer.write(b"POST /stream HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n{}")
        await reader.readuntil(b"first\n")
        running.process.send_signal(signal.SIGTERM)
        await running.until('"draining"')
        status, body = await asyncio.to_thread(ask, url, "POST", "/json", "{}")
        assert status == 503
        assert b"shutting down" in body
        assert (await asyncio.to_thread(ask, url))[0] == 200
        assert (await asyncio.to_thread(ask, url, "GET", "/release"))[0] == 200
        assert (await reader.read()).endswith(b"last\n\r\n0\r\n\r\n")
        assert await running.end() == 0
        writer.close()


async def test_what_outlasts_the_drain_is_cut(lmd_home: Path) -> None:
    async with daemon(lmd_home, LMD_RUNTIME_DRAIN_TIMEOUT="0s") as running:
        url = (await http_of(running)).http
        reader, writer = await asyncio.open_connection("127.0.0.1", port_of(url))
        writer.write(b"POST /stream HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n{}")
        await reader.readuntil(b"first\n")
        running.process.send_signal(signal.SIGTERM)
        assert b"0\r\n\r\n" not in await reader.read()
        assert await running.end() == 0
        writer.close()


async def test_the_caller_is_the_user(lmd_home: Path) -> None:
    async with daemon(lmd_home, LMD_HTTP_LISTEN="127.0.0.1:0 [::1]:0") as running:
        urls = (await http_of(running)).http.split()
        assert [urlsplit(url).hostname for url in urls] == ["127.0.0.1", "::1"]
        _, body = await asyncio.to_thread(ask, urls[0])
        assert json.loads(body) == {"caller": f"uid:{os.getuid()}"}
