"""Checks residency on a machine with an accelerator, as `bench/gpu_check.sh` calls it.

    python -m bench.gpu_check [--device cuda0] [--num-ctx 8192]

Makes random models in the shape of Llama 3 8B and drives an installed daemon with them: are devices found, are
estimates what the driver shows, do models make room for each other, is a busy one spared, does memory come back, is a
fall back to main memory said. Prints one line for each check and ends with 1 when one failed. `--layers 2 --device cpu`
tries the script itself where there is no accelerator; checks that need one are left out then, and said to be.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bench.noise_models import EIGHT_B, write_noise
from tests.support.product import Product, installed, wait_until

MIB = 1 << 20
#: How far estimates may be from what the engine allocates.
RELATIVE, ABSOLUTE_BYTES = 0.03, 32 * MIB
#: What a driver takes for a process beside what that asks for: its context and kernels.
DRIVER_BYTES = 1 << 30
LOAD_S = 600.0
ANSWER = ("-o", "temperature=0", "-o", "ignore_eos=true")


@dataclass
class Report:
    """What was checked."""

    failed: int = 0
    left_out: list[str] = field(default_factory=list)

    def check(self, name: str, good: bool, detail: str) -> None:
        self.failed += not good
        print(f"{'ok  ' if good else 'FAIL'}  {name}: {detail}", flush=True)

    def close(self, name: str, found: int, expected: int) -> None:
        """Check that two numbers of bytes are as close as an estimate has to be."""
        allowed = RELATIVE * expected + ABSOLUTE_BYTES
        detail = f"{found / MIB:.0f} MiB, expected {expected / MIB:.0f} MiB, {abs(found - expected) / MIB:.0f} apart"
        self.check(name, abs(found - expected) <= allowed, detail)

    def go_on(self, name: str, checks: Callable[[], None]) -> None:
        """Make *checks*; what keeps them from coming to an end is a failure, and no end of the others."""
        try:
            checks()
        except (AssertionError, LookupError, OSError, ValueError, subprocess.SubprocessError) as error:
            self.check(name, False, " ".join(f"{type(error).__name__}: {error}".split()))


@dataclass(frozen=True)
class Machine:
    """What is tried, and on what."""

    device: str
    num_ctx: int
    models: tuple[Path, ...]

    @property
    def accelerates(self) -> bool:
        return self.device != "cpu"

    @property
    def nvidia(self) -> bool:
        return self.device.startswith("cuda") and shutil.which("nvidia-smi") is not None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda0", help="the device's id in `lm devices`")
    parser.add_argument("--num-ctx", type=int, default=8192)
    parser.add_argument("--layers", type=int, default=EIGHT_B.layers, help="fewer make smaller models")
    options = parser.parse_args()
    dims = replace(EIGHT_B, layers=options.layers)
    report = Report()
    with tempfile.TemporaryDirectory(prefix="lm-gpu-", ignore_cleanup_errors=True) as scratch:
        models = tuple(write_noise(Path(scratch, f"noise{n}.gguf"), seed=n, dims=dims) for n in range(2))
        machine = Machine(options.device, options.num_ctx, models)
        home = Path(scratch, "home")
        home.mkdir()
        _check_all(report, machine, home)
    for name in report.left_out:
        print(f"--    {name}: left out, it needs an accelerator")
    print(f"{report.failed} checks failed" if report.failed else "all checks passed")
    return 1 if report.failed else 0


def _check_all(report: Report, machine: Machine, home: Path) -> None:
    with installed(home) as product:
        daemon = product.start()
        device = check_devices(report, product, machine)
        if device is None:
            return
        for number, path in enumerate(machine.models):
            modelfile = home / "Modelfile"
            modelfile.write_text(f"FROM {path}\n")
            product.lm("create", f"noise{number}", "-f", str(modelfile), timeout_s=LOAD_S)
        size_bytes = check_estimate(report, product, machine)
        report.go_on("a part of the layers", lambda: check_part(report, product, machine))
        daemon.stop()
        # Just enough for one: two that fit would never make room for each other.
        # Of main memory others take and give back more than that all the time.
        reserve_bytes = max(int(device["free_bytes"] - 1.5 * size_bytes), 0) if machine.accelerates else 0
        with running(product, LMD_RUNTIME_MEMORY_RESERVE_BYTES=f"{reserve_bytes}B"):
            report.go_on("swaps", lambda: check_swap(report, product, machine))
            report.go_on("a busy model", lambda: check_busy(report, product, machine))
            report.go_on("a killed runner", lambda: check_kill(report, product, machine, size_bytes))
        report.go_on("a fall back", lambda: check_fall_back(report, product, machine))


@contextmanager
def running(product: Product, **env: str) -> Iterator[None]:
    daemon = product.start(**env)
    try:
        yield
    finally:
        daemon.stop()


def check_devices(report: Report, product: Product, machine: Machine) -> dict[str, Any] | None:
    """The device is there, and its memory is what the driver says."""
    found = {device["id"]: device for device in product.json("devices", "--refresh")}
    device: dict[str, Any] | None = found.get(machine.device)
    usable = device is not None and device["usable"]
    seen = ", ".join(f"{name} ({entry['reason'] or 'usable'})" for name, entry in found.items())
    report.check("device found", usable, seen)
    if not usable or device is None:
        return None
    if machine.nvidia:
        total_bytes = device["total_bytes"]
        # The tool rounds.
        near = [size for size in _card_sizes() if abs(size - total_bytes) <= 0.02 * size]
        report.check("its memory is the driver's", bool(near), f"{total_bytes / MIB:.0f} MiB, {_card_sizes()}")
    return device


def check_estimate(report: Report, product: Product, machine: Machine) -> int:
    """What the header says is what the engine allocates, and what the driver shows."""
    fit = product.json("fit", "noise0", *_context(machine))
    before = _free(product, machine)
    product.lm("load", "noise0", *_context(machine), timeout_s=LOAD_S)
    runner = _runner(product, "noise0")
    on_device = next((share["bytes"] for share in runner["shares"] if share["device"] == machine.device), 0)
    planned = next((share["bytes"] for share in fit["devices"] if share["device"] == machine.device), 0)
    report.close("estimate of the whole", fit["total_bytes"], runner["memory_bytes"])
    if machine.accelerates:
        report.check("all of it is on the device", runner["device"] == "gpu", runner["device"])
        report.close("estimate of the device's part", planned, on_device)
        taken = before - _free(product, machine)
        beside = taken - on_device
        detail = f"the driver shows {taken / MIB:.0f} MiB, {beside / MIB:.0f} MiB more than was asked for"
        report.check("the driver shows it", -ABSOLUTE_BYTES <= beside <= DRIVER_BYTES, detail)
    else:
        report.left_out += ["all of it is on the device", "the driver shows it"]
    answer_s = _answer(product, "noise0", machine)
    report.check("it answers", answer_s < LOAD_S, f"after {answer_s:.2f} s")
    product.lm("stop", "noise0")
    _gone(product, "noise0")
    if machine.accelerates:
        report.close("its memory comes back", _settled(product, machine, before), before)
    return int(max(on_device, runner["memory_bytes"] if not machine.accelerates else 0))


def check_part(report: Report, product: Product, machine: Machine) -> None:
    """Some layers on the device, the others in main memory."""
    if not machine.accelerates:
        report.left_out.append("a part of the layers")
        return
    product.lm("load", "noise0", "-o", "num_gpu=4", *_context(machine), timeout_s=LOAD_S)
    runner = _runner(product, "noise0")
    report.check("a part of the layers", runner["device"] == "gpu+cpu", f"{runner['device']}, {runner['shares']}")
    product.lm("stop", "noise0")
    _gone(product, "noise0")


def check_swap(report: Report, product: Product, machine: Machine) -> None:
    """Each model makes room for the other."""
    times: list[float] = []
    for turn in range(6):
        asked, other = f"noise{turn % 2}", f"noise{1 - turn % 2}"
        times.append(_answer(product, asked, machine))
        names = [entry["name"].split(":")[0] for entry in product.json("ps") if entry["state"] == "ready"]
        swapped = asked in names and (other not in names or not machine.accelerates)
        report.check(f"swap {turn + 1}", swapped, f"{times[-1]:.2f} s, then {names}")


def check_busy(report: Report, product: Product, machine: Machine) -> None:
    """A model that answers is not evicted: who needs its memory waits."""
    long_answer = product.spawn_lm("run", "noise0", "x", "--raw", *ANSWER, "-o", "num_predict=400", *_context(machine))
    wait_until(lambda: _busy(product, "noise0"), "the long answer runs", LOAD_S)
    waited: list[float] = []
    asking = threading.Thread(target=lambda: waited.append(_answer(product, "noise1", machine)))
    asking.start()
    _, err = long_answer.communicate(timeout=LOAD_S)
    asking.join(LOAD_S)
    report.check("a busy model is spared", long_answer.returncode == 0, err.strip() or "its answer ended by itself")
    report.check("who waited is served", bool(waited), f"after {waited[0]:.2f} s" if waited else "never")


def check_kill(report: Report, product: Product, machine: Machine, size_bytes: int) -> None:
    """A killed runner's memory comes back, and its model too."""
    _answer(product, "noise0", machine)
    before = _free(product, machine)
    os.kill(_runner(product, "noise0")["pid"], signal.SIGKILL)
    if machine.accelerates:
        freed = _settled(product, machine, before + size_bytes) - before
        report.check("a killed runner's memory comes back", freed >= 0.95 * size_bytes, f"{freed / MIB:.0f} MiB")
    else:
        report.left_out.append("a killed runner's memory comes back")
    answer_s = _answer(product, "noise0", machine)
    report.check("and its model, too", answer_s < LOAD_S, f"after {answer_s:.2f} s")


