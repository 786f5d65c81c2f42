"""Chats reach Go templates as they reach Ollama's, and older templates are run for each exchange."""

from __future__ import annotations

import json

import pytest

from lmd.gotemplate.errors import TemplateFailure, TemplateSyntax
from lmd.runner.go_chat import GoRenderer
from lmd.runner.v1 import frames_pb2

PHI = "{{ if .System }}S:{{ .System }};{{ end }}{{ if .Prompt }}U:{{ .Prompt }};{{ end }}A:{{ .Response }};"


def chat(*turns: tuple[str, str], **fields: object) -> frames_pb2.Chat:
    messages = [frames_pb2.ChatMessage(role=role, content=content) for role, content in turns]
    return frames_pb2.Chat(messages=messages, **fields)  # type: ignore[arg-type]


def render(template: str, shown: frames_pb2.Chat) -> str:
    return GoRenderer(template, max_bytes=100_000).render_chat(shown)


@pytest.mark.parametrize(
    ("turns", "expected"),
    [
        ([("user", "a")], "U:a;A:"),
        ([("system", "s"), ("user", "a")], "S:s;U:a;A:"),
        ([("user", "a"), ("assistant", "b"), ("user", "c")], "U:a;A:b;U:c;A:"),
        # What the assistant has begun is gone on with.
        ([("user", "a"), ("assistant", "b")], "U:a;A:b"),
        ([("user", "a"), ("system", "s"), ("user", "c")], "U:a;A:;S:s;U:c;A:"),
        (
            [("user", "a"), ("user", "b"), ("assistant", "c"), ("assistant", "d"), ("user", "e")],
            "U:a\n\nb;A:c\n\nd;U:e;A:",
        ),
        # There is no place for results of functions.
        ([("user", "a"), ("tool", "t"), ("assistant", "b"), ("user", "c")], "U:a;A:b;U:c;A:"),
        ([], "A:"),
    ],
)
def test_templates_of_one_exchange(turns: list[tuple[str, str]], expected: str) -> None:
    assert render(PHI, chat(*turns)) == expected


def test_a_template_without_a_response_ends_with_it() -> None:
    assert render("<{{ .Prompt }}>", chat(("user", "a"), ("assistant", "b"), ("user", "c"))) == "<a>b<c>"
    assert render("plain", chat(("user", "a"), ("assistant", "b"))) == "plainb"


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ .Prompt }}[{{ .Response }}]", "a["),
        ("{{ if .Prompt }}{{ .Prompt }}[{{ .Response }}]{{ else }}x{{ end }}tail", "a["),
        ("{{ .Prompt }}{{ if .Response }}[{{ .Response }}]{{ else }}({{ end }}tail", "a("),
        ("{{ .Prompt }}{{ with .Response }}{{ . }}]{{ end }}|", "a|"),
        ("{{ .Prompt }}{{ range 1 }}{{ $.Response }}]{{ end }}|", "a"),
        ("{{ .Prompt }}{{ .Response | printf `(%s` }})", "a("),
    ],
)
def test_the_last_exchange_ends_where_the_response_goes(template: str, expected: str) -> None:
    assert render(template, chat(("user", "a"))) == expected


def test_messages_are_merged_by_role_but_for_results() -> None:
    template = "{{ .System }}|{{ range .Messages }}{{ .Role }}:{{ .Content }};{{ end }}"
    turns = [
        ("system", "s"),
        ("system", "t"),
        ("user", "a"),
        ("user", "b"),
        ("tool", "x"),
        ("tool", "y"),
        ("system", "u"),
    ]
    assert render(template, chat(*turns)) == "s\n\nt\n\nu|system:s\n\nt;user:a\n\nb;tool:x;tool:y;system:u;"


@pytest.mark.parametrize(
    ("think", "expected"),
    [
        (frames_pb2.THINK_UNSPECIFIED, "false  false"),
        (frames_pb2.THINK_OFF, "false  true"),
        (frames_pb2.THINK_ON, "true  true"),
        (frames_pb2.THINK_HIGH, "true high true"),
    ],
)
def test_thinking(think: frames_pb2.Think.ValueType, expected: str) -> None:
    for start in ("{{ range .Messages }}{{ end }}", "{{ if .Prompt }}{{ end }}"):
        assert (
            render(start + "{{ .Think }} {{ .ThinkLevel }} {{ .IsThinkSet }}", chat(("user", "a"), think=think))
            == expected
        )


def test_calls_and_results() -> None:
    call = frames_pb2.ToolCall(id="c1", name="f", arguments='{"n": 2, "big": 123456789012345678901, "a": "<é>"}')
    messages = [
        frames_pb2.ChatMessage(role="assistant", thinking="hm", tool_calls=[call]),
        frames_pb2.ChatMessage(role="tool", content="r", tool_call_id="c1"),
    ]
    template = (
        "{{ range .Messages }}{{ .Role }} {{ .Thinking }} {{ .ToolName }} {{ .ToolCallID }};"
        "{{ range .ToolCalls }}{{ .ID }} {{ .Function.Index }} {{ .Function.Name }} {{ .Function.Arguments }}"
        "{{ range $k, $v := .Function.Arguments }} {{ $k }}={{ $v }}{{ end }}{{ json . }};{{ end }}{{ end }}"
    )
    arguments = '{"a":"\\u003cé\\u003e","big":123456789012345678901,"n":2}'
    assert render(template, frames_pb2.Chat(messages=messages)) == (
        f"assistant hm  ;c1 0 f {arguments} a=<é> big=123456789012345678901 n=2"
        f'{{"id":"c1","function":{{"index":0,"name":"f","arguments":{arguments}}}}};tool  f c1;'
    )


