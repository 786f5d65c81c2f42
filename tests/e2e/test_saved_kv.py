"""Saved KV as a user meets it: a conversation goes on after a restart without being read again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.product import Product, wait_until

pytestmark = pytest.mark.e2e

PROMPT = "the house of the people was small and the water was great but they all went home " * 3
OPTIONS = ["-o", "temperature=0", "-o", "num_predict=8", "-o", "num_ctx=256"]


def ask(product: Product) -> Any:
    return product.json("run", "chat", PROMPT, *OPTIONS)


@pytest.fixture
def model(product: Product, tiny_chat: Path, tmp_path: Path) -> None:
    (tmp_path / "Modelfile").write_text(f"FROM {tiny_chat}\n")
    product.start()
    product.lm("create", "chat", "-f", str(tmp_path / "Modelfile"))


def saved(product: Product) -> list[Path]:
    return sorted((product.home / "store" / "kv").rglob("*.kv"))


def test_a_prompt_is_read_once_whatever_restarts(product: Product, model: None) -> None:
    first = ask(product)
    assert first["cached_tokens"] == 0
    product.lm("stop", "chat")
    assert len(saved(product)) == 1
    assert product.json("status")["usage"]["kv_bytes"] == saved(product)[0].stat().st_size
    assert "saved KV" in product.lm("status").stdout
    reloaded = ask(product)
    assert reloaded["cached_tokens"] > 0.9 * first["prompt_tokens"]
    assert product.daemons[-1].stop() == 0
    product.start()
    restarted = ask(product)
    assert restarted["cached_tokens"] == reloaded["cached_tokens"]
    assert first["response"] == reloaded["response"] == restarted["response"]


def test_rm_leaves_nothing_that_a_user_said(product: Product, model: None) -> None:
    ask(product)
    product.lm("stop", "chat")
    assert saved(product)
    product.lm("rm", "chat")
    wait_until(lambda: not list((product.home / "store" / "kv").iterdir()), "the saved KV is gone")


def test_rm_of_a_resident_model_saves_nothing(product: Product, model: None) -> None:
    ask(product)
    product.lm("rm", "chat")
    wait_until(lambda: not list((product.home / "store" / "kv").iterdir()), "the saved KV is gone")


def test_killing_the_daemon_or_the_runner_leaves_a_store_that_starts(product: Product, model: None) -> None:
    ask(product)
    product.lm("stop", "chat")
    ask(product)
    (file,) = saved(product)
    (file.parent / "unfinished.tmp").write_bytes(bytes(100))
    file.with_name("garbage.kv").write_bytes(b"garbage")
    product.daemons[-1].kill()
    product.start()
    assert ask(product)["cached_tokens"] > 0
    assert saved(product) == [file]
    wait_until(lambda: not list(file.parent.glob("*.tmp")), "the unfinished file is gone")


def test_zero_switches_it_off(product: Product, model: None) -> None:
    ask(product)
    assert product.daemons[-1].stop() == 0
    assert saved(product)
    product.start(LMD_RUNTIME_KV_DISK_BYTES="0")
    wait_until(lambda: not saved(product), "the saved KV is gone")
    assert ask(product)["cached_tokens"] == 0
    assert product.daemons[-1].stop() == 0
    assert not saved(product)
