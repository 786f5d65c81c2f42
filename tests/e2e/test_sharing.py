"""Several clients and models at once: nobody disturbs anybody."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path

import psutil
import pytest

from tests.support.product import Product, wait_until

pytestmark = pytest.mark.e2e

LONG = ["-o", "num_predict=400", "-o", "temperature=0", "-o", "num_ctx=512"]


def busy(product: Product, name: str) -> bool:
    return any(runner["name"] == name and runner["slots_busy"] for runner in product.json("ps"))


@pytest.fixture
def slow_model(product: Product, tmp_path: Path) -> str:
    """A model that takes a while for each token, so that "while it answers" is a state a test can stand in."""
    from tests.support.tiny_models import make_tiny_llama

    path = make_tiny_llama(tmp_path / "slow.gguf", n_layer=8, n_embd=512, n_ctx=4096)
    (tmp_path / "Modelfile").write_text(f"FROM {path}\n")
    product.lm("create", "slow", "-f", str(tmp_path / "Modelfile"))
    return "slow:latest"


@pytest.fixture
def running(product: Product) -> None:
    product.start()
    product.lm("pull", "hf.co/test/stories")


def start_long_answer(product: Product, name: str) -> subprocess.Popen[str]:
    process = product.spawn_lm("run", name, "once", "--json", "-o", "num_predict=3000", "-o", "temperature=0")
    wait_until(lambda: process.poll() is not None or busy(product, name), "the long answer runs")
    assert process.poll() is None, process.communicate()
    return process


def test_two_models_answer_at_once(product: Product, running: None, slow_model: str) -> None:
    long_answer = start_long_answer(product, slow_model)
    other = product.lm("run", "hf.co/test/stories", "Once upon a time", *LONG)
    assert other.stdout.strip()
    runners = {runner["name"]: runner for runner in product.json("ps")}
    assert set(runners) == {slow_model, "hf.co/test/stories:latest"}
    assert all(runner["memory_bytes"] > 0 for runner in runners.values())
    assert runners["hf.co/test/stories:latest"]["expires_at"]
    out, err = long_answer.communicate(timeout=60)
    assert long_answer.returncode == 0, err
    assert json.loads(out)["generated_tokens"] > 0


def test_rm_lets_the_running_answer_finish(product: Product, running: None, slow_model: str) -> None:
    blobs = product.home / "store" / "blobs" / "sha256"
    before = {path.name for path in blobs.iterdir()}
    long_answer = start_long_answer(product, slow_model)
    product.lm("rm", slow_model)
    assert slow_model not in [model["name"] for model in product.json("ls")]
    assert {path.name for path in blobs.iterdir()} == before
    out, err = long_answer.communicate(timeout=60)
    assert long_answer.returncode == 0, err
    assert json.loads(out)["finish_reason"] in ("stop", "length")
    wait_until(lambda: len({path.name for path in blobs.iterdir()}) < len(before), "the space returns")


def test_rm_of_an_idle_model_frees_memory_and_disk_at_once(product: Product, running: None, slow_model: str) -> None:
    product.lm("run", slow_model, "once", "-o", "num_predict=1")
    (removed,) = product.json("rm", slow_model)
    assert removed["freed_bytes"] > 1_000_000
    assert removed["pending_bytes"] == 0
    assert product.json("ps") == []


def test_a_second_name_keeps_the_model_resident(product: Product, running: None) -> None:
    product.lm("run", "hf.co/test/stories", "once", "-o", "num_predict=1")
    product.lm("cp", "hf.co/test/stories", "tales")
    product.lm("rm", "hf.co/test/stories")
    assert len(product.json("ps")) == 1


def test_a_client_that_leaves_stops_its_answer(product: Product, running: None, slow_model: str) -> None:
    long_answer = start_long_answer(product, slow_model)
    long_answer.terminate()
    long_answer.communicate(timeout=10)
    wait_until(lambda: not busy(product, slow_model), "the slot is free again", timeout_s=10)


def test_runner_that_is_killed_fails_its_own_answers_only(product: Product, running: None, slow_model: str) -> None:
    long_answer = start_long_answer(product, slow_model)
    (pid,) = (runner["pid"] for runner in product.json("ps") if runner["name"] == slow_model)
    product.lm("run", "hf.co/test/stories", "Once", "-o", "num_predict=2")
    psutil.Process(pid).kill()
    _, err = long_answer.communicate(timeout=30)
    assert long_answer.returncode == 1
    assert "RUNNER_CRASHED" in err
    product.lm("run", "hf.co/test/stories", "Once", "-o", "num_predict=2")
    product.lm("run", slow_model, "once", "-o", "num_predict=2")


def test_children_die_with_a_killed_daemon(product: Product) -> None:
    daemon = product.start()
    product.lm("run", "hf.co/test/chat", "hi", "-o", "num_predict=2")
    children = daemon.children()
    assert children
    daemon.kill()
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive
    product.start()
    assert product.json("ps") == []
    product.lm("run", "hf.co/test/chat", "hi", "-o", "num_predict=2")


def test_drain_finishes_the_running_answer(product: Product, running: None, slow_model: str) -> None:
    process = product.spawn_lm("run", slow_model, "once", "--json", "-o", "num_predict=60", "-o", "temperature=0")
    wait_until(lambda: busy(product, slow_model) or process.poll() is not None, "the answer runs")
    assert product.daemons[-1].stop(60) == 0
    out, err = process.communicate(timeout=30)
    assert process.returncode == 0, err
    assert json.loads(out)["generated_tokens"] > 0


def test_drain_refuses_those_who_only_wait(product: Product, running: None, slow_model: str) -> None:
    """They kept waiting for their load beside the running answer, and were served or cut at the drain's deadline."""
    long_answer = start_long_answer(product, slow_model)
    waiting = product.spawn_lm("run", slow_model, "once", "--json", "-o", "num_gpu=0")
    wait_until(lambda: [r["state"] for r in product.json("ps")] == ["draining"], "a reload waits for the answer")
    product.daemons[-1].process.send_signal(signal.SIGTERM)
    _, err = waiting.communicate(timeout=15)
    assert (waiting.returncode, json.loads(err)["error"]["reason"]) == (1, "DRAINING")
    assert long_answer.poll() is None
    long_answer.kill()
    long_answer.communicate()
    assert product.daemons[-1].process.wait(20) == 0
