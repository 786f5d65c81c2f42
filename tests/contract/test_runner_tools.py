"""What chats with functions and thoughts get from a real runner, from models that say what a test wants them to."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from lmd.runner.v1 import frames_pb2
from tests.support.families import CHANNEL_TOKENS, CHANNELS, HERMES, LLAMA3, MISTRAL, OPENED, THINKING
from tests.support.runner_client import Answer, RunnerProcess
from tests.support.tiny_models import CHATML, make_scripted_llama, make_tiny_llama, tiny_vocab

STOP = frames_pb2.Finished.REASON_STOP
LENGTH = frames_pb2.Finished.REASON_LENGTH
TOOL_CALLS = frames_pb2.Finished.REASON_TOOL_CALLS

WEATHER = frames_pb2.Tool(
    name="weather",
    description="The weather in a city",
    parameters=json.dumps(
        {
            "type": "object",
            "properties": {"city": {"enum": ["Rome", "Oslo"]}},
            "required": ["city"],
            "additionalProperties": False,
        }
    ),
)
ROME = '{"city": "Rome"}'
CALL = f'{{"name": "weather", "arguments": {ROME}}}'
Say = Callable[..., RunnerProcess]


def chat(*tools: frames_pb2.Tool, **fields: object) -> frames_pb2.Chat:
    made = frames_pb2.Chat(tools=tools, **fields)  # type: ignore[arg-type]
    made.messages.add(role="user", content="what now")
    return made


def arguments_of(answer: Answer, choice: int = 0) -> list[tuple[str, object]]:
    return [(name, json.loads(arguments)) for name, arguments in answer.calls.get(choice, [])]


@pytest.fixture
def say(tmp_path: Path) -> Iterator[Say]:
    """Start a runner whose model answers everything with the pieces of a script."""
    started: list[RunnerProcess] = []

    def start(template: str, script: Sequence[str], *, specials: Sequence[str] = ()) -> RunnerProcess:
        texts = [
            piece for piece in script if piece not in specials and len(piece) > 1 and piece not in ("</s>", " one")
        ]
        path = make_scripted_llama(
            tmp_path / f"{len(started)}.gguf",
            script,
            chat_template=template,
            texts=texts,
            specials=specials,
            n_ctx=4096,
        )
        runner = RunnerProcess()
        started.append(runner)
        runner.load(path, num_ctx=4096, num_batch=512)
        return runner

    yield start
    for runner in started:
        runner.close()


FAMILIES = {
    "hermes": (HERMES, ["<tool_call>", f"\n{CALL}\n", "</tool_call>"], ()),
    "hermes, markers that are special": (
        HERMES,
        ["<tool_call>", f"\n{CALL}\n", "</tool_call>"],
        ("<tool_call>", "</tool_call>"),
    ),
    "llama 3": (LLAMA3, ['{"name": "weather", ', '"parameters": {"city": "Rome"}}', "<|eom_id|>"], ("<|eom_id|>",)),
    "llama 3, python tag": (
        LLAMA3,
        ["<|python_tag|>", '{"name": "weather", "parameters": {"city": "Rome"}}', "<|eom_id|>"],
        ("<|python_tag|>", "<|eom_id|>"),
    ),
    "mistral": (MISTRAL, ["[TOOL_CALLS]", f"[{CALL}]"], ("[TOOL_CALLS]",)),
    "gpt-oss": (
        CHANNELS,
        ["<|channel|>", "commentary to=functions.weather ", "<|constrain|>", "json", "<|message|>", ROME, "<|call|>"],
        CHANNEL_TOKENS,
    ),
}


@pytest.mark.parametrize(("template", "script", "specials"), FAMILIES.values(), ids=FAMILIES)
def test_the_calls_of_each_family_are_read(
    say: Say, template: str, script: Sequence[str], specials: Sequence[str]
) -> None:
    runner = say(template, script, specials=specials)
    answer = runner.ask(chat=chat(WEATHER))
    assert arguments_of(answer) == [("weather", {"city": "Rome"})]
    assert (answer.text, answer.thinking) == ("", "")
    assert answer.done.reason == TOOL_CALLS
    # The same words are text where no function was offered, or none that is called so.
    for other in (chat(), chat(frames_pb2.Tool(name="time")), chat(WEATHER, tool_choice=frames_pb2.TOOL_CHOICE_NONE)):
        answer = runner.ask(chat=other)
        assert not answer.calls.get(0)
        assert "Rome" in answer.text
        assert answer.done.reason == STOP


def test_thoughts_are_told_from_the_answer(say: Say) -> None:
    runner = say(THINKING, ["<think>", "\nmaybe", " yes\n", "</think>", "\n\nsure", " one"])
    answer = runner.ask(chat=chat())
    assert (answer.thinking, answer.text) == ("maybe yes", "sure one")
    assert answer.kinds == sorted(answer.kinds, reverse=True)
    assert answer.done.reason == STOP
    # A model that thinks although it was told not to is still not taken to say its thoughts.
    answer = runner.ask(chat=chat(think=frames_pb2.THINK_OFF))
    assert (answer.thinking, answer.text) == ("maybe yes", "sure one")
    # A prompt is not a chat.
    assert runner.ask("what now").text == "<think>\nmaybe yes\n</think>\n\nsure one"


def test_thoughts_that_the_prompt_opens(say: Say) -> None:
    runner = say(OPENED, ["maybe", " yes\n", "</think>", "\n\nsure"])
    answer = runner.ask(chat=chat())
    assert (answer.thinking, answer.text) == ("maybe yes", "sure")
    # Cut before its end, all is thoughts.
    answer = runner.ask(chat=chat(), num_predict=1)
    assert (answer.thinking, answer.text, answer.done.reason) == ("maybe", "", LENGTH)


def test_thoughts_in_channels(say: Say) -> None:
    script = ["<|channel|>", "analysis", "<|message|>", "maybe", "<|end|>", "<|start|>", "assistant"]
    runner = say(CHANNELS, [*script], specials=CHANNEL_TOKENS)
    answer = runner.ask(chat=chat())
    assert (answer.thinking, answer.text) == ("maybe", "")


def test_thoughts_then_text_then_a_call(say: Say) -> None:
    script = ["<think>", "maybe", "</think>", "Let me look.", "<tool_call>", f"\n{CALL}\n", "</tool_call>"]
    answer = say(THINKING, script).ask(chat=chat(WEATHER))
    assert (answer.thinking, answer.text) == ("maybe", "Let me look.")
    assert answer.kinds == ["thinking", "text", "call"] or set(answer.kinds) == {"thinking", "text", "call"}
    assert answer.done.reason == TOOL_CALLS


def test_stop_texts_apply_to_what_is_said_only(say: Say) -> None:
    script = ["<think>", "maybe", "</think>", "well, ", "maybe not", "<tool_call>", f"\n{CALL}\n", "</tool_call>"]
    runner = say(THINKING, script)
    answer = runner.ask(chat=chat(WEATHER), stop=["maybe"])
    assert (answer.thinking, answer.text) == ("maybe", "well, ")
    assert (answer.done.reason, answer.done.stop) == (STOP, "maybe")
    answer = runner.ask(chat=chat(WEATHER), stop=["Rome", "</think>"])
    assert arguments_of(answer) == [("weather", {"city": "Rome"})]
    assert (answer.done.reason, answer.done.stop) == (TOOL_CALLS, "")


def test_a_call_that_is_cut_is_no_call(say: Say) -> None:
    runner = say(
        HERMES, ["<tool_call>", '\n{"name": "weather", ', '"arguments": {"city": ', '"Rome"}}\n', "</tool_call>"]
    )
    answer = runner.ask(chat=chat(WEATHER), num_predict=3)
    assert not answer.calls.get(0)
    assert answer.done.reason == LENGTH
    assert answer.text == '<tool_call>\n{"name": "weather", "arguments": {"city": '


def test_each_of_several_answers_is_read_by_itself(say: Say) -> None:
    script = ["<think>", "maybe", "</think>", "<tool_call>", f"\n{CALL}\n", "</tool_call>"]
    answer = say(THINKING, script).ask(chat=chat(WEATHER), options={"choices": 3})
    for choice in range(3):
        assert answer.thoughts[choice] == "maybe"
        assert arguments_of(answer, choice) == [("weather", {"city": "Rome"})]
    assert [end.reason for end in answer.done.choices] == [TOOL_CALLS] * 3


def test_log_probabilities_come_with_thoughts_and_calls(say: Say) -> None:
    script = ["<think>", "maybe", "</think>", "<tool_call>", f"\n{CALL}\n", "</tool_call>"]
    answer = say(THINKING, script).ask(chat=chat(WEATHER), options={"top_logprobs": 0})
    assert len(answer.logprobs) == answer.done.generated_tokens == len(script)


TIME = frames_pb2.Tool(
    name="time",
    parameters=json.dumps(
        {
            "type": "object",
            "properties": {"zone": {"type": "string", "maxLength": 6}, "offset": {"type": "integer", "maximum": 99}},
            "required": ["zone"],
            "additionalProperties": False,
        }
    ),
)
REQUIRED = frames_pb2.TOOL_CHOICE_REQUIRED
FORCED = {
    "hermes": (HERMES, ()),
    "hermes, special": (HERMES, ("<tool_call>", "</tool_call>")),
    "thinking": (THINKING, ("<think>", "</think>")),
    "llama 3": (LLAMA3, ("<|python_tag|>", "<|eom_id|>")),
    "mistral": (MISTRAL, ("[TOOL_CALLS]",)),
    "gpt-oss": (CHANNELS, CHANNEL_TOKENS),
    "none of its own": ("{{ tools | tojson }}{{ messages[0].content }}", ()),
}


@pytest.mark.parametrize(("template", "specials"), FORCED.values(), ids=FORCED)
def test_a_call_that_must_come_comes_and_fits_its_schema(
    tmp_path: Path, template: str, specials: Sequence[str]
) -> None:
    """The model's weights are random: nothing but the grammar makes it call."""
    # A tokenizer that puts spaces before texts also puts them after the markers of channels.
    spaces = template != CHANNELS
    path = make_tiny_llama(
        tmp_path / "m.gguf", chat_template=template, specials=specials, n_ctx=2048, space_prefix=spaces
    )
    # A model of random weights that begins to think would do that to its last token.
    ends = {tiny_vocab(specials=specials).id_of(token): 40.0 for token in ("</think>", "<|end|>") if token in specials}
    with RunnerProcess() as runner:
        runner.load(path, num_ctx=2048, num_batch=512)
        for seed in range(3):
            wanted = chat(WEATHER, TIME, tool_choice=REQUIRED)
            answer = runner.ask(chat=wanted, temperature=1.0, seed=seed, num_predict=1500, logit_bias=ends)
            assert answer.done.reason == TOOL_CALLS, answer
            assert answer.text == ""
            for name, arguments in arguments_of(answer):
                assert isinstance(arguments, dict)
                if name == "weather":
                    assert arguments["city"] in ("Rome", "Oslo")
                else:
                    assert (name, len(arguments["zone"]) <= 6, arguments.get("offset", 0) <= 99) == ("time", True, True)
        for tool in (WEATHER, TIME):
            wanted = chat(WEATHER, TIME, tool_name=tool.name)
            answer = runner.ask(chat=wanted, temperature=1.0, seed=5, num_predict=1500, logit_bias=ends)
            assert {name for name, _ in arguments_of(answer)} == {tool.name}


