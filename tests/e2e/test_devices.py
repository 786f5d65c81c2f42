"""`lm devices` against real daemons: on this machine, and on simulated ones."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.support.device_sets import GIB, SimulatedMachine, card, machine_with
from tests.support.product import Daemon, Product, installed, wait_until
from tests.support.shared_models import STORIES


@pytest.fixture
def product(lmd_home: Path) -> Iterator[Product]:
    with installed(lmd_home) as made:
        yield made


@pytest.fixture
def machine(tmp_path: Path) -> SimulatedMachine:
    machine = SimulatedMachine(tmp_path / "machine.json")
    machine.write(machine_with(card(0)))
    return machine


def start(product: Product, machine: SimulatedMachine, **env: str) -> Daemon:
    """Start a daemon on a simulated machine."""
    path = os.pathsep.join(filter(None, sys.path))
    return product.start(sys.executable, "-m", "tests.support.device_sets", str(machine.file), PYTHONPATH=path, **env)


def reasons(product: Product) -> dict[str, str]:
    return {device["id"]: device["reason"] for device in product.json("devices")}


def test_this_machine(product: Product) -> None:
    product.start()
    cpu = product.json("devices")[0]
    assert (cpu["id"], cpu["backend"], cpu["usable"], cpu["reason"]) == ("cpu", "cpu", True, "")
    assert 0 < cpu["free_bytes"] <= cpu["total_bytes"] <= psutil.virtual_memory().total
    assert cpu["held_bytes"] == 0
    # The engine itself is asked, in a process of its own.
    assert product.json("devices", "--refresh")[0]["id"] == "cpu"
    product.lm("run", str(STORIES), "Once")
    assert product.json("devices")[0]["held_bytes"] > 1 << 20
    assert product.lm("devices").stdout.splitlines()[0].startswith("DEVICE  DESCRIPTION")


def test_a_card_with_its_users(product: Product, machine: SimulatedMachine) -> None:
    start(product, machine)
    cuda = product.json("devices", "--refresh")[1]
    assert (cuda["id"], cuda["backend"], cuda["usable"]) == ("cuda0", "cuda", True)
    assert (cuda["total_bytes"], cuda["free_bytes"]) == (24 * GIB, 23 * GIB)
    assert cuda["others_bytes"] == GIB, "what nobody of ours holds is others'"


def test_a_card_that_is_lost_is_said_everywhere(product: Product, machine: SimulatedMachine) -> None:
    daemon = start(product, machine)
    wait_until(lambda: reasons(product) == {"cpu": "", "cuda0": ""}, "the engine has answered")
    machine.write(machine_with(card(0, fault="GPU is lost")))
    assert reasons(product) == {"cpu": "", "cuda0": "GPU is lost"}
    assert "NVIDIA L4, GPU is lost" in product.lm("status").stdout
    logs = [daemon.log, *product.home.glob("log/lmd*")]
    wait_until(lambda: any("device_lost" in log.read_text() for log in logs), "the log says so")
    machine.write(machine_with(card(0)))
    assert reasons(product) == {"cpu": "", "cuda0": ""}


def test_a_runner_that_finds_no_card_says_so_in_ps(product: Product, machine: SimulatedMachine) -> None:
    start(product, machine)
    product.lm("run", str(STORIES), "Once")
    [runner] = product.json("ps")
    assert runner["device"] == "cpu"
    assert runner["reason"] == "in main memory: the engine of its runner finds no accelerator"


def test_a_required_card_that_is_missing_refuses_models(product: Product, machine: SimulatedMachine) -> None:
    machine.write(machine_with(card(0, fault="GPU is lost")))
    start(product, machine, LMD_RUNTIME_REQUIRE_GPU="true")
    failed = product.lm("run", "--json", str(STORIES), "x", code=1)
    error = json.loads(failed.stderr.splitlines()[-1])["error"]
    assert error["reason"] == "DEVICE_UNAVAILABLE"
    assert "cuda0 (NVIDIA L4) cannot be used: GPU is lost" in error["message"]
    assert error["hint"] == "`lm devices --refresh` shows what there is"
