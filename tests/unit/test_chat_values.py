"""Templates get turns, functions and wishes in the shapes that those of the Hub expect."""

from __future__ import annotations

from typing import Any

import pytest

from lmd.runner.chat_values import template_values
from lmd.runner.render import Renderer
from lmd.runner.v1 import frames_pb2
from tests.support.families import CHANNELS, HERMES, MISTRAL, THINKING

CITY = '{"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}'


def chat(**fields: Any) -> frames_pb2.Chat:
    """Return a chat with a call and its result."""
    made = frames_pb2.Chat(**fields)
    made.messages.add(role="user", content="How is it in Rome?")
    asked = made.messages.add(role="assistant", thinking="Let me see.")
    asked.tool_calls.add(id="call_0123456789abcdef", name="weather", arguments='{"city": "R\\u00f6me", "days": 2}')
    made.messages.add(role="tool", content="22 C")
    made.tools.add(name="weather", description="The weather", parameters=CITY)
    return made


def render(template: str, shown: frames_pb2.Chat) -> str:
    return Renderer(template, bos_token="<s>", eos_token="</s>", max_bytes=10_000).render_chat(shown)


def test_turns_have_the_usual_keys() -> None:
    user, assistant, tool = template_values(chat(), "")["messages"]
    assert user == {"role": "user", "content": "How is it in Rome?"}
    assert assistant["reasoning_content"] == assistant["thinking"] == "Let me see."
    function = {"name": "weather", "arguments": {"city": "Röme", "days": 2}}
    assert assistant["tool_calls"] == [{"id": "call_0123456789abcdef", "type": "function", "function": function}]
    # The result did not say which call it is for.
    assert tool == {"role": "tool", "content": "22 C", "name": "weather", "tool_call_id": "call_0123456789abcdef"}


def test_functions_have_the_usual_keys() -> None:
    shown = chat()
    shown.tools.add(name="now")
    shown.tools.add(name="odd", parameters='{"properties": {}}')
    tools = template_values(shown, "")["tools"]
    assert tools[0]["type"] == "function"
    assert tools[0]["function"]["parameters"]["required"] == ["city"]
    assert tools[1]["function"] == {
        "name": "now",
        "description": "",
        "parameters": {"type": "object", "properties": {}},
    }
    assert tools[2]["function"]["parameters"] == {"type": "object", "properties": {}}


@pytest.mark.parametrize("choice", [frames_pb2.TOOL_CHOICE_UNSPECIFIED, frames_pb2.TOOL_CHOICE_NONE])
def test_no_functions_are_none_and_can_be_gone_through(choice: frames_pb2.ToolChoice.ValueType) -> None:
    shown = frames_pb2.Chat(messages=[frames_pb2.ChatMessage(role="user")], tool_choice=choice)
    if choice == frames_pb2.TOOL_CHOICE_NONE:
        shown.tools.add(name="weather")
    template = (
        "{{ tools is none }} {{ tools is not none }} {{ tools is defined }} {{ 1 if tools else 0 }}"
        "{% for tool in tools %}{{ tool }}{% endfor %}"
    )
    assert render(template, shown) == "True False True 0"


def test_results_go_with_their_calls_in_any_order() -> None:
    shown = frames_pb2.Chat()
    asked = shown.messages.add(role="assistant")
    for id_, name in (("1", "a"), ("2", "b"), ("", "a")):
        asked.tool_calls.add(id=id_, name=name, arguments="{}")
    shown.messages.add(role="tool", tool_name="b")
    shown.messages.add(role="tool", tool_call_id="1")
    shown.messages.add(role="tool")
    shown.messages.add(role="tool", tool_call_id="x", tool_name="y")
    messages = template_values(shown, "")["messages"]
    third = messages[0]["tool_calls"][2]["id"]
    assert third
    assert [(m["name"], m["tool_call_id"]) for m in messages[1:]] == [("b", "2"), ("a", "1"), ("a", third), ("y", "x")]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        # Qwen and Llama turn objects into JSON; DeepSeek puts what it takes for JSON into a text.
        ("{{ call.arguments | tojson }}", '{"city": "Röme", "days": 2}'),
        ("{{ '```json\\n' + call.arguments + '\\n```' }}", '```json\n{"city": "Röme", "days": 2}\n```'),
        ("{{ call.arguments ~ '!' }}", '{"city": "Röme", "days": 2}!'),
        ("{{ call.arguments }}", '{"city": "Röme", "days": 2}'),
        (
            "{{ call.arguments if call.arguments is string else call.arguments | tojson }}",
            '{"city": "Röme", "days": 2}',
        ),
        # GLM and others go through them.
        ("{% for k, v in call.arguments.items() %}{{ k }}={{ v }};{% endfor %}", "city=Röme;days=2;"),
        ("{{ call.arguments is mapping }}", "True"),
        ("{{ call | tojson }}", '{"name": "weather", "arguments": {"city": "Röme", "days": 2}}'),
    ],
)
def test_arguments_suit_templates_that_want_an_object_and_those_that_want_text(template: str, expected: str) -> None:
    assert render("{% set call = messages[1].tool_calls[0].function %}" + template, chat()) == expected