def test_what_cannot_be_enforced_is_refused(say: Say) -> None:
    runner = say(HERMES, ["sure"])
    odd = frames_pb2.Tool(name="odd", parameters='{"type": "object", "properties": {"a": {"uniqueItems": true}}}')
    failure = runner.ask(chat=chat(odd, tool_choice=REQUIRED)).failure
    assert (failure.kind, failure.field) == (frames_pb2.Failed.KIND_INVALID, "tools")
    assert "odd" in failure.message
    assert "uniqueItems" in failure.message
    assert runner.ask(chat=chat(odd)).text == "sure"


def test_thoughts_come_before_what_a_format_is_for(say: Say) -> None:
    format_ = {"format": frames_pb2.Format(regex="[a-c]{3}")}
    opened = say(OPENED, ["maybe", " yes\n", "</think>"])
    answer = opened.ask(chat=chat(), options=format_)
    assert answer.thinking == "maybe yes"
    assert re.fullmatch("[a-c]{3}", answer.text)
    assert answer.done.reason == STOP
    answer = opened.ask(chat=chat(WEATHER, tool_choice=REQUIRED))
    assert answer.thinking == "maybe yes"
    assert [name for name, _ in arguments_of(answer)] == ["weather"]
    # Where the model opens them itself, and where it does not think at all.
    assert say(THINKING, ["<think>", "maybe", "</think>"]).ask(chat=chat(), options=format_).thinking == "maybe"
    answer = say(THINKING, ["c", "a", "b"]).ask(chat=chat(), options=format_)
    assert (answer.thinking, answer.text) == ("", "cab")


