"""How a model answers is found from its chat template."""

from __future__ import annotations

import pytest

from lmd.runner.answer_style import AnswerStyle, Calls, Form, Thoughts, gate_of, style_of
from tests.support.answers import STYLES
from tests.support.library_models import modelfile

# The parts of well-known templates that matter, in other words: what they say of functions and of earlier calls.
QWEN = r"""{%- if tools %}{{- "<|im_start|>system\nSignatures are in <tools></tools>.\n" }}
{%- for tool in tools %}{{- tool | tojson }}{%- endfor %}
{{- "Calls are JSON in <tool_call></tool_call>:\n<tool_call>\n{\"name\": <function>, \"arguments\": <args>}" }}
{%- endif %}{%- for message in messages %}{%- for tool_call in message.tool_calls %}
{{- '<tool_call>\n{"name": "' + tool_call.name + '", "arguments": ' }}{{- '}\n</tool_call>' }}
{%- endfor %}{%- endfor %}{{- '<|im_start|>assistant\n' }}"""
QWEN3 = (
    QWEN
    + r"""{%- set content = content.split('</think>')[-1].lstrip('\n') %}
{%- if enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}"""
)
QWEN_CODER = r"""{%- if tools %}{{- '<tool_call>\n<function=f>\n<parameter=a>\nb\n</parameter>\n</function>\n' }}
{{- '</tool_call>' }}{%- endif %}"""
LLAMA31 = r"""{%- if tools is not none %}
{{- 'Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}.' }}
{%- endif %}{{- "<|python_tag|>" + tool_call.name + ".call(" }}{{- '"parameters": ' }}"""
LLAMA32 = r"""{%- if tools is not none %}
{{- 'Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}.' }}
{%- endif %}{{- '{"name": "' + tool_call.name + '", "parameters": ' }}"""
NEMO = """{{- "[AVAILABLE_TOOLS][" }}{% for tool in tools %}{% endfor %}{{- "[TOOL_CALLS][" }}"""
MINISTRAL = """{% for tool in tools %}{% endfor %}{{- '[TOOL_CALLS]' + name + '[ARGS]' + arguments }}
{{- '[THINK]' + block['thinking'] + '[/THINK]' }}"""
NEMOTRON = """{% if tools %}Use <TOOLCALL>[{"name": "f", "arguments": {}}]</TOOLCALL>{% endif %}{{ '<think>\n' }}"""
COMMAND = """{% if tools %}{% endif %}<|START_THINKING|>{{ plan }}<|END_THINKING|><|START_ACTION|>[
{"tool_call_id": "0", "tool_name": "{{ name }}", "parameters": {{ arguments|tojson }}}]<|END_ACTION|>"""
GPT_OSS = """{%- if tools %}functions{%- endif %}
{{- "<|start|>assistant<|channel|>analysis<|message|>" + thinking + "<|end|>" }}
{{- "<|start|>assistant to=functions." + name + "<|channel|>commentary json<|message|>" + arguments + "<|call|>" }}"""
GENERIC = """{% if tools %}Answer with JSON to call one of {{ tools | tojson }}.{% endif %}"""
DEEPSEEK_R1 = """{% set content = content.split('</think>')[-1] %}{{ 'assistant: <think>\n' }}"""
CHATML = "{% for message in messages %}{{ '<|im_start|>' + message.role + message.content }}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "calls", "thoughts"),
    [
        (QWEN, "hermes", None),
        (QWEN3, "hermes", "<think>"),
        (QWEN_CODER, "tagged", None),
        (LLAMA31, "llama3", None),
        (LLAMA32, "llama3", None),
        (NEMO, "mistral", None),
        (MINISTRAL, "mistral named", "[THINK]"),
        (NEMOTRON, "list", "<think>"),
        (COMMAND, "cohere", "<|START_THINKING|>"),
        (GPT_OSS, "channels", "<|channel|>analysis<|message|>"),
        (GENERIC, "generic", None),
        (DEEPSEEK_R1, None, "<think>"),
        (CHATML, None, None),
        ("", None, None),
        ("{{ '<thinking>' }}{{ '</thinking>' }}", None, "<thinking>"),
    ],
)
def test_a_template_tells_how_the_model_answers(template: str, calls: str | None, thoughts: str | None) -> None:
    style = style_of(template)
    assert style.calls == (STYLES[calls].calls if calls is not None else None)
    assert (style.thoughts.opener if style.thoughts is not None else None) == thoughts


