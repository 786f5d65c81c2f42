"""Conversations that nobody goes on with leave the engine's memory while others are answered, and come back whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.runner_client import Answer, RunnerProcess
from tests.support.tiny_models import make_tiny_llama

WHO = ("house", "people", "water", "man", "child", "world", "school", "state", "family", "student")
COMMON = "once upon a time there was a story that many people knew and told each other at home " * 3


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("models") / "llama.gguf")


def story(who: str) -> str:
    return COMMON + f"the {who} was small and the {who} was old but the {who} went home with the other {who} " * 2


def continued(first: Answer, who: str) -> str:
    return story(who) + first.text + " and then"


def test_many_conversations_take_turns_and_none_is_read_again(model: Path) -> None:
    with RunnerProcess() as runner:
        ready = runner.load(model)
        firsts = {who: runner.ask(story(who), num_predict=20) for who in WHO}
        assert 0 < runner.ping().stats.parked_bytes <= ready.parked_bytes
        seconds = {who: runner.ask(continued(firsts[who], who), num_predict=20) for who in WHO}
    for who in WHO:
        with RunnerProcess() as runner:
            runner.load(model, kv_ram_bytes=0)
            fresh = runner.ask(continued(firsts[who], who), num_predict=20)
        assert seconds[who].text == fresh.text
        assert seconds[who].done.cached_tokens > firsts[who].done.prompt_tokens


def test_without_ram_they_stay_in_the_engines_memory(model: Path) -> None:
    with RunnerProcess() as runner:
        assert runner.load(model, kv_ram_bytes=0).parked_bytes == 0
        for who in WHO:
            runner.ask(story(who), num_predict=4)
        stats = runner.ping().stats
    assert stats.parked_bytes == 0
    assert stats.prefixes >= len(WHO)


def test_what_is_parked_is_saved_with_the_rest(model: Path, tmp_path: Path) -> None:
    with RunnerProcess() as runner:
        runner.load(model, kv_dir=tmp_path)
        firsts = {who: runner.ask(story(who), num_predict=20) for who in WHO}
        assert runner.ping().stats.parked_bytes > 0
        runner.drain(save_s=20)
        assert runner.wait() == 0, runner.log()
    with RunnerProcess() as runner:
        runner.load(model, kv_dir=tmp_path)
        for who in WHO:
            again = runner.ask(continued(firsts[who], who), num_predict=4)
            assert again.done.cached_tokens > firsts[who].done.prompt_tokens