def test_formats_and_forced_calls_in_channels(say: Say) -> None:
    script = ["<|channel|>", "analysis", "<|message|>", "maybe", "<|end|>"]
    runner = say(CHANNELS, script, specials=CHANNEL_TOKENS)
    answer = runner.ask(chat=chat(), options={"format": frames_pb2.Format(regex="[a-c]{3}")})
    assert answer.thinking == "maybe"
    assert re.fullmatch("[a-c]{3}", answer.text)
    assert answer.done.reason == STOP


def test_special_tokens_that_mark_nothing_stay_hidden(say: Say) -> None:
    runner = say(
        MISTRAL, ["sure", "<|other|>", " one", "[TOOL_CALLS]", f"[{CALL}]"], specials=("<|other|>", "[TOOL_CALLS]")
    )
    answer = runner.ask(chat=chat(WEATHER))
    assert answer.text == "sure one"
    assert arguments_of(answer) == [("weather", {"city": "Rome"})]
    assert "[TOOL_CALLS]" not in runner.ask(chat=chat()).text


def test_a_request_can_bring_its_own_template(say: Say) -> None:
    runner = say(CHATML, ["<think>", "maybe", "</think>", "sure"])
    assert runner.ask(chat=chat()).text == "<think>maybe</think>sure"
    own = chat(template="<think> so: {{ messages[0].content }}")
    answer = runner.ask(chat=own)
    assert (answer.thinking, answer.text) == ("maybe", "sure")
    rendered = runner.call(render=frames_pb2.Render(chat=own)).rendered
    assert rendered.prompt == "<think> so: what now"
    go = runner.call(render=frames_pb2.Render(chat=chat(template="<{{ .Prompt }}>{{ .Response }}!"))).rendered
    assert go.prompt == "<what now>"
    failures = {
        "{% if %}": "line 1",
        "{{ raise_exception('not so') }}": "not so",
        "{{ .Prompt }}{{ if }}": "line 1, column 20: missing value for if",
        "{{ .Prompt }}\n{{ index .Prompt 999 }}": "line 2, column 4: error calling index: index out of range: 999",
        "{{ range 99999 }}{{ range 99999 }}{{ end }}{{ end }}{{ .Prompt }}": "more than 1000000 steps",
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}": "longer than 1 s",
        "x" * (300 << 10): "characters",
    }
    for template, said in failures.items():
        failure = runner.ask(chat=chat(template=template)).failure
        assert failure.kind == frames_pb2.Failed.KIND_TEMPLATE
        assert said in failure.message
    # Neither the model's template nor the next of its kind is worse off.
    assert runner.ask(chat=chat()).text == "<think>maybe</think>sure"
    assert runner.ask(chat=own).thinking == "maybe"


