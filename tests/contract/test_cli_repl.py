"""The interactive session, driven through a terminal."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from lmd.v1 import inference_service_pb2 as pb
from lmd.v1 import model_pb2
from lmd.v1.endpoint import home_socket
from tests.support.cli import Terminal, command, environment, lm_process, terminal
from tests.support.fake_daemon import FakeDaemon, FakeFailure, Gate, text_events

_PROMPT = ">>> "


@pytest.fixture
def daemon(lmd_home: Path) -> Iterator[FakeDaemon]:
    with FakeDaemon(home_socket(lmd_home)) as fake:
        fake.add("llama3:latest")
        fake.add("stories:latest", capabilities=("completion",))
        yield fake


@pytest.fixture
def chat(daemon: FakeDaemon) -> Iterator[Terminal]:
    with terminal("run", "llama3", columns=100) as screen:
        screen.expect(_PROMPT)
        yield screen


def _say(screen: Terminal, line: str, expected: str) -> None:
    screen.type(f"{line}\r")
    screen.expect(expected)
    screen.expect(_PROMPT)


def _contents(request: pb.ChatRequest) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in request.messages]


def test_a_conversation_remembers_what_was_said(daemon: FakeDaemon, chat: Terminal) -> None:
    assert len(daemon.requests("LoadModel")) == 1
    _say(chat, "hello", "You said: hello")
    _say(chat, "again", "You said: again")
    chat.type("/bye\r")
    assert chat.wait() == 0
    assert _contents(daemon.requests("Chat")[1]) == [
        ("user", "hello"),
        ("assistant", "You said: hello"),
        ("user", "again"),
    ]


def test_three_quotes_begin_and_end_a_message_of_several_lines(daemon: FakeDaemon, chat: Terminal) -> None:
    chat.type('"""one\r')
    chat.expect(r"\.\.\.")
    chat.type("  two\r")
    chat.expect(r"\.\.\.")
    chat.type('three"""\r')
    chat.expect("You said: one")
    assert daemon.requests("Chat")[0].messages[0].content == "one\n  two\nthree"


