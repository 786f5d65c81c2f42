"""`lm embed`, `lm rerank` and `lm tokenize`, against a daemon on a real socket."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from lmd.cli.shapes import embeddings_json
from lmd.v1 import inference_service_pb2 as pb
from lmd.v1 import model_pb2
from lmd.v1.endpoint import home_socket
from tests.support.cli import Result, lm_process, terminal
from tests.support.fake_daemon import FakeDaemon, FakeFailure, not_found


@pytest.fixture
def daemon(lmd_home: Path) -> Iterator[FakeDaemon]:
    with FakeDaemon(home_socket(lmd_home)) as fake:
        fake.add("llama3:latest")
        fake.add("nomic:latest", capabilities=("embedding",))
        fake.add("ranker:latest", capabilities=("rerank",))
        yield fake


def inputs(daemon: FakeDaemon) -> list[list[str]]:
    return [list(request.inputs) for request in daemon.requests("Embed")]


def data(result: Result) -> Any:
    assert (result.code, result.err) == (0, ""), result
    return json.loads(result.out)


# lm embed


def test_vectors_for_people(daemon: FakeDaemon) -> None:
    result = lm_process("embed", "nomic", "hello there", "x\ty")
    assert result.code == 0
    header, first, second = result.out.splitlines()
    assert header.split() == ["TOKENS", "NUMBERS", "VECTOR", "TEXT"]
    assert first.split() == ["2", "4", "11.0000", "2.0000", "0.1250", "-1.0000", "hello", "there"]
    assert second.endswith("x y")


def test_vectors_for_programs(daemon: FakeDaemon) -> None:
    found = data(lm_process("embed", "--json", "nomic", "hello there", "x"))
    assert found == {
        "model": "nomic:latest",
        "embeddings": [[11, 2, 0.125, -1], [1, 1, 0.125, -1]],
        "tokens": [2, 1],
        "prompt_tokens": 3,
        "total_seconds": 0.05,
        "load_seconds": 0,
    }


def test_texts_come_from_arguments_lines_and_files_in_that_order(daemon: FakeDaemon, tmp_path: Path) -> None:
    whole = tmp_path / "whole.txt"
    whole.write_text("two\nlines\n")
    lm_process("embed", "nomic", "first", "-", "-f", str(whole), "last", stdin="one\n\ntwo\r\n")
    lm_process("embed", "nomic", stdin="only\nthese")
    lm_process("embed", "nomic", "argument", stdin="not read")
    assert inputs(daemon) == [["first", "one", "two", "last", "two\nlines\n"], ["only", "these"], ["argument"]]


def test_options_reach_the_daemon(daemon: FakeDaemon) -> None:
    options = ("--truncate", "--dimensions", "2", "--raw", "-o", "num_ctx=64", "--keep-alive", "-1")
    found = data(lm_process("embed", "--json", *options, "nomic", "x"))
    assert found["embeddings"] == [[1, 1]]
    [request] = daemon.requests("Embed")
    assert (request.truncate, request.dimensions, request.raw, request.parameters.num_ctx) == (True, 2, True, 64)
    [load] = daemon.requests("LoadModel")
    assert load.parameters.num_ctx == 64
    assert load.keep_alive.ToSeconds() == request.keep_alive.ToSeconds() == -1


def test_plain_call_leaves_everything_to_the_daemon(daemon: FakeDaemon) -> None:
    lm_process("embed", "nomic", "x")
    [request] = daemon.requests("Embed")
    assert not request.HasField("keep_alive")
    assert (request.truncate, request.dimensions, request.raw) == (False, 0, False)
    assert request.parameters == model_pb2.Parameters()


def test_many_texts_take_several_calls(daemon: FakeDaemon) -> None:
    found = data(lm_process("embed", "--json", "nomic", stdin="\n".join(f"text {n}" for n in range(5000))))
    assert [len(call) for call in inputs(daemon)] == [2048, 2048, 904]
    assert [values[0] for values in found["embeddings"]] == [len(f"text {n}") for n in range(5000)]
    assert (found["prompt_tokens"], found["total_seconds"]) == (10_000, pytest.approx(0.15))


def test_long_texts_take_several_calls(daemon: FakeDaemon) -> None:
    found = data(lm_process("embed", "--json", "nomic", stdin="\n".join("x" * 1_000_000 for _ in range(5))))
    assert [len(call) for call in inputs(daemon)] == [2, 2, 1]
    assert len(found["embeddings"]) == 5


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("embed", "nomic"), "no text"),
        (("embed", "nomic", "x", "--dimensions", "0"), "0"),
        (("embed", "nomic", "x", "-o", "nonsense=1"), "nonsense"),
        (("embed", "nomic", "-f", "/nowhere"), "/nowhere"),
        (("rerank", "ranker", "query"), "no document"),
        (("tokenize", "llama3", "x", "--chat", "--plain"), "--plain"),
        (("tokenize", "llama3", "x", "--decode", "--ids"), "--ids"),
        (("tokenize", "llama3", "x", "--decode"), "`x`"),
        (("tokenize", "llama3", "", "--decode"), "no id"),
        (("tokenize", "llama3", "99999999999", "--decode"), "99999999999"),
        (("tokenize", "llama3", "x", "--system", "y"), "--chat"),
        (("tokenize", "llama3", "x", "--tokens"), "--chat"),
        (("tokenize", "llama3", "x", "--chat", "--tokens", "--ids"), "--ids"),
        (("tokenize", "llama3", "x", "--chat", "--tokens", "--json"), "--json"),
        (("tokenize", "llama3", "x", "--json", "--ids"), "--ids"),
    ],
)
def test_usage_that_makes_no_sense_calls_nobody(daemon: FakeDaemon, args: tuple[str, ...], message: str) -> None:
    result = lm_process(*args, stdin="")
    assert result.code == 2
    assert message in result.err
    assert not {"Embed", "Rerank", "Tokenize", "Detokenize", "LoadModel"} & {name for name, _ in daemon.calls}


def test_stdin_that_is_no_text(daemon: FakeDaemon, tmp_path: Path) -> None:
    path = tmp_path / "bytes"
    path.write_bytes(b"ab\xff")
    result = lm_process("embed", "nomic", "-f", str(path))
    assert (result.code, "byte 2" in result.err) == (2, True)


def test_errors_of_the_daemon(daemon: FakeDaemon) -> None:
    daemon.failures["Embed"] = FakeFailure(
        grpc.StatusCode.INVALID_ARGUMENT,
        "CONTEXT_LENGTH_EXCEEDED",
        "a text has 900 tokens, the context holds 512",
        hint="shorten it, set `truncate` to cut its end",
    )
    result = lm_process("embed", "nomic", "x")
    assert result.code == 1
    assert "900 tokens" in result.err
    daemon.failures["GetModel"] = not_found("nothing")
    daemon.pull = lambda *_: (_ for _ in ()).throw(not_found("nothing"))
    assert lm_process("embed", "nothing", "x").code == 1


def test_terminal_shows_what_is_done_and_cleans_up(daemon: FakeDaemon) -> None:
    with terminal("embed", "nomic", "x" * 200, columns=60) as screen:
        screen.expect("TEXT")
        assert screen.wait() == 0
        assert "…" in screen.rest()


# lm rerank


def test_ranking_for_people(daemon: FakeDaemon) -> None:
    result = lm_process("rerank", "ranker", "why?", "short", "the longest of all", "longer", "--top", "2")
    assert [line.split(maxsplit=2) for line in result.out.splitlines()] == [
        ["SCORE", "INDEX", "DOCUMENT"],
        ["2.2500", "1", "the longest of all"],
        ["0.7500", "2", "longer"],
    ]
    [request] = daemon.requests("Rerank")
    assert (request.query, request.top_n, request.truncate) == ("why?", 2, False)


def test_ranking_for_programs(daemon: FakeDaemon) -> None:
    found = data(lm_process("rerank", "--json", "--truncate", "ranker", "why?", stdin="a\nbbb\n"))
    assert found["results"] == [
        {"index": 1, "score": 0.375, "document": "bbb"},
        {"index": 0, "score": 0.125, "document": "a"},
    ]
    assert found["prompt_tokens"] == 2
    assert daemon.requests("Rerank")[0].truncate


def test_more_documents_than_can_be_ranked_at_once(daemon: FakeDaemon) -> None:
    result = lm_process("rerank", "ranker", "why?", stdin="x\n" * 2049)
    assert (result.code, "2049" in result.err) == (2, True)


# lm tokenize


def test_tokens_for_people(daemon: FakeDaemon) -> None:
    result = lm_process("tokenize", "llama3", ' "é\n')
    assert result.out.splitlines() == [
        " ID  TEXT",
        ' 32  " "',
        ' 34  "\\""',
        '195  "\\xc3"',
        '169  "\\xa9"',
        ' 10  "\\n"',
    ]
    assert result.err == "5 tokens\n"


def test_tokens_for_programs(daemon: FakeDaemon) -> None:
    result = lm_process("tokenize", "--ids", "--special", "--plain", "llama3", stdin="ab")
    assert (result.out, result.err) == ("1 97 98\n", "3 tokens\n")
    [request] = daemon.requests("Tokenize")
    assert (request.add_special, request.plain) == (True, True)
    found = data(lm_process("tokenize", "--json", "llama3", "é"))
    assert found["tokens"] == [
        {"id": 0xC3, "bytes": [0xC3], "text": None},
        {"id": 0xA9, "bytes": [0xA9], "text": None},
    ]
    assert "prompt" not in found


def test_text_of_tokens(daemon: FakeDaemon) -> None:
    for ids in ("104, 105", "[104,105]", "104 105"):
        assert lm_process("tokenize", "--decode", "llama3", ids).out == "hi"
    assert data(lm_process("tokenize", "--decode", "--json", "llama3", stdin="104 105")) == {
        "model": "llama3:latest",
        "text": "hi",
    }


def test_prompt_that_the_template_makes(daemon: FakeDaemon) -> None:
    result = lm_process("tokenize", "--chat", "llama3", "hello", "--system", "be brief")
    assert (result.out, result.err) == ("<system>be brief\n<user>hello\n", "2 tokens\n")
    assert lm_process("tokenize", "--chat", "--ids", "llama3", "hello").out == "12\n"
    listed = lm_process("tokenize", "--chat", "--tokens", "llama3", "hello").out
    assert listed == '<user>hello\n\nID  TEXT\n12  "<user>hello\\n"\n'
    found = data(lm_process("tokenize", "--chat", "--json", "llama3", "hello"))
    assert found["prompt"] == "<user>hello\n"
    assert found["tokens"] == [{"id": 12, "bytes": list(b"<user>hello\n"), "text": "<user>hello\n"}]


def test_numbers_keep_their_digits(daemon: FakeDaemon) -> None:
    """JSON gets what the wire's 32 bits hold, no more and no less."""
    reply = pb.EmbedResponse(embeddings=[pb.Embedding(values=[math.pi, 1 / 3, 1e-20])])
    shaped = json.loads(json.dumps(embeddings_json("m", [reply])))
    assert shaped["embeddings"] == [[3.14159274, 0.333333343, 9.99999968e-21]]
    assert list(pb.Embedding(values=shaped["embeddings"][0]).values) == list(reply.embeddings[0].values)