def test_a_model_with_a_template_for_functions_uses_that_for_them(tmp_path: Path) -> None:
    path = make_scripted_llama(
        tmp_path / "m.gguf",
        ["<tool_call>", f"\n{CALL}\n", "</tool_call>"],
        chat_template=CHATML,
        tool_template=HERMES,
        texts=["<tool_call>", f"\n{CALL}\n", "</tool_call>"],
        n_ctx=4096,
    )

    def prompt_of(shown: frames_pb2.Chat) -> str:
        return runner.call(render=frames_pb2.Render(chat=shown)).rendered.prompt

    with RunnerProcess() as runner:
        runner.load(path, num_ctx=4096, num_batch=512)
        assert arguments_of(runner.ask(chat=chat(WEATHER))) == [("weather", {"city": "Rome"})]
        assert prompt_of(chat(WEATHER)).startswith("<s>[user]what now")
        for plain in (chat(), chat(WEATHER, tool_choice=frames_pb2.TOOL_CHOICE_NONE)):
            assert prompt_of(plain).startswith("<|im_start|>user")
            assert runner.ask(chat=plain).text.startswith("<tool_call>")
    # Whoever gives a model a template of their own means it.
    with RunnerProcess() as runner:
        runner.load(path, num_ctx=4096, num_batch=512, template="own {{ messages[0].content }}")
        assert prompt_of(chat(WEATHER)) == "own what now"
    # The daemon names the header's own template, too.
    with RunnerProcess() as runner:
        runner.load(path, num_ctx=4096, num_batch=512, template=CHATML)
        assert prompt_of(chat(WEATHER)).startswith("<s>[user]what now")
