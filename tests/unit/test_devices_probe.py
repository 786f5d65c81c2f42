"""The probe: the real one against the installed engine, and children that misbehave."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from lmd.daemon.devices.engine_probe import PROBE_COMMAND, engine_backends, probe_engine, read_answer
from lmd.daemon.devices.values import EngineDevice, Probed
from tests.support.leaks import until

DEVICE: dict[str, Any] = {
    "id": "cuda0",
    "name": "CUDA0",
    "backend": "cuda",
    "kind": "gpu",
    "description": "NVIDIA L4",
    "bus_id": "0000:01:00.0",
    "total_bytes": 24,
    "free_bytes": 23,
}


def answer(*devices: dict[str, Any], **limits: str) -> bytes:
    return json.dumps({"engine": "1", "limits": limits, "devices": devices}).encode()


def child(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code)


def children_with(words: str) -> list[psutil.Process]:
    return [process for process in psutil.Process().children() if words in " ".join(process.cmdline())]


def test_the_installed_engine_answers() -> None:
    document = json.loads(subprocess.run(PROBE_COMMAND, capture_output=True, check=True).stdout)
    [cpu] = [device for device in document["devices"] if device["kind"] == "cpu"]
    assert (cpu["id"], cpu["backend"], cpu["bus_id"]) == ("cpu", "cpu", "")
    assert 0 < cpu["free_bytes"] <= cpu["total_bytes"] == psutil.virtual_memory().total
    assert document["engine"]


async def test_the_real_probe_through_the_daemons_eyes() -> None:
    probed = await probe_engine()
    assert probed.fault == ""
    # Whatever it was built with: main memory is no accelerator.
    assert all(device.kind in ("gpu", "igpu") for device in probed.devices)


def test_the_probe_tells_what_hides_devices() -> None:
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "1", "HIP_VISIBLE_DEVICES": ""}
    document = json.loads(subprocess.run(PROBE_COMMAND, capture_output=True, check=True, env=env).stdout)
    assert document["limits"] == {"CUDA_VISIBLE_DEVICES": "1"}


def test_an_answer_is_read() -> None:
    probed = read_answer(answer(DEVICE, DEVICE | {"kind": "cpu", "id": "cpu"}, GGML_VK_VISIBLE_DEVICES="0"))
    assert probed == Probed(
        (EngineDevice("cuda0", "cuda", "gpu", "NVIDIA L4", "0000:01:00.0", 24, 23),), {"GGML_VK_VISIBLE_DEVICES": "0"}
    )


def test_devices_of_other_machines_are_none_of_ours() -> None:
    assert read_answer(answer(DEVICE | {"backend": "rpc", "id": "rpc0"})).devices == ()


@pytest.mark.parametrize(
    "document",
    [
        b"",
        b"[]",
        b"{}",
        b"\xff",
        answer(DEVICE | {"id": "../cuda0"}),
        answer(DEVICE | {"total_bytes": -1}),
        answer(DEVICE | {"free_bytes": "much"}),
        answer({"kind": "gpu", "backend": "cuda"}),
        b" " * ((1 << 20) + 1),
    ],
)
async def test_nonsense_is_a_fault_and_no_error(tmp_path: Path, document: bytes) -> None:
    (tmp_path / "answer").write_bytes(document)
    code = f"import sys, pathlib; sys.stdout.buffer.write(pathlib.Path({str(tmp_path / 'answer')!r}).read_bytes())"
    assert await probe_engine(child(code)) == Probed(fault="the engine's probe talks nonsense")


async def test_a_driver_that_aborts_ends_the_probe_alone_and_its_words_are_kept() -> None:
    code = "import os, sys; print('ggml_cuda: no device', file=sys.stderr, flush=True); os.abort()"
    probed = await probe_engine(child(code))
    assert probed.fault == "the engine's probe died (SIGABRT): ggml_cuda: no device"


async def test_a_driver_that_hangs_is_given_up_and_nothing_is_left() -> None:
    probed = await probe_engine(child("import time; time.sleep(1000)"), timeout_s=0.3)
    assert probed.fault == "the engine's probe did not answer for 0.3 s; a driver may hang"
    assert not children_with("time.sleep(1000)")


async def test_a_cancelled_probe_leaves_no_process() -> None:
    probing = asyncio.create_task(probe_engine(child("import time; time.sleep(1001)")))
    await until(lambda: bool(children_with("time.sleep(1001)")))
    probing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await probing
    assert not children_with("time.sleep(1001)")


async def test_a_probe_that_cannot_be_started_is_a_fault() -> None:
    probed = await probe_engine(("/nowhere/python",))
    assert probed.fault.startswith("the engine's probe cannot be started: ")


def test_what_the_engine_was_built_with_shows_in_its_libraries(tmp_path: Path) -> None:
    lib = tmp_path / "lib"
    lib.mkdir()
    for name in (
        "libllama.so",
        "libggml.so",
        "libggml-base.so.0",
        "libggml-cpu.so",
        "libggml-blas.so",
        "libggml-rpc.so",
    ):
        (lib / name).touch()
    assert engine_backends([tmp_path]) == frozenset()
    for name in ("libggml-cuda.so", "libggml-hip.so", "libggml-vulkan.so.0.25.3", "libggml-metal.dylib"):
        (lib / name).touch()
    assert engine_backends([tmp_path]) == {"cuda", "rocm", "vulkan", "metal"}
    assert engine_backends([tmp_path / "nothing"]) == frozenset()