def check_fall_back(report: Report, product: Product, machine: Machine) -> None:
    """A hidden device is said to be hidden, and refused when it is required."""
    if not machine.nvidia:
        report.left_out.append("a fall back to main memory is said")
        return
    with running(product, CUDA_VISIBLE_DEVICES="-1"):
        reasons = {device["id"]: device["reason"] for device in product.json("devices", "--refresh")}
        report.check("a hidden device is said to be", "CUDA_VISIBLE_DEVICES" in str(reasons), str(reasons))
        _answer(product, "noise0", machine)
        reason = _runner(product, "noise0")["reason"]
        report.check("a fall back to main memory is said", reason.startswith("in main memory: "), reason)
    with running(product, CUDA_VISIBLE_DEVICES="-1", LMD_RUNTIME_REQUIRE_GPU="true"):
        done = product.lm("run", "noise0", "x", "--raw", "--json", code=None, timeout_s=LOAD_S)
        error = json.loads(done.stderr.strip().splitlines()[-1])["error"]
        report.check("and refused when required", error["reason"] == "DEVICE_UNAVAILABLE", error["message"])


def _context(machine: Machine) -> list[str]:
    return ["-o", f"num_ctx={machine.num_ctx}"]


def _answer(product: Product, name: str, machine: Machine) -> float:
    """Return how long an answer of one token takes, the load included."""
    began = time.monotonic()
    context = _context(machine)
    product.lm("run", name, "x", "--raw", *ANSWER, "-o", "num_predict=1", *context, timeout_s=LOAD_S)
    return time.monotonic() - began


def _runner(product: Product, name: str) -> dict[str, Any]:
    found: list[dict[str, Any]] = [entry for entry in product.json("ps") if entry["name"] == f"{name}:latest"]
    return found[0]


def _busy(product: Product, name: str) -> bool:
    return any(entry["name"] == f"{name}:latest" and entry["slots_busy"] for entry in product.json("ps"))


def _gone(product: Product, name: str) -> None:
    wait_until(lambda: all(entry["name"] != f"{name}:latest" for entry in product.json("ps")), f"{name} is gone")


def _free(product: Product, machine: Machine) -> int:
    return next(int(device["free_bytes"]) for device in product.json("devices") if device["id"] == machine.device)


def _settled(product: Product, machine: Machine, expected_bytes: int) -> int:
    """Return what is free once it is as much as expected, or after ten seconds: drivers take a moment."""
    deadline = time.monotonic() + 10
    while (free := _free(product, machine)) < 0.99 * expected_bytes and time.monotonic() < deadline:
        time.sleep(0.25)
    return free


def _card_sizes() -> list[int]:
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [int(line) * MIB for line in done.stdout.split()]


if __name__ == "__main__":
    sys.exit(main())
