"""What `lm devices` prints, and what `lm status` says of devices."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from lmd.v1 import runtime_service_pb2 as pb
from lmd.v1.endpoint import home_socket
from tests.support.cli import lm
from tests.support.fake_daemon import MIB, FakeDaemon

Capture = pytest.CaptureFixture[str]
GIB = 1024 * MIB


@pytest.fixture
def daemon(lmd_home: Path) -> Iterator[FakeDaemon]:
    with FakeDaemon(home_socket(lmd_home)) as fake:
        fake.devices = [
            pb.ComputeDevice(
                id="cpu",
                description="main memory",
                backend="cpu",
                total_bytes=64 * GIB,
                free_bytes=50 * GIB,
                held_bytes=2 * GIB,
                others_bytes=14 * GIB,
                usable=True,
            ),
            pb.ComputeDevice(
                id="cuda0",
                description="NVIDIA L4",
                backend="cuda",
                total_bytes=24 * GIB,
                free_bytes=7 * GIB,
                held_bytes=10 * GIB,
                leased_bytes=4 * GIB,
                others_bytes=3 * GIB,
                usable=True,
            ),
        ]
        yield fake


def test_devices_are_a_table(daemon: FakeDaemon, capsys: Capture) -> None:
    result = lm(capsys, "devices")
    assert (result.code, result.err) == (0, "")
    assert result.out.splitlines() == [
        "DEVICE  DESCRIPTION   TOTAL    FREE  MODELS  LEASED  OTHERS",
        "cpu     main memory  64 GiB  50 GiB   2 GiB     0 B  14 GiB",
        "cuda0   NVIDIA L4    24 GiB   7 GiB  10 GiB   4 GiB   3 GiB",
    ]


def test_a_device_that_cannot_be_used_says_why(daemon: FakeDaemon, capsys: Capture) -> None:
    daemon.devices[1].usable, daemon.devices[1].reason, daemon.devices[1].free_bytes = False, "GPU is\nlost", 0
    _, _, gpu, empty, why = lm(capsys, "devices").out.splitlines()
    assert gpu.split() == ["cuda0", "NVIDIA", "L4", "24", "GiB", "10", "GiB", "4", "GiB"]
    assert (empty, why) == ("", "cuda0 is not used: GPU is lost")


def test_devices_as_json(daemon: FakeDaemon, capsys: Capture) -> None:
    listed = json.loads(lm(capsys, "devices", "--json").out)
    assert [entry["id"] for entry in listed] == ["cpu", "cuda0"]
    assert listed[1] == {
        "id": "cuda0",
        "description": "NVIDIA L4",
        "backend": "cuda",
        "total_bytes": 24 * GIB,
        "free_bytes": 7 * GIB,
        "held_bytes": 10 * GIB,
        "leased_bytes": 4 * GIB,
        "others_bytes": 3 * GIB,
        "bandwidth_bytes": 0,
        "usable": True,
        "reason": "",
    }


def test_refresh_is_asked_for(daemon: FakeDaemon, capsys: Capture) -> None:
    lm(capsys, "devices")
    lm(capsys, "devices", "--refresh")
    assert [request.refresh for request in daemon.requests("ListDevices")] == [False, True]


def test_status_says_what_is_wrong_with_a_device(daemon: FakeDaemon, capsys: Capture) -> None:
    daemon.status.devices.add(id="cuda0", description="NVIDIA L4", total_bytes=24 * GIB, reason="GPU is lost")
    out = lm(capsys, "status").out
    assert "8 cores, 8 GiB of 32 GiB free" in out
    assert "NVIDIA L4, GPU is lost" in out
    assert json.loads(lm(capsys, "status", "--json").out)["devices"][1]["reason"] == "GPU is lost"
