"""What OpenAI's client reads of answers that models of tests cannot be made to give: an application that plays them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Sequence
from datetime import timedelta
from types import SimpleNamespace
from typing import Any, cast

import httpx2
import openai
import pytest
from starlette.types import ASGIApp, Receive, Scope, Send

from lmd.daemon.answer_events import ChoiceDone, Delta, Done, Event, TokenLogprob
from lmd.daemon.conversations import Think, ToolCall, ToolChoice
from lmd.daemon.errors import ContextLengthExceeded, Draining, QueueFull, Unloaded
from lmd.daemon.http.app import make_app
from lmd.daemon.http.callers import CALLER_KEY
from lmd.daemon.http.openai import chat, completions
from lmd.daemon.http.openai.answers import LegacyLogprobs
from lmd.daemon.http.openai.errors import error_event, render_error
from lmd.daemon.http.openai.requests import ChatRequest, CompletionRequest
from lmd.daemon.http.openai.streaming import told_errors
from lmd.daemon.http.progress import TELL_AFTER_S, WaitingComments
from lmd.daemon.http.services import Services
from lmd.daemon.residency.values import Waiting
from lmd.registry.errors import CapabilityMissing, LmdError
from lmd.registry.parameters import PARAMETERS

HELLO: Any = [{"role": "user", "content": "hello"}]
WEATHER: Any = [
    {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
]


def done(**fields: Any) -> Done:
    values: dict[str, Any] = {
        "finish_reason": "stop",
        "prompt_tokens": 9,
        "cached_tokens": 4,
        "generated_tokens": 5,
        "total_ns": 0,
        "load_ns": 0,
        "queue_ns": 0,
        "prompt_ns": 0,
        "generate_ns": 0,
        "seed": 1,
        "stop": "",
    }
    return Done(**(values | fields))


class Played:
    """An application whose answers are given, one list of events for each call; an error in a list is raised."""

    def __init__(self, *answers: Sequence[Event | Exception]) -> None:
        self._answers = list(answers)
        self.calls: list[dict[str, Any]] = []
        self.closed = 0

    def chat(self, **call: Any) -> AsyncGenerator[Event, None]:
        self.calls.append(call)
        return self._play(self._answers.pop(0))

    generate = chat

    async def _play(self, events: Sequence[Event | Exception]) -> AsyncGenerator[Event, None]:
        try:
            for event in events:
                if isinstance(event, Exception):
                    raise event
                yield event
        finally:
            self.closed += 1

    def app(self) -> ASGIApp:
        services = cast(Services, SimpleNamespace(inference=self, version="1.2.3"))
        app = make_app(services, [chat.routes, completions.routes], {"/v1/": render_error})

        async def known(scope: Scope, receive: Receive, send: Send) -> None:
            scope[CALLER_KEY] = "uid:1"
            await app(scope, receive, send)

        return known

    def use(self, work: Callable[[openai.AsyncOpenAI], Any]) -> Any:
        """Return what *work* makes of a client of this application."""

        async def main() -> Any:
            http = httpx2.AsyncClient(transport=httpx2.ASGITransport(app=self.app()))
            async with openai.AsyncOpenAI(
                base_url="http://lm/v1", api_key="x", max_retries=0, http_client=http
            ) as made:
                return await work(made)

        return asyncio.run(main())

    def chats(self, **options: Any) -> Any:
        async def work(client: openai.AsyncOpenAI) -> Any:
            made: Any = await client.chat.completions.create(**{"model": "m", "messages": HELLO} | options)
            return [chunk async for chunk in made] if options.get("stream") else made

        return self.use(work)


THOUGHT: list[Event | Exception] = [
    Delta("", 2, thinking="I look "),
    Delta("", 3, thinking="outside."),
    Delta("It rains", 4),
    Delta(".", 5),
    done(),
]
CALLS: list[Event | Exception] = [
    Delta("I ask.", 2, tool_calls=(ToolCall("call_1", "weather", '{"at": "here"}'),)),
    Delta("", 4, tool_calls=(ToolCall("call_2", "weather", '{"at": "there"}'),)),
    done(finish_reason="tool_calls"),
]


def test_thoughts_are_apart_from_the_answer() -> None:
    whole = Played(THOUGHT).chats()
    message = whole.choices[0].message
    assert (message.content, message.reasoning_content, message.reasoning) == (
        "It rains.",
        "I look outside.",
        "I look outside.",
    )
    chunks = Played(THOUGHT).chats(stream=True)
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert [getattr(delta, "reasoning_content", None) for delta in deltas] == [
        None,
        "I look ",
        "outside.",
        None,
        None,
        None,
    ]
    assert [delta.content for delta in deltas] == ["", None, None, "It rains", ".", None]


def test_calls_of_functions() -> None:
    whole = Played(CALLS).chats(tools=WEATHER)
    (choice,) = whole.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "I ask."
    assert [
        (call.id, call.type, call.function.name, call.function.arguments) for call in choice.message.tool_calls
    ] == [
        ("call_1", "function", "weather", '{"at": "here"}'),
        ("call_2", "function", "weather", '{"at": "there"}'),
    ]
    chunks = Played(CALLS).chats(tools=WEATHER, stream=True)
    calls = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or ()]
    assert [(call.index, call.id, call.type, call.function.arguments) for call in calls] == [
        (0, "call_1", "function", '{"at": "here"}'),
        (1, "call_2", "function", '{"at": "there"}'),
    ]
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    silent = Played([*CALLS[1:]]).chats(tools=WEATHER)
    assert silent.choices[0].message.content is None


@pytest.mark.parametrize("stream", [False, True])
def test_client_that_takes_one_call_gets_the_first(stream: bool) -> None:
    made = Played(CALLS).chats(tools=WEATHER, parallel_tool_calls=False, stream=stream)
    messages = [chunk.choices[0].delta for chunk in made] if stream else [made.choices[0].message]
    assert [call.id for message in messages for call in message.tool_calls or ()] == ["call_1"]


def test_streamed_calls_through_the_clients_accumulator() -> None:
    async def work(client: openai.AsyncOpenAI) -> Any:
        async with client.chat.completions.stream(model="m", messages=HELLO, tools=WEATHER) as stream:
            return await stream.get_final_completion()

    (choice,) = Played(CALLS).use(work).choices
    assert [call.function.name for call in choice.message.tool_calls] == ["weather", "weather"]
    assert json.loads(choice.message.tool_calls[1].function.arguments) == {"at": "there"}


def test_what_is_asked_of_functions_and_thoughts() -> None:
    for choice, expected in (
        (None, (ToolChoice.AUTO, "")),
        ("auto", (ToolChoice.AUTO, "")),
        ("none", (ToolChoice.NONE, "")),
        ("required", (ToolChoice.REQUIRED, "")),
        ({"type": "function", "function": {"name": "weather"}}, (ToolChoice.REQUIRED, "weather")),
    ):
        played = Played(THOUGHT)
        played.chats(tools=WEATHER, **({} if choice is None else {"tool_choice": choice}))
        tools = played.calls[0]["tools"]
        assert (tools.choice, tools.only) == expected
        assert json.loads(tools.tools[0].parameters) == {"type": "object", "properties": {}}
    for options, think in (
        ({}, None),
        ({"reasoning_effort": "none"}, Think.OFF),
        ({"reasoning_effort": "minimal"}, Think.OFF),
        ({"reasoning_effort": "low"}, Think.LOW),
        ({"reasoning_effort": "medium"}, Think.MEDIUM),
        ({"reasoning_effort": "xhigh"}, Think.HIGH),
        ({"extra_body": {"reasoning": {"effort": "high"}}}, Think.HIGH),
        ({"extra_body": {"chat_template_kwargs": {"enable_thinking": False}}}, Think.OFF),
        ({"extra_body": {"chat_template_kwargs": {"enable_thinking": True}}}, Think.ON),
    ):
        played = Played(THOUGHT)
        played.chats(**options)
        assert played.calls[0]["think"] == think


def test_results_know_their_function() -> None:
    played = Played(THOUGHT)
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": ""}}
    played.chats(
        messages=[
            *HELLO,
            {"role": "assistant", "tool_calls": [call], "reasoning_content": "hm"},
            {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
        ]
    )
    _, asked, result = played.calls[0]["messages"]
    assert (asked.content, asked.thinking, asked.tool_calls) == ("", "hm", (ToolCall("call_1", "weather", "{}"),))
    assert (result.role, result.content, result.tool_name, result.tool_call_id) == ("tool", "rain", "weather", "call_1")


def test_model_that_cannot_think_is_asked_without_that() -> None:
    played = Played([CapabilityMissing("m", "thinking")], THOUGHT)
    assert played.chats(reasoning_effort="high").choices[0].message.content == "It rains."
    assert [call["think"] for call in played.calls] == [Think.HIGH, None]
    with pytest.raises(openai.BadRequestError) as caught:
        Played([CapabilityMissing("m", "tools")]).chats(reasoning_effort="high", tools=WEATHER)
    assert caught.value.param == "tools"


def test_choices_end_each_in_its_own_way() -> None:
    ends = done(choices=(ChoiceDone("length", 3, ""), ChoiceDone("stop", 2, "")))
    events: list[Event | Exception] = [Delta("a", 1, choice=1), Delta("b", 1, choice=0), ends]
    assert [choice.finish_reason for choice in Played(events).chats(n=2).choices] == ["length", "stop"]
    chunks = Played(events).chats(n=2, stream=True)
    told = {chunk.choices[0].index: chunk.choices[0].finish_reason for chunk in chunks}
    assert told == {0: "length", 1: "stop"}


def test_held_back_text_does_not_hold_back_log_probabilities() -> None:
    token = TokenLogprob(5, "é".encode()[:1], -0.5, (TokenLogprob(5, "é".encode()[:1], -0.5),))
    events: list[Event | Exception] = [
        Delta("", 1, logprobs=(token,)),
        Delta("é", 2, logprobs=(TokenLogprob(6, b"\xa9", -0.25),)),
        done(),
    ]
    chunks = Played(events).chats(stream=True, logprobs=True)
    told = [chunk.choices[0].logprobs.content[0] for chunk in chunks if chunk.choices[0].logprobs]
    assert [(one.bytes, one.token, one.logprob) for one in told] == [
        ([0xC3], "\ufffd", -0.5),
        ([0xA9], "\ufffd", -0.25),
    ]
    assert LegacyLogprobs().of([token, TokenLogprob(6, b"\xa9", -0.25), TokenLogprob(7, b"x", -1.0)]) == {
        "tokens": ["bytes:\\xc3", "bytes:\\xa9", "x"],
        "token_logprobs": [-0.5, -0.25, -1.0],
        "top_logprobs": [{"bytes:\\xc3": -0.5}, {"bytes:\\xa9": -0.25}, {"x": -1.0}],
        "text_offset": [0, 0, 1],
    }


def test_error_before_the_first_text_has_its_status_and_later_its_event() -> None:
    too_long = ContextLengthExceeded(prompt_tokens=9, context_tokens=8)
    with pytest.raises(openai.BadRequestError) as refused:
        Played([Waiting(0), too_long]).chats(stream=True)
    assert refused.value.code == "context_length_exceeded"
    played = Played([Delta("It", 1), Unloaded("m")])
    with pytest.raises(openai.APIError) as broken:
        played.chats(stream=True)
    assert broken.value.code == "unloaded"
    assert "unloaded while it answered" in broken.value.message
    assert played.closed == 1
    with pytest.raises(openai.APIError, match="error_id"):
        Played([Delta("It", 1), ZeroDivisionError("secret")]).chats(stream=True)


def test_queue_of_one_and_of_all() -> None:
    for own, kind, status in ((True, "rate_limit_error", 429), (False, "server_error", 503)):
        error = QueueFull(limit=3, retry_after_s=1.2, own=own)
        response = render_error(503, error.message, error)
        told = json.loads(bytes(response.body))["error"]
        assert (response.status_code, told["type"], told["code"]) == (status, kind, "rate_limit_exceeded")
        assert response.headers["retry-after"] == "2"
        assert json.loads(error_event(error).removeprefix(b"data: "))["error"]["type"] == kind
    assert render_error(503, "", Draining()).headers["retry-after"] == "5"


def test_waiting_is_told_once_it_takes_long() -> None:
    now = 100.0
    comments = WaitingComments(clock=lambda: now)
    assert comments.of(Waiting(3)) == b""
    now += TELL_AFTER_S - 0.1
    assert comments.of(Waiting(2)) == b""
    now += 0.2
    assert comments.of(Waiting(2)) == b": queue position 2\n\n"
    assert comments.of(Waiting(0, 0.42)) == b": loading 42 %\n\n"
    assert comments.first_position == 3


def test_place_in_the_queue_is_in_the_headers() -> None:
    async def work(client: openai.AsyncOpenAI) -> Any:
        return await client.chat.completions.with_raw_response.create(model="m", messages=HELLO)

    headers = Played([Waiting(3), Waiting(1), *THOUGHT]).use(work).headers
    assert headers["x-lmd-queue-position"] == "3"
    assert headers["x-lmd-prompt-tokens-cached"] == "4"


async def test_stream_that_is_left_closes_its_answer() -> None:
    closed = False

    async def chunks() -> AsyncGenerator[bytes, None]:
        nonlocal closed
        try:
            yield b"1"
            yield b"2"
        finally:
            closed = True

    stream = told_errors(chunks())
    assert await anext(stream) == b"1"
    await stream.aclose()
    assert closed


def test_completions_refuse_what_they_cannot_do() -> None:
    for param, options in (
        ("best_of", {"best_of": 3}),
        ("echo", {"echo": True, "logprobs": 1}),
        ("suffix", {"prompt": [1, 2], "suffix": "x"}),
        ("prompt", {"prompt": []}),
        ("prompt", {"prompt": ["x"] * 257}),
        ("prompt", {"prompt": None}),
        ("prompt", {"prompt": [1, "x"]}),
        ("logprobs", {"logprobs": 21}),
    ):

        async def work(client: openai.AsyncOpenAI, options: dict[str, Any] = options) -> Any:
            return await client.completions.create(**{"model": "m", "prompt": "x"} | options)

        with pytest.raises(openai.BadRequestError) as caught:
            Played().use(work)
        assert (caught.value.param or "").split(".")[0] == param


def test_one_prompt_that_fails_fails_the_request() -> None:
    played = Played(THOUGHT, [Unloaded("m")], THOUGHT)

    async def work(client: openai.AsyncOpenAI) -> Any:
        return await client.completions.create(model="m", prompt=["a", "b", "c"])

    with pytest.raises(openai.InternalServerError) as caught:
        played.use(work)
    assert caught.value.code == "unloaded"
    assert played.closed == len(played.calls) == 3


def test_stream_of_an_unknown_error_before_it_begins(caplog: pytest.LogCaptureFixture) -> None:
    class Odd(LmdError):
        pass

    with pytest.raises(openai.InternalServerError, match="error_id"):
        Played([Odd("secret")]).chats(stream=True)


def test_every_setting_of_the_registry_can_be_made() -> None:
    # The number of tokens has OpenAI's own names.
    assert PARAMETERS.keys() - ChatRequest.model_fields.keys() == {"num_predict"}
    assert PARAMETERS.keys() - CompletionRequest.model_fields.keys() == {"num_predict"}
    played = Played(THOUGHT)
    settings = {name: setting.default for name, setting in PARAMETERS.items() if setting.default is not None}
    sent = {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}
    del sent["num_predict"]
    played.chats(max_completion_tokens=3, extra_body=sent)
    assert played.calls[0]["parameters"] == {**sent, "num_predict": 3}


@pytest.mark.parametrize(
    ("sent", "seen"), [(-1, -1), (0, 0), (2**62, 2**62), (2**63, 0), (-2, 2**63 - 2)], ids=lambda value: str(value)
)
def test_seeds_of_any_sign(sent: int, seen: int) -> None:
    played = Played(THOUGHT)
    played.chats(seed=sent)
    assert played.calls[0]["parameters"]["seed"] == seen


@pytest.mark.parametrize(
    ("sent", "seen"),
    [
        (300, timedelta(seconds=300)),
        (0, timedelta()),
        (-1, timedelta(seconds=-1)),
        ("5m", timedelta(minutes=5)),
        ("-5m", timedelta(seconds=-1)),
        ("-1", timedelta(seconds=-1)),
        (1e300, timedelta(seconds=-1)),
    ],
)
def test_how_long_a_model_stays(sent: object, seen: timedelta) -> None:
    played = Played(THOUGHT)
    played.chats(extra_body={"keep_alive": sent})
    assert played.calls[0]["keep_alive"] == seen
