"""`lm run` for one prompt, against a daemon on a real socket."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from lmd.v1 import inference_service_pb2 as pb
from lmd.v1 import model_service_pb2 as model_pb
from lmd.v1.endpoint import home_socket
from tests.support.cli import command, environment, lm_process, terminal
from tests.support.fake_daemon import FakeDaemon, FakeFailure, Gate, not_found, text_events


@pytest.fixture
def daemon(lmd_home: Path) -> Iterator[FakeDaemon]:
    with FakeDaemon(home_socket(lmd_home)) as fake:
        fake.add("llama3:latest")
        fake.add("stories:latest", capabilities=("completion",))
        yield fake


def test_a_prompt_is_answered_in_plain_text(daemon: FakeDaemon) -> None:
    daemon.chat = lambda *_: text_events(pb.ChatResponse, "**bold**\n\n* x")
    result = lm_process("run", "llama3", "hello", "there")
    assert (result.code, result.out, result.err) == (0, "**bold**\n\n* x\n", "")
    [request] = daemon.requests("Chat")
    assert [(m.role, m.content) for m in request.messages] == [("user", "hello there")]
    assert not request.HasField("keep_alive")


def test_what_is_piped_in_comes_before_the_prompt(daemon: FakeDaemon) -> None:
    lm_process("run", "llama3", "Summarise:", stdin="notes\n\n")
    lm_process("run", "llama3", stdin="only this")
    first, second = daemon.requests("Chat")
    assert first.messages[0].content == "notes\n\nSummarise:"
    assert second.messages[0].content == "only this"


def test_a_terminal_of_another_session_is_left_alone(daemon: FakeDaemon) -> None:
    """`setsid lm run …` has a terminal as its input and does not own it; it once ended with a traceback (ENOTTY)."""
    daemon.chat = lambda *_: text_events(pb.ChatResponse, "fine")
    master, slave = os.openpty()
    try:
        done = subprocess.run(
            command("run", "llama3", "hi"),
            stdin=slave,
            capture_output=True,
            text=True,
            env=environment(),
            start_new_session=True,
            timeout=30,
        )
    finally:
        os.close(master)
        os.close(slave)
    assert (done.returncode, done.stdout, done.stderr) == (0, "fine\n", "")


def test_scales_of_adapters_reach_the_daemon(daemon: FakeDaemon) -> None:
    lm_process("run", "llama3", "--adapter", "pirate=0.5", "--adapter", "a=b.gguf=-1", "--adapter", "2=0", "hi")
    [request] = daemon.requests("Chat")
    assert dict(request.options.adapters) == {"pirate": 0.5, "a=b.gguf": -1.0, "2": 0.0}


@pytest.mark.parametrize("text", ["pirate", "pirate=", "=1", "pirate=much", "pirate=nan"])
def test_a_scale_that_is_none_is_a_usage_error(daemon: FakeDaemon, text: str) -> None:
    result = lm_process("run", "llama3", "--adapter", text, "hi")
    assert (result.code, result.out) == (2, "")
    assert "is not NAME=SCALE" in result.err
    assert daemon.requests("Chat") == []


def test_options_reach_the_daemon(daemon: FakeDaemon) -> None:
    lm_process(
        "run", "llama3", "-o", "temperature=0", "-o", "num_predict=60", "-o", "stop=a", "-o", "stop=b",
        "--system", "Be kind.", "--keep-alive", "-1", "hi",
    )  # fmt: skip
    [request] = daemon.requests("Chat")
    assert request.parameters.HasField("temperature")
    assert request.parameters.num_predict == 60
    assert list(request.parameters.stop) == ["a", "b"]
    assert [m.role for m in request.messages] == ["system", "user"]
    assert request.keep_alive.seconds == -1


def test_a_model_without_a_chat_template_is_completed(daemon: FakeDaemon) -> None:
    result = lm_process("run", "stories", "Once upon a time", "--system", "")
    assert result.out == " and they lived happily\n"
    [request] = daemon.requests("Generate")
    assert (request.model, request.prompt, request.raw) == ("stories:latest", "Once upon a time", False)
    assert request.HasField("system")


def test_raw_completes_also_a_model_that_chats(daemon: FakeDaemon) -> None:
    lm_process("run", "--raw", "llama3", "Once")
    assert daemon.requests("Generate")[0].raw
    assert not daemon.requests("Chat")


def test_json_is_one_object_at_the_end(daemon: FakeDaemon) -> None:
    result = lm_process("run", "--json", "llama3", "hi")
    answer = json.loads(result.out)
    assert answer["response"] == "You said: hi"
    assert answer["finish_reason"] == "stop"
    assert answer["prompt_tokens"] == 12
    assert answer["generate_seconds"] == 0.4
    assert answer["seed"] == 7


def test_timings_go_to_stderr(daemon: FakeDaemon) -> None:
    result = lm_process("run", "--verbose", "llama3", "hi")
    assert result.out == "You said: hi\n"
    assert "prompt  8 of 12 tokens computed in 100ms, 80.0 tokens/s, 4 reused" in result.err
    assert "answer  3 tokens in 400ms, 7.5 tokens/s" in result.err


def test_a_missing_model_is_pulled_first(daemon: FakeDaemon) -> None:
    result = lm_process("run", "hf.co/test/new", "hi")
    assert (result.code, result.out) == (0, "You said: hi\n")
    assert "pulling hf.co/test/new:latest\n" in result.err
    assert "pulled hf.co/test/new:latest  1.13 MiB in " in result.err
    assert daemon.requests("Chat")[0].model == "hf.co/test/new:latest"


def test_other_failures_do_not_pull(daemon: FakeDaemon) -> None:
    daemon.failures["GetModel"] = FakeFailure(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_MODEL_REF", "bad name")
    assert lm_process("run", "..", "hi").code == 2
    assert not daemon.requests("PullModel")


def test_an_unknown_name_says_so_once(daemon: FakeDaemon) -> None:
    def refuse(*_: Any) -> Iterator[model_pb.PullModelResponse]:
        raise not_found("lama3")
        yield

    daemon.pull = refuse
    result = lm_process("run", "lama3", "hi")
    assert (result.code, result.out) == (1, "")
    assert result.err.startswith("error: model `lama3` not found")


def test_a_failure_in_the_middle_keeps_what_came(daemon: FakeDaemon) -> None:
    def die(*_: Any) -> Iterator[pb.ChatResponse]:
        yield pb.ChatResponse(delta=pb.TextDelta(text="half an"))
        raise FakeFailure(grpc.StatusCode.INTERNAL, "RUNNER_CRASHED", "the runner died", log="boom", hint="run again")

    daemon.chat = die
    result = lm_process("run", "llama3", "hi")
    assert (result.code, result.out) == (1, "half an\n")
    assert result.err == "error: the runner died\n\n  the last lines of its log:\n    boom\n\nhint: run again\n"


def test_a_stream_without_an_end_is_an_error(daemon: FakeDaemon) -> None:
    daemon.chat = lambda *_: iter([pb.ChatResponse(delta=pb.TextDelta(text="x"))])
    assert "without a result" in lm_process("run", "llama3", "hi").err


@pytest.mark.parametrize(("options", "said"), [([], True), (["-o", "num_predict=3"], False)])
def test_an_answer_that_runs_out_of_room_says_so(daemon: FakeDaemon, options: list[str], said: bool) -> None:
    def script(*_: Any) -> Iterator[Any]:
        *texts, last = text_events(pb.ChatResponse, "ten letters", size=4)
        last.done.finish_reason = pb.AnswerDone.FINISH_REASON_LENGTH
        return iter([*texts, last])

    daemon.chat = script
    result = lm_process("run", *options, "llama3", "hi")
    assert (result.code, result.out) == (0, "ten letters\n")
    assert ("the context is full" in result.err) is said


def test_an_empty_prompt_only_loads(daemon: FakeDaemon) -> None:
    result = lm_process("run", "-o", "num_ctx=64", "--keep-alive", "1h", "llama3", "")
    assert (result.code, result.out, result.err) == (0, "", "loaded llama3:latest\n")
    [request] = daemon.requests("LoadModel")
    assert (request.parameters.num_ctx, request.keep_alive.seconds) == (64, 3600)


def test_nothing_to_answer_is_a_mistake(daemon: FakeDaemon) -> None:
    result = lm_process("run", "llama3")
    assert result.code == 2
    assert "no prompt" in result.err


def test_bytes_that_are_no_text_are_a_mistake(daemon: FakeDaemon) -> None:
    done = subprocess.run(
        command("run", "llama3"), input=b"\xff\xfe\xfa", capture_output=True, env=environment(), check=False
    )
    assert done.returncode == 2
    assert b"stdin is not text" in done.stderr
    done = subprocess.run(command(b"run", b"m\xff"), capture_output=True, env=environment(), check=False)  # type: ignore[arg-type]
    assert done.returncode == 2
    assert b"is not text in UTF-8" in done.stderr


def test_text_arrives_before_the_answer_ends(daemon: FakeDaemon) -> None:
    gate = Gate()

    def script(_request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        yield pb.ChatResponse(delta=pb.TextDelta(text="early"))
        gate.wait(context)
        yield from text_events(pb.ChatResponse, " late")

    daemon.chat = script
    running = subprocess.Popen(
        command("run", "llama3", "hi"), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, env=environment()
    )
    assert running.stdout is not None
    assert os.read(running.stdout.fileno(), 100) == b"early"
    gate.opened.set()
    assert running.stdout.read() == b" late\n"
    running.stdout.close()
    assert running.wait(30) == 0


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_hangs_up_and_keeps_what_came(daemon: FakeDaemon, sent: signal.Signals, code: int) -> None:
    gate = Gate()

    def script(_request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        yield pb.ChatResponse(delta=pb.TextDelta(text="early"))
        gate.wait(context)

    daemon.chat = script
    running = subprocess.Popen(
        command("run", "llama3", "hi"),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
    )
    assert running.stdout is not None
    assert os.read(running.stdout.fileno(), 100) == b"early"
    assert gate.reached.wait(10)
    running.send_signal(sent)
    out, err = running.communicate(timeout=30)
    assert (running.returncode, out, err) == (code, b"\n", b"")
    assert gate.hung_up.wait(10)


def test_a_terminal_gets_markdown_and_a_word_about_the_load(daemon: FakeDaemon) -> None:
    gate = Gate()

    def script(_request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        from lmd.v1 import runtime_service_pb2 as runtime_pb

        yield pb.ChatResponse(waiting=pb.Waiting(load=runtime_pb.LoadProgress(fraction=0.42)))
        gate.wait(context)
        yield from text_events(pb.ChatResponse, "# Title\n\nSome **bold** text\n")

    daemon.chat = script
    with terminal("run", "llama3", "hi") as screen:
        screen.expect("loading llama3:latest 42%")
        assert not screen.is_echoing()
        gate.opened.set()
        screen.expect(r"Title\s+Some bold text")
        assert screen.wait() == 0
        assert screen.is_echoing()
    assert "\x1b[?25h" in screen.raw.rpartition("\x1b[?25l")[2]


def test_no_color_and_a_dumb_terminal(daemon: FakeDaemon) -> None:
    daemon.chat = lambda *_: text_events(pb.ChatResponse, "# Title\n\nSome **bold** text\n")
    with terminal("run", "llama3", "hi", env={"NO_COLOR": "1"}) as screen:
        assert screen.wait() == 0
        assert "bold text" in screen.rest()
        assert not re.search(r"\x1b\[[0-9;]+m", screen.raw)


# Options of an answer


def test_options_of_an_answer_reach_the_daemon(daemon: FakeDaemon) -> None:
    lm_process(
        "run", "llama3", "--context", "shift", "--timeout", "1.5s", "--priority", "batch", "--format", "json", "hi"
    )  # fmt: skip
    lm_process("run", "stories", "--context", "truncate", "--format", "regex:(yes|no)", "hi")
    lm_process("run", "llama3", "hi")
    chat, plain = daemon.requests("Chat")
    assert chat.options.context_policy == pb.CONTEXT_POLICY_SHIFT
    assert chat.options.timeout.ToMilliseconds() == 1500
    assert chat.options.priority == pb.PRIORITY_BATCH
    assert chat.options.format.json_object
    assert plain.options == pb.AnswerOptions()
    [generate] = daemon.requests("Generate")
    assert generate.options.format.regex == "(yes|no)"
    assert generate.options.context_policy == pb.CONTEXT_POLICY_TRUNCATE


def test_formats_are_read_from_files(daemon: FakeDaemon, tmp_path: Path) -> None:
    schema, grammar = tmp_path / "person.json", tmp_path / "list.gbnf"
    schema.write_text('{"type": "object"}\n')
    grammar.write_text('root ::= "x"\n')
    for text in (str(schema), str(grammar), ' {"type": "string"}'):
        assert lm_process("run", "llama3", "--format", text, "hi").code == 0
    first, second, third = (request.options.format for request in daemon.requests("Chat"))
    assert first.json_schema == '{"type": "object"}\n'
    assert second.gbnf == 'root ::= "x"\n'
    assert third.json_schema == '{"type": "string"}'


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "there is no file `schema.json`"),
        (b"", "`schema.json` is empty"),
        (b'{\n  "type": }', "`schema.json` is not JSON: Expecting value at line 2, column 11"),
        (b"[1]", "`schema.json` is no JSON Schema: it is not an object"),
        (b"\xff\xfe", "`schema.json` is not text: invalid start byte at byte 0"),
        (b"[" * 200_000, "is nested too deeply"),
        (b" " * 300_000, "larger than 256 KiB"),
    ],
)
def test_a_schema_that_is_none_is_a_mistake(
    daemon: FakeDaemon, tmp_path: Path, content: bytes | None, says: str
) -> None:
    path = tmp_path / "schema.json"
    if content is not None:
        path.write_bytes(content)
    result = lm_process("run", "llama3", "--format", str(path), "hi")
    assert (result.code, result.out) == (2, "")
    assert says in result.err.replace(str(path), "schema.json")
    assert not daemon.calls or daemon.calls[-1][0] != "Chat"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--format", "yaml", "hi"], "`yaml` is no format"),
        (["--format", "regex:", "hi"], "no expression after `regex:`"),
        (["--format", "{", "hi"], "the schema is not JSON"),
        (["--timeout", "0", "hi"], "`--timeout` must be longer than 0"),
        (["--timeout", "-1", "hi"], "`--timeout` must be longer than 0"),
        (["--logprobs", "3", "hi"], "`--logprobs` needs `--json`"),
        (["--choices", "2", "--interactive"], "`--choices` needs a PROMPT"),
        (["--choices", "17", "hi"], "17 is not in the range"),
        (["--context", "cut", "hi"], "'cut' is not one of"),
    ],
)
def test_options_that_make_no_sense(daemon: FakeDaemon, options: list[str], says: str) -> None:
    result = lm_process("run", "llama3", *options)
    assert result.code == 2
    assert says in result.err
    assert not daemon.requests("Chat")


def test_several_answers_stand_under_rules(daemon: FakeDaemon) -> None:
    result = lm_process("run", "llama3", "--choices", "3", "hi")
    assert (result.code, result.err) == (0, "")
    assert (
        result.out == "--- 1 of 3 ---\nYou said: hi\n--- 2 of 3 ---\n1 You said: hi\n--- 3 of 3 ---\n2 You said: hi\n"
    )


def test_several_answers_as_json(daemon: FakeDaemon) -> None:
    answer = json.loads(lm_process("run", "--json", "llama3", "--choices", "2", "--logprobs", "1", "hi").out)
    assert [choice["text"] for choice in answer["choices"]] == ["You said: hi", "1 You said: hi"]
    assert answer["response"] == "You said: hi"
    assert [choice["generated_tokens"] for choice in answer["choices"]] == [3, 3]
    assert answer["generated_tokens"] == 6
    [token] = answer["choices"][0]["logprobs"][:1]
    assert token == {
        "id": 5,
        "token": "\ufffd",
        "bytes": [0xC3],
        "logprob": -0.25,
        "top": [{"id": 6, "token": "b", "bytes": [98], "logprob": None}],
    }
    plain = json.loads(lm_process("run", "--json", "llama3", "hi").out)
    assert plain["choices"] == [
        {"text": "You said: hi", "thinking": "", "finish_reason": "stop", "generated_tokens": 3, "stop": ""}
    ]


def test_what_was_left_out_is_said(daemon: FakeDaemon) -> None:
    daemon.chat = lambda *_: text_events(pb.ChatResponse, "fine", dropped_messages=3, shifted_tokens=512)
    result = lm_process("run", "--json", "--context", "shift", "llama3", "hi")
    assert "the context is too short: the first 3 messages were left out" in result.err
    assert "512 tokens were left out while answering" in result.err
    answer = json.loads(result.out)
    assert (answer["dropped_messages"], answer["shifted_tokens"]) == (3, 512)


def test_acceptance_of_drafts_is_printed(daemon: FakeDaemon) -> None:
    daemon.chat = lambda *_: text_events(pb.ChatResponse, "fine", drafted_tokens=40, accepted_tokens=31)
    assert "draft   40 tokens, 31 accepted (78%)" in lm_process("run", "--verbose", "llama3", "hi").err
    daemon.chat = lambda *_: text_events(pb.ChatResponse, "fine")
    assert "draft" not in lm_process("run", "--verbose", "llama3", "hi").err


def test_time_that_is_up_is_a_failure(daemon: FakeDaemon) -> None:
    daemon.failures["Chat"] = FakeFailure(
        grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED", "the request was not done within 3 s", timeout_s="3"
    )
    result = lm_process("run", "--timeout", "3s", "llama3", "hi")
    assert result.code == 1
    assert result.err.startswith("error: the request was not done within 3 s\n")


def test_place_in_the_queue_is_shown(daemon: FakeDaemon) -> None:
    gate = Gate()

    def script(_request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        yield pb.ChatResponse(waiting=pb.Waiting(queue_position=3))
        gate.wait(context)
        yield from text_events(pb.ChatResponse, "at last")

    daemon.chat = script
    with terminal("run", "llama3", "hi") as screen:
        screen.expect("waiting, 3 requests before this one")
        gate.opened.set()
        screen.expect("at last")
        assert screen.wait() == 0


def _thoughtful(*_: Any) -> Iterator[pb.ChatResponse]:
    for thinking in ("Is ice ", "wet?"):
        yield pb.ChatResponse(delta=pb.TextDelta(thinking=thinking))
    yield from text_events(pb.ChatResponse, "It is.")


def test_thoughts_go_to_stderr(daemon: FakeDaemon) -> None:
    daemon.chat = _thoughtful
    result = lm_process("run", "llama3", "hi")
    assert (result.code, result.out) == (0, "It is.\n")
    assert result.err == "--- thinking ---\nIs ice wet?\n--- answer ---\n"
    result = lm_process("run", "--hide-thinking", "llama3", "hi")
    assert (result.out, result.err) == ("It is.\n", "")
    answer = json.loads(lm_process("run", "--json", "llama3", "hi").out)
    assert (answer["thinking"], answer["response"]) == ("Is ice wet?", "It is.")


def test_thoughts_are_faint_on_a_terminal(daemon: FakeDaemon) -> None:
    daemon.chat = _thoughtful
    with terminal("run", "llama3", "hi") as screen:
        screen.expect("It is.")
        assert screen.wait() == 0
        assert re.search(r"\x1b\[2m--- thinking ---\x1b\[0m\s+\x1b\[2mIs", screen.raw)
        assert re.search(r"\x1b\[2mwet\?\x1b\[0m", screen.raw)
        assert re.search(r"\x1b\[2m--- answer ---\x1b\[0m\r\n", screen.raw)
        assert "\x1b[2mIt" not in screen.raw


@pytest.mark.parametrize(
    ("arguments", "think"),
    [
        (("llama3", "hi"), pb.THINK_UNSPECIFIED),
        (("--think", "llama3", "hi"), pb.THINK_ON),
        (("llama3", "hi", "--think"), pb.THINK_ON),
        (("--think", "high", "llama3", "hi"), pb.THINK_HIGH),
        (("--think=low", "llama3", "hi"), pb.THINK_LOW),
        (("--no-think", "llama3", "hi"), pb.THINK_OFF),
        (("llama3", "--", "--think"), pb.THINK_UNSPECIFIED),
    ],
)
def test_whether_to_think_reaches_the_daemon(
    daemon: FakeDaemon, arguments: tuple[str, ...], think: pb.Think.ValueType
) -> None:
    assert lm_process("run", *arguments).code == 0
    [request] = daemon.requests("Chat")
    assert request.think == think
    assert [message.content for message in request.messages] == [arguments[-1] if "hi" not in arguments else "hi"]


def test_to_think_and_not_to_think_is_refused(daemon: FakeDaemon) -> None:
    result = lm_process("run", "--think", "--no-think", "llama3", "hi")
    assert result.code == 2
    assert "do not go together" in result.err
    assert lm_process("run", "--think=much", "llama3", "hi").code == 2
    assert not daemon.requests("Chat")