GO_TAGS = """{{ range .Messages }}{{ if .Thinking }}<|thought|>
{{ .Thinking }}
<|/thought|>{{ end }}{{ if .ToolCalls }}<|call|>[
{{- range .ToolCalls }}{"tool": "{{ .Function.Name }}", "args": {{ .Function.Arguments }}}{{ end }}]<|/call|><|end|>
{{ else if .Content }}{{ .Content }}{{ end }}{{ end }}{{ range .Tools }}{{ . }}{{ end }}"""
GO_EACH = """{{ range .Messages }}{{ range .ToolCalls }}<fn>{"name": "{{ .Function.Name }}",
"arguments": {{ json .Function.Arguments }}}</fn>
{{ end }}{{ end }}{{ .Tools }}"""
GO_BARE = """{{ range .Messages }}{{ range .ToolCalls }}
{"name": "{{ .Function.Name }}", "parameters": {{ .Function.Arguments }}}<|eot|>{{ end }}{{ end }}{{ .Tools }}"""


@pytest.mark.parametrize(
    ("template", "calls", "thoughts"),
    [
        (modelfile("qwen25", "go"), "hermes", None),
        (modelfile("llama31", "go"), "llama3", None),
        (modelfile("mistral", "go"), "mistral", None),
        (modelfile("qwen3", "go"), None, "<think>"),
        (modelfile("phi3", "go"), None, None),
        ("{{ range .Tools }}{{ . }}{{ end }}", "generic", None),
        ("{{ .Prompt }} has no tools", None, None),
        ("{{ if .Tools }}" + GPT_OSS.replace("{%", "{"), "channels", "<|channel|>analysis<|message|>"),
    ],
)
def test_a_go_template_tells_how_the_model_answers(template: str, calls: str | None, thoughts: str | None) -> None:
    test_a_template_tells_how_the_model_answers(template, calls, thoughts)


def test_what_a_go_template_writes_around_thoughts_and_calls() -> None:
    tags = style_of(GO_TAGS)
    assert tags.thoughts == Thoughts("<|thought|>", "<|/thought|>")
    assert tags.calls == Calls("<|call|>", "<|/call|>", listed=True, name_key="tool", arguments_key="args")
    assert style_of(GO_EACH).calls == Calls("<fn>", "</fn>", gap="\n")
    bare = style_of(GO_BARE).calls
    assert bare == Calls("", "", bare=True, unmarked=True, gap="\n", arguments_key="parameters")
    assert style_of(GO_TAGS + "{{ if }}").thoughts is None


def test_markers_are_those_the_parser_looks_for() -> None:
    assert set(style_of(QWEN3).markers) == {"<think>", "</think>", "<tool_call>", "</tool_call>"}
    assert set(style_of(MINISTRAL).markers) == {"[THINK]", "[/THINK]", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"}
    assert style_of(LLAMA32).markers == ("<|python_tag|>",)
    assert {"<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|constrain|>"} < set(style_of(GPT_OSS).markers)
    assert style_of(CHATML).markers == ()


@pytest.mark.parametrize(
    ("template", "prompt", "opens"),
    [
        (QWEN3, "<|im_start|>assistant\n<think>\n", True),
        (QWEN3, "<|im_start|>assistant\n<think>", True),
        (QWEN3, "<|im_start|>assistant\n<think>\n\n</think>\n\n", False),
        (QWEN3, "<|im_start|>assistant\n", False),
        (GPT_OSS, "<|start|>assistant", False),
        (GPT_OSS, "<|start|>assistant<|channel|>analysis<|message|>", True),
        (CHATML, "<think>", False),
    ],
)
def test_a_prompt_may_end_inside_thoughts(template: str, prompt: str, opens: bool) -> None:
    assert style_of(template).opens_thoughts(prompt) is opens


def test_a_gate_is_what_comes_before_the_answer() -> None:
    assert gate_of(style_of(QWEN), calls=True) is None
    thinks = gate_of(style_of(QWEN3), calls=False)
    assert thinks is not None
    assert (thinks.opener, thinks.closer, thinks.lead, thinks.lead_after) == ("<think>", "</think>", "", "")
    text, calls = gate_of(style_of(GPT_OSS), calls=False), gate_of(style_of(GPT_OSS), calls=True)
    assert text is not None
    assert calls is not None
    assert text.lead == "<|channel|>final<|message|>"
    assert text.lead_after == "<|start|>assistant<|channel|>final<|message|>"
    assert (calls.lead, calls.lead_after) == ("", "<|start|>assistant")


def test_only_answers_in_channels_are_in_channels() -> None:
    assert style_of(GPT_OSS).in_channels
    assert not style_of(QWEN3).in_channels
    assert not AnswerStyle().in_channels
    calls = style_of(GPT_OSS).calls
    assert calls is not None
    assert calls.form is Form.CHANNEL
