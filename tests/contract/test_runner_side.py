"""Tokenize, detokenize and render, by a real runner process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from lmd.runner.v1 import frames_pb2
from tests.support.runner_client import RunnerProcess
from tests.support.tiny_models import BOS, CHATML, make_tiny_bert, make_tiny_llama, tiny_vocab, wordpieces

Failed = frames_pb2.Failed
Chat = frames_pb2.Chat
Turn = frames_pb2.ChatMessage

ID = tiny_vocab().id_of


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models")
    make_tiny_llama(directory / "tiny.gguf", chat_template=CHATML)
    make_tiny_llama(directory / "raw.gguf")
    make_tiny_bert(directory / "bert.gguf")
    return directory


@pytest.fixture(scope="module")
def tiny(models: Path) -> Iterator[RunnerProcess]:
    with RunnerProcess() as process:
        process.load(models / "tiny.gguf")
        yield process


@pytest.fixture
def runner() -> Iterator[RunnerProcess]:
    with RunnerProcess() as process:
        yield process


def tokenized(runner: RunnerProcess, text: str, **options: bool) -> frames_pb2.Tokenized:
    reply = runner.call(tokenize=frames_pb2.Tokenize(text=text, **options))
    assert reply.HasField("tokenized"), str(reply)
    return reply.tokenized


def detokenized(runner: RunnerProcess, *tokens: int) -> str:
    reply = runner.call(detokenize=frames_pb2.Detokenize(tokens=tokens))
    assert reply.HasField("detokenized"), str(reply)
    return reply.detokenized.text


def failed(reply: frames_pb2.RunnerFrame) -> frames_pb2.Failed:
    assert reply.HasField("failed"), str(reply)
    return reply.failed


@pytest.mark.parametrize(
    ("text", "options", "tokens", "pieces"),
    [
        ("the water", {}, [" the", " water"], [b" the", b" water"]),
        ("the water", {"add_special": True}, ["<s>", " the", " water"], [b"<s>", b" the", b" water"]),
        ("<|im_end|>", {}, ["<|im_end|>"], [b"<|im_end|>"]),
        # One character of four bytes, which no token has; a sentencepiece tokenizer puts a space before a text.
        ("🙂", {}, [" ", 0xF0, 0x9F, 0x99, 0x82], [b" ", b"\xf0", b"\x9f", b"\x99", b"\x82"]),
        ("", {}, [], []),
    ],
)
def test_tokens_of_a_text(
    tiny: RunnerProcess, text: str, options: dict[str, bool], tokens: list[str | int], pieces: list[bytes]
) -> None:
    reply = tokenized(tiny, text, **options)
    assert list(reply.tokens) == [ID(token) for token in tokens]
    assert list(reply.pieces) == pieces


def test_plain_text_names_no_special_token(tiny: RunnerProcess) -> None:
    reply = tokenized(tiny, "<|im_end|>", plain=True)
    assert ID("<|im_end|>") not in reply.tokens
    assert b"".join(reply.pieces) == b" <|im_end|>"


def test_text_comes_back(tiny: RunnerProcess) -> None:
    text = "the people went to 🙂 é漢 house!\n<|im_start|>"
    assert detokenized(tiny, *tokenized(tiny, text).tokens).strip() == text
    assert detokenized(tiny) == ""
    assert detokenized(tiny, BOS, ID(0xF0)) == "<s>\N{REPLACEMENT CHARACTER}"


def test_megabyte_is_tokenized_while_answers_go_on(tiny: RunnerProcess) -> None:
    text = "the water was great and the people went home " * 24_000
    answer = tiny.submit("the people", num_predict=50)
    reply = tokenized(tiny, text)
    assert len(reply.tokens) == len(reply.pieces) > 200_000
    assert detokenized(tiny, *reply.tokens).strip() == text.strip()
    assert tiny.answer(answer).done.generated_tokens == 50


@pytest.mark.parametrize(("tokens", "place"), [([-1], 0), ([5, 6, 99_999], 2), ([2**31 - 1], 0)])
def test_token_that_the_model_lacks(tiny: RunnerProcess, tokens: list[int], place: int) -> None:
    failure = failed(tiny.call(detokenize=frames_pb2.Detokenize(tokens=tokens)))
    assert (failure.kind, failure.field) == (Failed.KIND_INVALID, f"tokens[{place}]")
    assert str(tokens[place]) in failure.message


def test_encoder_has_a_tokenizer_too(runner: RunnerProcess, models: Path) -> None:
    runner.load(models / "bert.gguf")
    reply = tokenized(runner, "the water", add_special=True)
    pieces = wordpieces()
    assert list(reply.tokens) == [2, pieces.index("▁the"), pieces.index("▁water"), 3]
    assert "the water" in detokenized(runner, *reply.tokens)


def test_template_is_applied(tiny: RunnerProcess) -> None:
    chat = Chat(messages=[Turn(role="user", content="the water")])
    rendered = tiny.call(render=frames_pb2.Render(chat=chat)).rendered
    assert rendered.prompt == "<|im_start|>user\nthe water<|im_end|>\n<|im_start|>assistant\n"
    # What the engine would read: the model's first token is there, once.
    assert list(rendered.tokens[:2]) == [BOS, ID("<|im_start|>")]
    assert list(rendered.tokens).count(BOS) == 1
    assert b"".join(rendered.pieces[1:]).replace(b" ", b"") == rendered.prompt.replace(" ", "").encode()


def test_long_prompt_is_rendered_in_the_background(tiny: RunnerProcess) -> None:
    chat = Chat(messages=[Turn(role="user", content="the water " * 20_000)])
    rendered = tiny.call(render=frames_pb2.Render(chat=chat)).rendered
    assert len(rendered.tokens) == len(rendered.pieces) > 40_000


def test_template_that_fails_or_is_not_there(runner: RunnerProcess, models: Path) -> None:
    runner.load(models / "raw.gguf", template="{{ raise_exception('no') }}")
    call = frames_pb2.Render(chat=Chat(messages=[Turn(role="user", content="x")]))
    failure = failed(runner.call(render=call))
    assert (failure.kind, failure.message) == (Failed.KIND_TEMPLATE, "no")
    with RunnerProcess() as other:
        other.load(models / "raw.gguf")
        assert failed(other.call(render=call)).kind == Failed.KIND_NO_TEMPLATE


def test_render_that_is_taken_back_has_one_end(tiny: RunnerProcess) -> None:
    chat = Chat(messages=[Turn(role="user", content="the water " * 1000)])
    with tiny.paused():
        calls = [tiny.start_call(frames_pb2.DaemonFrame(render=frames_pb2.Render(chat=chat))) for _ in range(3)]
        tiny.cancel(calls[1])
    kinds = [tiny.reply(call).WhichOneof("frame") for call in calls]
    assert kinds == ["rendered", "failed", "rendered"]
    assert tiny.ping().queued == 0
