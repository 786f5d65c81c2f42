"""SIGTERM while ten answers run: each ends complete, or is told why it does not."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import urllib3

from tests.support.product import Product, installed, wait_until
from tests.support.tiny_models import make_tiny_llama

pytestmark = [pytest.mark.fault, pytest.mark.e2e, pytest.mark.timeout(180)]

STREAMS = 10


@pytest.fixture(scope="module")
def slow_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Large enough for ten answers of a few hundred tokens to take seconds; it never stops by itself."""
    return make_tiny_llama(tmp_path_factory.mktemp("models") / "slow.gguf", n_layer=8, n_embd=640, n_ctx=1024)


@pytest.fixture
def product(lmd_home: Path) -> Iterator[Product]:
    with installed(lmd_home, LMD_RUNTIME_SLOTS=str(STREAMS)) as made:
        yield made


def streams(product: Product, model: Path, tmp_path: Path, num_predict: int, drain: str) -> list[list[dict[str, Any]]]:
    """Begin ten answers, end the daemon in the middle of all of them, and return what each client got."""
    daemon = product.start(LMD_RUNTIME_DRAIN_TIMEOUT=drain)
    (tmp_path / "Modelfile").write_text(f"FROM {model}\n")
    product.lm("create", "slow", "-f", str(tmp_path / "Modelfile"))
    url = f"{product.http_url}/api/generate"
    begun = [threading.Event() for _ in range(STREAMS)]

    def follow(number: int) -> list[dict[str, Any]]:
        body = {"model": "slow", "prompt": f"text {number}", "raw": True, "options": {"num_predict": num_predict}}
        lines = []
        with urllib3.PoolManager() as pool, pool.request("POST", url, json=body, preload_content=False) as reply:
            for line in reply:
                lines.append(json.loads(line))
                begun[number].set()
        return lines

    with ThreadPoolExecutor(STREAMS) as clients:
        running = [clients.submit(follow, number) for number in range(STREAMS)]
        wait_until(lambda: all(event.is_set() for event in begun), "ten answers run")
        assert not any(client.done() for client in running)
        assert daemon.stop(timeout_s=120) == 0
        return [client.result(timeout=30) for client in running]


def test_answers_that_finish_in_time_are_complete(product: Product, slow_model: Path, tmp_path: Path) -> None:
    for lines in streams(product, slow_model, tmp_path, num_predict=40, drain="100s"):
        assert [line["done"] for line in lines] == [False] * (len(lines) - 1) + [True]
        assert (lines[-1]["done_reason"], lines[-1]["eval_count"]) == ("length", 40)


def test_answers_that_are_cut_say_so(product: Product, slow_model: Path, tmp_path: Path) -> None:
    for lines in streams(product, slow_model, tmp_path, num_predict=900, drain="100ms"):
        assert "shutting down" in lines[-1]["error"]
        assert not any(line.get("done") for line in lines)
