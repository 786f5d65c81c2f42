"""What stays in memory, as a user sees it: load, pin, watch, stop, and a restart of the daemon."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.support.product import Product, installed, wait_until
from tests.support.tiny_models import make_tiny_llama

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]


@pytest.fixture
def product(lmd_home: Path, tmp_path: Path) -> Iterator[Product]:
    with installed(lmd_home) as made:
        made.start()
        for seed, name in enumerate(("a", "b"), 1):
            model = make_tiny_llama(tmp_path / f"{name}.gguf", seed=seed)
            modelfile = tmp_path / f"Modelfile-{name}"
            modelfile.write_text(f"FROM {model}\n")
            made.lm("create", name, "-f", str(modelfile))
        yield made


def listed(product: Product) -> dict[str, dict[str, object]]:
    return {runner["name"]: runner for runner in product.json("ps")}


def test_a_pin_outlives_the_daemon_and_its_runner(product: Product) -> None:
    done = product.lm("pin", "a", "-o", "num_ctx=64")
    assert "pinned a:latest" in done.stderr
    product.daemons[-1].stop()
    product.start(LMD_RUNTIME_PRELOAD="b")
    wait_until(lambda: set(listed(product)) == {"a:latest", "b:latest"}, "both are loaded without being asked for")
    wait_until(lambda: all(runner["state"] == "ready" for runner in listed(product).values()), "both are ready")
    pinned = listed(product)["a:latest"]
    assert (pinned["pinned"], pinned["context_length"], pinned["expires_at"]) == (True, 64, None)
    assert listed(product)["b:latest"]["pinned"] is False
    pid = pinned["pid"]
    assert isinstance(pid, int)
    psutil.Process(pid).kill()
    wait_until(
        lambda: (now := listed(product)["a:latest"])["state"] == "ready" and now["pid"] != pid,
        "it comes back by itself",
    )
    product.lm("unpin", "a")
    assert listed(product)["a:latest"]["expires_at"]
    again = product.lm("unpin", "a", code=1).stderr.split("\n")
    assert [line for line in again if line] == ["error: model `a` is not pinned", "hint: no model is pinned"]
    product.daemons[-1].stop()
    product.start()
    assert listed(product) == {}


def test_watching_tells_the_life_of_a_runner(product: Product) -> None:
    with product.spawn_lm("ps", "--watch", "--json") as watching:
        assert watching.stdout is not None
        assert watching.stderr is not None
        first = json.loads(watching.stdout.readline())
        assert first == {"runners": [], "events": []}
        product.lm("load", "a")
        product.lm("stop", "a")
        states: list[str] = []
        while "gone" not in states:
            states += [event["state"] for event in json.loads(watching.stdout.readline())["events"]]
        assert [state for state in states if state != "loading"] == ["ready", "draining", "gone"]
        product.daemons[-1].stop()  # which a watcher does not hold up
        assert watching.wait(20) == 0
        assert "the daemon shuts down" in watching.stderr.read()


def test_the_second_load_finds_a_runner_that_is_ready(product: Product) -> None:
    product.lm("load", "a")
    daemon = product.daemons[-1]
    wait_until(lambda: "(spare)" in daemon.log.read_text(), "a spare runner is started")
    (spare,) = [
        json.loads(line)["pid"]
        for line in daemon.log.read_text().splitlines()
        if '"runner_spawned"' in line and "(spare)" in line
    ]
    assert list(listed(product)) == ["a:latest"]
    product.lm("load", "b", "--keep-alive", "-1")
    loaded = listed(product)["b:latest"]
    assert loaded["keep_forever"] is True
    # A spare that has not said hello yet is not waited for.
    assert loaded["pid"] == spare or "runner_adopted" not in daemon.log.read_text()
    assert product.lm("run", "b", "hello", "-o", "num_predict=3").stdout