def test_arguments_that_are_no_object_are_none() -> None:
    call = frames_pb2.ToolCall(name="f", arguments="[1]")
    shown = frames_pb2.Chat(messages=[frames_pb2.ChatMessage(role="assistant", tool_calls=[call])])
    assert (
        render("{{ range .Messages }}{{ range .ToolCalls }}{{ .Function.Arguments }}{{ end }}{{ end }}", shown) == "{}"
    )


SCHEMA = {
    "properties": {
        "when": {"minimum": 1, "description": "d", "type": ["string", "null"]},
        "any": {"anyOf": [{"type": "number"}, {"type": "array"}]},
        "a": {"enum": ["x", 1], "type": "string"},
        "o": {"properties": {"q": {"type": "boolean"}}, "type": "object", "required": ["q"]},
    },
    "required": ["a"],
    "type": "object",
}


def test_functions_have_the_shape_that_templates_expect() -> None:
    tool = frames_pb2.Tool(name="f", description="D", parameters=json.dumps(SCHEMA))
    shown = chat(("user", "a"), tools=[tool])
    parameters = (
        '{"type":"object","required":["a"],"properties":{"a":{"type":"string","enum":["x",1]},'
        '"any":{"anyOf":[{"type":"number"},{"type":"array"}]},'
        '"o":{"type":"object","properties":{"q":{"type":"boolean"}},"required":["q"]},'
        '"when":{"type":["string","null"],"description":"d","minimum":1}}}'
    )
    function = f'{{"name":"f","description":"D","parameters":{parameters}}}'
    start = "{{ range .Messages }}{{ end }}"
    assert render(start + "{{ .Tools }}", shown) == f'[{{"type":"function","function":{function}}}]'
    assert render(start + "{{ range .Tools }}{{ .Function }}{{ end }}", shown) == function
    assert render(start + "{{ json (index .Tools 0).Function.Parameters }}", shown) == parameters
    each = (
        "{{ range .Tools }}{{ range $n, $p := .Function.Parameters.Properties }}"
        "{{ $n }}: {{ toTypeScriptType $p }} {{ $p.Type }} {{ $p.Description }};{{ end }}{{ end }}"
    )
    assert render(start + each, shown) == (
        "a: string string ;any: number | any[] [] ;o: Record<string, any> object ;when: string | null [string null] d;"
    )


@pytest.mark.parametrize("parameters", ["", "[]", "1", '{"properties": 3}', '{"required": 1, "type": ["a"]}', "{"])
def test_odd_schemas_are_no_reason_to_fail(parameters: str) -> None:
    tool = frames_pb2.Tool(name="f", parameters=parameters)
    template = "{{ range .Messages }}{{ end }}{{ range .Tools }}{{ . }}{{ .Function.Parameters.Required }}{{ end }}"
    assert '"name":"f"' in render(template, chat(("user", "a"), tools=[tool]))


def test_functions_that_may_not_be_called_are_not_shown() -> None:
    template = "{{ range .Messages }}{{ end }}{{ if .Tools }}yes{{ else }}no{{ end }}"
    tools = [frames_pb2.Tool(name="f")]
    assert render(template, chat(("user", "a"), tools=tools)) == "yes"
    assert render(template, chat(("user", "a"), tools=tools, tool_choice=frames_pb2.TOOL_CHOICE_NONE)) == "no"


def test_a_gap_is_filled_by_templates_that_know_of_it() -> None:
    template = "{{ if .Suffix }}<PRE>{{ .Prompt }}<SUF>{{ .Suffix }}<MID>{{ else }}{{ .Prompt }}{{ end }}"
    assert render(template, chat(("user", "a"), suffix="z")) == "<PRE>a<SUF>z<MID>"
    assert render(template, chat(("user", "a"))) == "a"


def test_limits_hold_for_all_exchanges_together() -> None:
    turns = [(role, "x") for _ in range(50) for role in ("user", "assistant")]
    renderer = GoRenderer("{{ range 100 }}{{ end }}{{ .Prompt }}{{ .Response }}", max_bytes=1000, max_steps=3000)
    with pytest.raises(TemplateFailure, match="3000 steps"):
        renderer.render_chat(chat(*turns))
    renderer = GoRenderer("{{ range 30 }}a{{ end }}{{ .Prompt }}{{ .Response }}", max_bytes=1000)
    with pytest.raises(TemplateFailure, match="1000 bytes"):
        renderer.render_chat(chat(*turns))


def test_what_does_not_compile_is_no_renderer() -> None:
    with pytest.raises(TemplateSyntax, match="line 1, column 7"):
        GoRenderer("{{ if }}", max_bytes=10)
