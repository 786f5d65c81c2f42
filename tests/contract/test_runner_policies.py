"""What requests can ask of a real runner beyond a prompt: several answers, policies, deadlines, being alone."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from lmd.runner.v1 import frames_pb2
from tests.support.runner_client import RunnerProcess
from tests.support.tiny_models import CHATML, make_scripted_llama, make_tiny_llama

Failed = frames_pb2.Failed
Finished = frames_pb2.Finished
STORY = "the people went to the house and saw that the water was great"
TRUNCATE, SHIFT = frames_pb2.CONTEXT_POLICY_TRUNCATE, frames_pb2.CONTEXT_POLICY_SHIFT


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models")
    make_tiny_llama(directory / "tiny.gguf", chat_template=CHATML)
    make_scripted_llama(directory / "loop.gguf", [" one", " two", " three", " four"], loop=True, n_ctx=8192)
    return directory


@pytest.fixture(scope="module")
def tiny(models: Path) -> Iterator[RunnerProcess]:
    with RunnerProcess() as process:
        process.load(models / "tiny.gguf", num_ctx=128)
        yield process


def test_several_answers_are_those_that_their_seeds_give_alone(tiny: RunnerProcess) -> None:
    alone = [
        tiny.ask(STORY, scope=f"alone {seed}", seed=seed, temperature=1.0, num_predict=12).text for seed in range(7, 13)
    ]
    together = tiny.answer(tiny.submit(STORY, seed=7, temperature=1.0, num_predict=12, options={"choices": 6}))
    assert [together.choice_text(number) for number in range(6)] == alone
    assert len(set(alone)) > 1
    assert [choice.generated_tokens for choice in together.done.choices] == [12] * 6
    assert together.done.generated_tokens == 72
    assert together.done.prompt_tokens < 40


def test_a_long_chat_loses_its_oldest_turns_and_says_so(tiny: RunnerProcess) -> None:
    chat = [("system", "be good")]
    for number in range(12):
        chat += [("user", f"number {number} {STORY}"), ("assistant", "yes")]
    chat.append(("user", "and now"))
    refused = tiny.answer(tiny.submit(chat=chat, num_predict=4))
    assert refused.failure.kind == Failed.KIND_CONTEXT_LENGTH
    assert refused.failure.prompt_tokens > refused.failure.context_tokens == 128
    cut = tiny.answer(tiny.submit(chat=chat, num_predict=4, options={"context_policy": TRUNCATE}))
    assert cut.done.dropped_messages > 0
    kept = chat[:1] + chat[1 + cut.done.dropped_messages :]
    assert kept[1][0] == "user"
    assert tiny.answer(tiny.submit(chat=kept, num_predict=4, scope="other")).text == cut.text


def test_what_cannot_be_dropped_is_still_too_long(tiny: RunnerProcess) -> None:
    chat = [("user", "one"), ("assistant", "two"), ("user", " ".join([STORY] * 20))]
    refused = tiny.answer(tiny.submit(chat=chat, options={"context_policy": TRUNCATE}))
    assert refused.failure.kind == Failed.KIND_CONTEXT_LENGTH


def test_a_raw_prompt_loses_its_beginning(tiny: RunnerProcess) -> None:
    cut = tiny.answer(tiny.submit(" ".join([STORY] * 20), num_predict=4, options={"context_policy": TRUNCATE}))
    assert cut.done.dropped_tokens > 0
    assert cut.done.prompt_tokens == 124


def test_an_answer_shifts_its_context_and_goes_on(models: Path) -> None:
    with RunnerProcess() as runner:
        ready = runner.load(models / "loop.gguf", num_ctx=32, slots=1)
        assert ready.shifts
        full = runner.ask("the people", num_predict=100)
        assert full.done.reason == Finished.REASON_LENGTH
        assert full.done.generated_tokens < 32
        long = runner.answer(runner.submit("the people", num_predict=100, options={"context_policy": SHIFT}))
        assert long.done.generated_tokens == 100
        assert long.done.shifted_tokens >= 60
        words = long.text.split()
        follows = {"one": "two", "two": "three", "three": "four", "four": "one"}
        assert all(follows[one] == other for one, other in itertools.pairwise(words))
        # What is left of a shifted context is not what its tokens would give: nobody may start from it.
        again = runner.ask("the people", num_predict=20)
        assert again.text == full.text[: len(again.text)]


def test_a_request_that_takes_too_long_ends_wherever_it_is(models: Path) -> None:
    with RunnerProcess() as runner:
        runner.load(models / "loop.gguf", num_ctx=8000, slots=1)
        running = runner.submit("the people", options={"timeout_ms": 300})
        waiting = runner.submit("the people", options={"timeout_ms": 100})
        assert runner.answer(waiting).failure.kind == Failed.KIND_DEADLINE
        assert runner.answers[waiting].started is None
        assert runner.answer(running).failure.kind == Failed.KIND_DEADLINE
        assert runner.answers[running].started is not None
        assert runner.ask("the people", num_predict=3).done.generated_tokens == 3


def test_those_who_wait_are_told_their_order(models: Path) -> None:
    with RunnerProcess() as runner:
        runner.load(models / "loop.gguf", num_ctx=8000, slots=1)
        blocker = runner.submit("the people", options={"caller": "a"})
        runner.until(lambda: runner.answers[blocker].started is not None)
        first, second = (runner.submit("the house", options={"caller": "a"}) for _ in range(2))
        other = runner.submit("the water", options={"caller": "b"})
        # Nobody of b was served anything yet.
        runner.until(lambda: runner.queue == [other, first, second])
        runner.cancel(blocker)
        runner.until(lambda: runner.answers[other].started is not None)
        runner.cancel(other)
        runner.until(lambda: runner.queue == [second])
        runner.cancel(first)
        runner.cancel(second)
        runner.until(lambda: runner.queue == [])


def test_an_answer_alone_is_the_same_in_company(tiny: RunnerProcess) -> None:
    alone = tiny.ask(STORY, num_predict=20, scope="alone").text
    others = [tiny.submit(f"{STORY} {word}", num_predict=60) for word in ("one", "two", "by")]
    mine = tiny.answer(tiny.submit(STORY, num_predict=20, deterministic=True, scope="alone"))
    assert mine.text == alone
    assert mine.done.cached_tokens == 0
    for other in others:
        tiny.answer(other)


def test_what_the_manifest_says_is_shared_and_the_rest_is_private(models: Path) -> None:
    system = ("system", " ".join([STORY] * 4))
    with RunnerProcess() as runner:
        manifest = frames_pb2.Chat(messages=[frames_pb2.ChatMessage(role=system[0], content=system[1])])
        runner.load(models / "tiny.gguf", num_ctx=256, manifest_chat=manifest)
        one = runner.ask(chat=[system, ("user", "where is the house")], scope="one", num_predict=2)
        other = runner.ask(chat=[system, ("user", "where is the house")], scope="other", num_predict=2)
        same = runner.ask(chat=[system, ("user", "where is the house")], scope="one", num_predict=2)
        assert one.done.cached_tokens == 0
        assert 50 < other.done.cached_tokens < other.done.prompt_tokens - 3
        assert same.done.cached_tokens == same.done.prompt_tokens - 1
        stats = runner.ping().stats
        assert stats.cached_tokens == other.done.cached_tokens + same.done.cached_tokens
        assert (stats.cache_hits, stats.cache_misses) == (2, 1)
        assert stats.prefixes >= 2
        assert 0 < stats.kv_used < stats.kv_size


def test_many_conversations_are_remembered_with_one_slot(models: Path) -> None:
    with RunnerProcess() as runner:
        runner.load(models / "tiny.gguf", num_ctx=256, slots=1)
        prompts = [f"{word} {STORY}" for word in ("one", "two", "first", "last")]
        for prompt in prompts:
            runner.ask(prompt, num_predict=1)
        again = [runner.ask(prompt, num_predict=1).done for prompt in prompts]
        assert all(done.cached_tokens == done.prompt_tokens - 1 for done in again)


def test_log_probabilities_are_those_of_the_model(tiny: RunnerProcess) -> None:
    answer = tiny.answer(tiny.submit(STORY, num_predict=5, options={"top_logprobs": 3}))
    assert len(answer.logprobs) == 5
    for report in answer.logprobs:
        assert report.logprob == report.top[0].logprob < 0
        assert report.id == report.top[0].id
        assert [top.logprob for top in report.top] == sorted((top.logprob for top in report.top), reverse=True)
    assert b"".join(report.token for report in answer.logprobs).decode() == answer.text


def test_looking_up_the_prompt_saves_steps_and_changes_no_token(models: Path) -> None:
    with RunnerProcess() as runner:
        runner.load(models / "loop.gguf", num_ctx=512)
        plain = runner.ask("the people", num_predict=100, scope="plain")
        guessed = runner.ask("the people", num_predict=100, prompt_lookup=True, draft_num_predict=-1, scope="guessed")
        assert guessed.text == plain.text
        assert guessed.done.accepted_tokens > 40
        assert guessed.done.drafted_tokens >= guessed.done.accepted_tokens


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_guesses_change_nothing_on_a_model_that_does_not_follow_them(tiny: RunnerProcess, temperature: float) -> None:
    prompt = " ".join([STORY] * 3)

    def answer(lookup: bool) -> str:
        return tiny.ask(
            prompt,
            scope=f"{temperature} {lookup}",
            temperature=temperature,
            seed=5,
            num_predict=60,
            prompt_lookup=lookup,
            draft_num_predict=-1,
        ).text

    assert answer(True) == answer(False)