def test_ctrl_c_stops_the_answer_and_not_the_session(daemon: FakeDaemon, chat: Terminal) -> None:
    gate, echo = Gate(), daemon.chat

    def script(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        yield pb.ChatResponse(delta=pb.TextDelta(text="half an answer"))
        gate.wait(context)

    daemon.chat = script
    chat.type("long\r")
    chat.expect("half an answer")
    assert gate.reached.wait(10)
    chat.type("\x03")
    chat.expect("stopped")
    chat.expect(_PROMPT)
    assert gate.hung_up.wait(10)
    daemon.chat = echo
    _say(chat, "next", "You said: next")
    assert _contents(daemon.requests("Chat")[1]) == [
        ("user", "long"),
        ("assistant", "half an answer"),
        ("user", "next"),
    ]


def test_ctrl_c_before_the_first_word_forgets_the_message(daemon: FakeDaemon, chat: Terminal) -> None:
    gate, echo = Gate(), daemon.chat

    def script(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        yield pb.ChatResponse(waiting=pb.Waiting(queue_position=3))
        gate.wait(context)

    daemon.chat = script
    chat.type("never mind\r")
    chat.expect("waiting, 3 requests before this one")
    chat.type("\x03")
    chat.expect("stopped")
    chat.expect(_PROMPT)
    daemon.chat = echo
    _say(chat, "next", "You said: next")
    assert _contents(daemon.requests("Chat")[1]) == [("user", "next")]


def test_ctrl_c_at_the_prompt_says_how_to_leave_and_ctrl_d_leaves(chat: Terminal) -> None:
    chat.type("half a line\x03")
    chat.expect("Ctrl-D or /bye leaves")
    chat.expect(_PROMPT)
    chat.type("\x04")
    assert chat.wait() == 0


def test_an_error_ends_the_answer_and_not_the_session(daemon: FakeDaemon, chat: Terminal) -> None:
    daemon.failures["Chat"] = FakeFailure(
        grpc.StatusCode.INVALID_ARGUMENT, "CONTEXT_LENGTH_EXCEEDED", "the prompt is too long", hint="shorten it"
    )
    _say(chat, "long", r"error: the prompt is too long\s+hint: shorten it")
    _say(chat, "short", "You said: short")
    assert _contents(daemon.requests("Chat")[1]) == [("user", "short")]


def test_a_conversation_that_is_too_long_can_be_forgotten(daemon: FakeDaemon, chat: Terminal) -> None:
    """Every further message failed with "shorten the prompt", which nobody can do with what was said before."""
    _say(chat, "hello", "You said: hello")
    daemon.failures["Chat"] = FakeFailure(
        grpc.StatusCode.INVALID_ARGUMENT, "CONTEXT_LENGTH_EXCEEDED", "the prompt is too long", hint="shorten it"
    )
    _say(chat, "more", r"error: the prompt is too long\s+hint: `/clear` forgets the conversation")


def test_settings_reach_the_next_request(daemon: FakeDaemon, chat: Terminal) -> None:
    _say(chat, "/set parameter temperature 0.2", "temperature is 0.2")
    _say(chat, '/set parameter stop "a b" c', "stop is a b c")
    _say(chat, "/set system Be kind.", "system prompt set")
    _say(chat, "/set verbose", "timings are printed")
    _say(chat, "hi", r"(?s)You said: hi.*10 tokens|7\.5 tokens/s")
    [request] = daemon.requests("Chat")
    assert request.parameters.temperature == pytest.approx(0.2)
    assert list(request.parameters.stop) == ["a b", "c"]
    assert _contents(request) == [("system", "Be kind."), ("user", "hi")]
    _say(chat, "/show parameters", 'stop "a b"')
    _say(chat, "/show system", "Be kind.")
    _say(chat, "/clear", "the conversation starts anew")
    _say(chat, "anew", "You said: anew")
    assert _contents(daemon.requests("Chat")[1]) == [("system", "Be kind."), ("user", "anew")]


def test_a_list_is_replaced_as_a_whole(daemon: FakeDaemon, chat: Terminal) -> None:
    for name in ("stop", "dry_sequence_breakers"):
        _say(chat, f"/set parameter {name} a b", f"{name} is a b")
        _say(chat, f"/set parameter {name} c", f"{name} is c")
    _say(chat, "/set parameter ignore_eos on", "ignore_eos is on")
    _say(chat, "/set parameter ignore_eos maybe", "must be true or false")
    _say(chat, "/set parameter stop", "stop is what the model says")
    _say(chat, "hi", "You said: hi")
    parameters = daemon.requests("Chat")[0].parameters
    assert (list(parameters.stop), list(parameters.dry_sequence_breakers)) == ([], ["c"])
    assert parameters.ignore_eos


def test_a_format_stays_until_it_is_taken_away(daemon: FakeDaemon, chat: Terminal) -> None:
    _say(chat, "/set format json", "answers look like that from now on")
    _say(chat, "hi", "You said: hi")
    _say(chat, "/set format regex:(yes|no)", "answers look like that")
    _say(chat, "again", "You said: again")
    _say(chat, "/set noformat", "answers look as they like")
    _say(chat, "once more", "You said: once more")
    first, second, third = (request.options for request in daemon.requests("Chat"))
    assert first.format.json_object
    assert second.format.regex == "(yes|no)"
    assert not third.HasField("format")


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("/set format", r"which format\?\s+hint: write `json`"),
        ("/set format yaml", "`yaml` is no format"),
        ("/set format nowhere.json", "there is no file `nowhere.json`"),
        ("/hlep", r"no command `/hlep`\s+hint: did you mean `/help`"),
        ("/set parameter temprature 1", r"unknown parameter `temprature`\s+hint: did you mean `temperature`"),
        ("/set parameter top_k many", "`top_k` must be a whole number"),
        ("/set parameter", "which parameter"),
        ("/set wordwarp", "did you mean `wordwrap`"),
        ("/show colour", "cannot show `colour`"),
        ("/save", "under which name"),
        ("/load nowhere", "model `nowhere` not found"),
        ("/help", "/set parameter NAME VALUE"),
        ("/?", "stop the answer"),
        ("/show", "capabilities"),
        ("/show license", "the model has no license"),
    ],
)
def test_commands_and_mistakes(daemon: FakeDaemon, chat: Terminal, typed: str, said: str) -> None:
    def refuse(request: Any, _context: Any) -> Iterator[Any]:
        raise FakeFailure(grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND", f"model `{request.ref}` not found")
        yield

    daemon.pull = refuse
    _say(chat, typed, said)


def test_save_creates_a_model_with_settings_and_conversation(daemon: FakeDaemon, chat: Terminal) -> None:
    info = daemon.models["llama3:latest"]
    _say(chat, "hello", "You said: hello")
    _say(chat, "/set parameter top_k 5", "top_k is 5")
    _say(chat, "/set system Two words", "system prompt set")
    _say(chat, "/save poet", "saved poet:latest")
    [request] = daemon.requests("CreateModel")
    assert info.model.name == "llama3:latest"
    assert request.name == "poet"
    assert request.modelfile == (
        "FROM llama3:latest\nSYSTEM Two words\nPARAMETER top_k 5\n"
        "MESSAGE user hello\nMESSAGE assistant You said: hello\n"
    )


def test_saved_messages_follow_those_of_the_model(daemon: FakeDaemon) -> None:
    daemon.models["llama3:latest"].messages.append(model_pb2.Message(role="user", content="before"))
    with terminal("run", "llama3") as chat:
        chat.expect(_PROMPT)
        _say(chat, "hello", "You said: hello")
        _say(chat, "/save poet", "saved poet:latest")
    assert "MESSAGE user before\nMESSAGE user hello\n" in daemon.requests("CreateModel")[0].modelfile


def test_load_goes_on_with_another_model_and_pulls_it(daemon: FakeDaemon, chat: Terminal) -> None:
    _say(chat, "hello", "You said: hello")
    _say(chat, "/load hf.co/a/other", r"(?s)pulled hf.co/a/other:latest.*loaded hf.co/a/other:latest")
    _say(chat, "hi", "You said: hi")
    request = daemon.requests("Chat")[1]
    assert (request.model, _contents(request)) == ("hf.co/a/other:latest", [("user", "hi")])


def test_load_refuses_what_only_embeds_and_goes_on(daemon: FakeDaemon, chat: Terminal) -> None:
    del daemon.models["stories:latest"].model.capabilities[:]
    daemon.models["stories:latest"].model.capabilities.append("embedding")
    _say(chat, "/load stories", r"`stories:latest` does not generate text\s+hint: `lm embed stories:latest` uses it")
    _say(chat, "hello", "You said: hello")
    assert [request.name for request in daemon.requests("LoadModel")] == ["llama3:latest"]


def test_a_model_without_a_chat_template_continues_text(daemon: FakeDaemon) -> None:
    with terminal("run", "stories") as screen:
        screen.expect("it continues what you type")
        screen.expect(_PROMPT)
        _say(screen, "Once", "and they lived happily")
        _say(screen, "Twice", "and they lived happily")
    assert [request.prompt for request in daemon.requests("Generate")] == ["Once", "Twice"]


def test_what_was_typed_is_remembered_privately(daemon: FakeDaemon, chat: Terminal, lmd_home: Path) -> None:
    _say(chat, "a secret", "You said: a secret")
    history = lmd_home / "prompt_history"
    assert "a secret" in history.read_text()
    assert history.stat().st_mode & 0o777 == 0o600
    _say(chat, "/set nohistory", "what you type is not kept")
    _say(chat, "unwritten", "You said: unwritten")
    assert "unwritten" not in history.read_text()
    chat.type("\x1b[A\x1b[A\x1b[A\r")
    chat.expect("You said: a secret")


def test_tab_completes_commands_parameters_and_models(daemon: FakeDaemon, chat: Terminal) -> None:
    chat.type("/set par\t")
    chat.expect("parameter")
    chat.type(" temper\t")
    chat.expect("ature")
    chat.type(" 0.5\r")
    chat.expect("temperature is 0.5")
    chat.expect(_PROMPT)
    chat.type("/load stor\t")
    chat.expect("ies:latest")
    chat.type("\r")
    chat.expect("loaded stories:latest")


def test_keys_typed_during_an_answer_reach_the_next_prompt(daemon: FakeDaemon, chat: Terminal) -> None:
    gate, echo = Gate(), daemon.chat

    def script(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        gate.wait(context)
        yield from text_events(pb.ChatResponse, "first answer")

    daemon.chat = script
    chat.type("first\r")
    assert gate.reached.wait(10)
    daemon.chat = echo
    chat.type("typed ahead\r")
    gate.opened.set()
    assert "typed ahead" not in chat.expect("first answer")
    chat.expect("You said: typed ahead")


def test_a_model_that_cannot_be_loaded_ends_the_command(daemon: FakeDaemon) -> None:
    daemon.failures["LoadModel"] = FakeFailure(
        grpc.StatusCode.RESOURCE_EXHAUSTED, "DEVICE_MEMORY", "it does not fit", hint="use a smaller one"
    )
    with terminal("run", "llama3") as screen:
        screen.expect(r"error: it does not fit\s+hint: use a smaller one")
        assert screen.wait() == 1


def test_a_session_reads_lines_from_a_pipe(daemon: FakeDaemon) -> None:
    typed = '/set system Be kind.\nhello\n"""a\nb"""\n/nope\n/bye\nnever\n'
    result = lm_process("run", "--interactive", "llama3", stdin=typed)
    assert result.code == 0
    assert result.out == "You said: hello\nYou said: a\nb\n"
    assert "error: no command `/nope`" in result.err
    assert _contents(daemon.requests("Chat")[1])[-1] == ("user", "a\nb")


def test_ctrl_c_ends_a_session_without_a_terminal(daemon: FakeDaemon) -> None:
    import signal

    running = subprocess.Popen(
        command("run", "-i", "llama3"), stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment()
    )
    assert running.stdin is not None
    assert running.stdout is not None
    running.stdin.write(b"hello\n")
    running.stdin.flush()
    assert running.stdout.readline() == b"You said: hello\n"
    running.send_signal(signal.SIGINT)
    running.communicate(timeout=30)
    assert running.returncode == 130


def test_a_model_that_does_not_think_is_not_told_to(daemon: FakeDaemon) -> None:
    """`/set think` was taken, and every answer after it refused."""
    daemon.add("plain:latest", capabilities=("completion", "chat"))
    with terminal("run", "plain", columns=100) as screen:
        screen.expect(_PROMPT)
        _say(screen, "/set think", "plain:latest does not think")
        _say(screen, "hi", "You said: hi")


def test_show_says_how_a_part_is_shown_here(daemon: FakeDaemon) -> None:
    daemon.find("llama3").template = "\n".join("abcdefghij")
    with terminal("run", "llama3", columns=100) as screen:
        screen.expect(_PROMPT)
        _say(screen, "/show", "4 more lines: `/show template`")


def test_thinking_is_set_and_remembered(daemon: FakeDaemon) -> None:
    daemon.add("thinker:latest", capabilities=("completion", "chat", "thinking"))

    def answer(*_: Any) -> Iterator[pb.ChatResponse]:
        yield pb.ChatResponse(delta=pb.TextDelta(thinking="Is it?"))
        yield from text_events(pb.ChatResponse, "It is.")

    daemon.chat = answer
    with terminal("run", "thinker", columns=100) as chat:
        chat.expect(_PROMPT)
        _say(chat, "/set think", "answers begin with thoughts")
        _say(chat, "one", r"Is it\?\s+--- answer ---[\s\S]+It is\.")
        _say(chat, "/set think high", "answers begin with thoughts")
        _say(chat, "/set nothoughts", "thoughts are not printed")
        _say(chat, "two", r"It is\.")
        _say(chat, "/set nothink", "answers begin at once")
        _say(chat, "/set think much", r"cannot think `much`\s+hint: one of on, low")
        _say(chat, "three", r"It is\.")
        assert chat.raw.count("--- thinking ---") == 1
    requests = daemon.requests("Chat")
    assert [request.think for request in requests] == [pb.THINK_ON, pb.THINK_HIGH, pb.THINK_OFF]
    assert [message.thinking for message in requests[1].messages] == ["", "Is it?", ""]