@pytest.mark.parametrize("arguments", ["[1]", "{", "", "null", "\u0000"])
def test_arguments_that_are_no_object_are_what_was_said(arguments: str) -> None:
    shown = chat()
    shown.messages[1].tool_calls[0].arguments = arguments
    call = template_values(shown, "")["messages"][1]["tool_calls"][0]
    assert call["function"]["arguments"] == (arguments or {})


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ 'calls' if content is none else 'text' }}", "calls"),
        ("{{ 'text' if content is not none else 'calls' }}", "calls"),
        ("{{ 'yes' if '</think>' in content else 'no' }}", "no"),
        ("{{ content.split('</think>')[0] }}|{{ content | trim }}|{{ content }}", "||"),
        ("{{ content is string }} {{ 1 if content else 0 }}", "True 0"),
    ],
)
def test_a_turn_that_only_calls_suits_templates_that_ask_for_its_content_and_those_that_read_it(
    template: str, expected: str
) -> None:
    assert render("{% set content = messages[1].content %}" + template, chat()) == expected


def test_mistrals_ids_have_nine_characters() -> None:
    assert '[TOOL_CALLS][{"name": "weather"' in render(MISTRAL, chat())
    _, assistant, tool = template_values(chat(), MISTRAL)["messages"]
    assert len(assistant["tool_calls"][0]["id"]) == 9
    assert assistant["tool_calls"][0]["id"] == tool["tool_call_id"]
    shown = chat()
    shown.messages[1].tool_calls[0].id = "abcDEF123"
    assert template_values(shown, MISTRAL)["messages"][2]["tool_call_id"] == "abcDEF123"


def test_a_template_that_takes_no_text_beside_thoughts_gets_both_as_thoughts() -> None:
    refusing = (
        "{% set m = messages[1] %}{% if m.content and m.thinking %}"
        "{{ raise_exception('Cannot pass both content and thinking in an assistant message with tool calls!') }}"
        "{% endif %}{{ m.thinking }}"
    )
    shown = chat()
    shown.messages[1].content = "I look it up."
    assert render(refusing, shown) == "Let me see.\n\nI look it up."
    assert render("{{ messages[1].content }}", shown) == "I look it up."


UNSPECIFIED, OFF, ON, LOW, MEDIUM, HIGH = range(6)
VARIABLES = "{{ enable_thinking }} {{ thinking }} {{ reasoning_effort }}"


@pytest.mark.parametrize(
    ("think", "values"),
    [
        (UNSPECIFIED, {}),
        (OFF, {"enable_thinking": False, "thinking": False, "thinking_budget": 0, "reasoning_effort": "low"}),
        (ON, {"enable_thinking": True, "thinking": True}),
        (LOW, {"enable_thinking": True, "thinking": True, "reasoning_effort": "low"}),
        (MEDIUM, {"enable_thinking": True, "thinking": True, "reasoning_effort": "medium"}),
        (HIGH, {"enable_thinking": True, "thinking": True, "reasoning_effort": "high"}),
    ],
)
def test_wishes_become_variables(think: frames_pb2.Think.ValueType, values: dict[str, Any]) -> None:
    given = template_values(chat(think=think), VARIABLES)
    names = ("enable_thinking", "thinking", "thinking_budget", "reasoning_effort")
    assert {name: given[name] for name in names if name in given} == values


@pytest.mark.parametrize(("think", "effort"), [(OFF, "none"), (ON, "high"), (LOW, "low")])
def test_a_template_with_a_word_for_no_effort_gets_that(think: frames_pb2.Think.ValueType, effort: str) -> None:
    template = "{% if reasoning_effort not in ['none', 'high', 'low'] %}{{ raise_exception('no') }}{% endif %}"
    assert template_values(chat(think=think), template)["reasoning_effort"] == effort
    assert render(template, chat(think=think)) == ""


def test_families() -> None:
    prompt = render(HERMES, chat())
    assert '{"type": "function", "function": {"name": "weather"' in prompt
    assert '<tool_call>\n{"name": "weather", "arguments": {"city": "Röme", "days": 2}}\n</tool_call>' in prompt
    assert render(THINKING, chat(think=OFF)).endswith("[assistant]\n<think>\n\n</think>\n\n")
    assert render(THINKING, chat(think=ON)).endswith("[assistant]\n")
    assert "Reasoning: medium" in render(CHANNELS, chat())
    assert "Reasoning: medium" in render(CHANNELS, chat(think=ON))
    assert "Reasoning: high" in render(CHANNELS, chat(think=HIGH))
    assert "Reasoning: low" in render(CHANNELS, chat(think=OFF))
    assert "<|channel|>analysis<|message|>Let me see.<|end|>" in render(CHANNELS, chat())


def test_json_that_nests_too_deeply_is_an_error_of_the_request() -> None:
    shown = chat()
    shown.messages[1].tool_calls[0].arguments = '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}"
    with pytest.raises(RecursionError):
        render("", shown)
