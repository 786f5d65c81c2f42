"""What a model says is taken apart into thoughts, text and calls, and nothing of it is lost."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lmd.runner import answer_parser
from lmd.runner.answer_parser import AnswerParser, Call, Part
from lmd.runner.answer_style import AnswerStyle
from tests.support.answers import STYLES, THINK, TOOLS, calls_in, cut_up, read, text_in, write_calls

HERMES, LLAMA3, MISTRAL, TAGGED = STYLES["hermes"], STYLES["llama3"], STYLES["mistral"], STYLES["tagged"]
GENERIC, CHANNELS, NAMED = STYLES["generic"], STYLES["channels"], STYLES["mistral named"]
F = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
CALL_F = Part(call=Call("f", '{"a": 1}'))


_RUNNER = str(Path(answer_parser.__file__).parent)


def text(value: str) -> Part:
    return Part(text=value)


def thinking(value: str) -> Part:
    return Part(thinking=value)


def call(name: str, arguments: str) -> Part:
    return Part(call=Call(name, arguments))


EXAMPLES: list[tuple[AnswerStyle, str, list[Part]]] = [
    (HERMES, "Hello", [text("Hello")]),
    (HERMES, " \n Hello \n", [text(" \n Hello \n")]),
    (HERMES, "", []),
    (HERMES, " \n", [text(" \n")]),
    # Thoughts.
    (HERMES, "<think>\nhm\n</think>\n\nHello", [thinking("hm"), text("Hello")]),
    (HERMES, "\n<think>a\n\nb</think>Hello\n", [thinking("a\n\nb"), text("Hello\n")]),
    (HERMES, "<think>\n\n</think>\n\nHello", [text("Hello")]),
    (HERMES, "<think>hm", [thinking("hm")]),
    (HERMES, "<think>hm</thin", [thinking("hm</thin")]),
    (HERMES, "<thin", [text("<thin")]),
    (HERMES, "The tag <think> opens</think>", [text("The tag <think> opens</think>")]),
    (HERMES, f"<think>{F}</think>Hello", [thinking(F), text("Hello")]),
    (HERMES, f"<think>hm</think>\n\n{F}\n", [thinking("hm"), CALL_F]),
    (MISTRAL, "[THINK]hm[/THINK]Hello", [thinking("hm"), text("Hello")]),
    # Calls with text around them.
    (HERMES, F, [CALL_F]),
    (HERMES, f"\n\n{F}\n", [CALL_F]),
    (HERMES, f"{F}\n{F}", [CALL_F, CALL_F]),
    (HERMES, f"{F}{F}", [CALL_F, CALL_F]),
    (HERMES, f"Let me see.\n\n{F}\n", [text("Let me see."), CALL_F]),
    (HERMES, f"{F}\nDone.", [CALL_F, text("Done.")]),
    (HERMES, f"First.\n{F}\nThen.\n", [text("First."), CALL_F, text("\nThen.\n")]),
    (HERMES, F.replace("\n", ""), [CALL_F]),
    (HERMES, F.removesuffix("</tool_call>"), [CALL_F]),
    (HERMES, F.removesuffix("_call>"), [CALL_F]),
    (HERMES, '<tool_call>{"name": "get"}</tool_call>', [call("get", "{}")]),
    (HERMES, '<tool_call>{"name": "get", "arguments": null}</tool_call>', [call("get", "{}")]),
    (
        HERMES,
        '<tool_call>[{"name": "get"}, {"name": "f", "parameters": {}}]</tool_call>',
        [call("get", "{}"), call("f", "{}")],
    ),
    # Arguments stay as they are written, where that is a JSON object.
    (
        HERMES,
        '<tool_call>{"arguments": { "a" : 1.50, "é": "}</tool_call>{\\"" , "n":[{"":{}}]}, "name": "f"}</tool_call>',
        [call("f", '{ "a" : 1.50, "é": "}</tool_call>{\\"" , "n":[{"":{}}]}')],
    ),
    (HERMES, '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', [CALL_F]),
    (HERMES, '<tool_call>{"name": "f", "arguments": {"a": "x\ny"}}</tool_call>', [call("f", '{"a": "x\\ny"}')]),
    (
        HERMES,
        '<tool_call>{"name": "f", "arguments": "{\\"a\\": \\"\\ud800\\"}"}</tool_call>',
        [call("f", '{"a": "\\ud800"}')],
    ),
    # Without markers, only calls of known functions are calls.
    (LLAMA3, '{"name": "f", "parameters": {"a": 1}}', [CALL_F]),
    (LLAMA3, ' {"type": "function", "name": "f", "parameters": {"a": 1}}\n', [CALL_F]),
    (LLAMA3, '<|python_tag|>{"name": "f", "parameters": {"a": 1}}', [CALL_F]),
    (LLAMA3, 'Yes.\n<|python_tag|>{"name": "f", "parameters": {"a": 1}}', [text("Yes."), CALL_F]),
    (LLAMA3, '{"name": "f", "parameters": {"a": 1}}; {"name": "get", "parameters": {}}', [CALL_F, call("get", "{}")]),
    (LLAMA3, '{"name": "f", "parameters": {"a": 1}}\nDone', [CALL_F, text("Done")]),
    (GENERIC, '[{"name": "f", "arguments": {"a": 1}}, {"name": "get", "arguments": {}}]', [CALL_F, call("get", "{}")]),
    (GENERIC, '<think>hm</think>{"name": "f", "arguments": {"a": 1}}', [thinking("hm"), CALL_F]),
    # So do models that have markers and forget them.
    (HERMES, '{"name": "f", "arguments": {"a": 1}}\n{"name": "get", "arguments": {}}', [CALL_F, call("get", "{}")]),
    (HERMES, '{"name": "f", "arguments": {"a": 1}}, so', [CALL_F, text(", so")]),
    # Lists and names.
    (MISTRAL, '[TOOL_CALLS][{"name": "f", "arguments": {"a": 1}, "id": "123456789"}]', [CALL_F]),
    (MISTRAL, 'Yes.[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}}]\n', [text("Yes."), CALL_F]),
    (NAMED, '[TOOL_CALLS]f[ARGS]{"a": 1}[TOOL_CALLS]get[CALL_ID]x1[ARGS]{}', [CALL_F, call("get", "{}")]),
    # Tags.
    (
        TAGGED,
        "<tool_call>\n<function=f>\n<parameter=s>\n1\n</parameter>\n<parameter=n>\n1\n</parameter>\n</function>\n</tool_call>",
        [call("f", '{"s": "1", "n": 1}')],
    ),
    (
        TAGGED,
        '<tool_call><function=f><parameter=s>a\n</tool_call>"</parameter><parameter=b>True</parameter></function></tool_call>',
        [call("f", '{"s": "a\\n</tool_call>\\"", "b": true}')],
    ),
    (TAGGED, "<tool_call>\n<function=get>\n</function>\n</tool_call>\n", [call("get", "{}")]),
    (
        TAGGED,
        '<tool_call><function=get><parameter=x>["</parameter>"]</parameter></function></tool_call>',
        [call("get", '{"x": ["</parameter>"]}')],
    ),
    # Channels.
    (
        CHANNELS,
        "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>Hello",
        [thinking("hm"), text("Hello")],
    ),
    (
        CHANNELS,
        "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>commentary to=functions.f "
        '<|constrain|>json<|message|>{"a": 1}',
        [thinking("hm"), CALL_F],
    ),
    (CHANNELS, ' to=functions.f<|channel|>commentary json<|message|>{"a": 1}<|call|>', [CALL_F]),
    (
        CHANNELS,
        "<|channel|>commentary<|message|>I look.<|end|><|start|>assistant<|channel|>commentary to=functions.get"
        "<|message|><|call|>",
        [text("I look."), call("get", "{}")],
    ),
    (
        CHANNELS,
        "<|channel|>commentary<|message|>One<|end|><|start|>assistant<|channel|>final<|message|>Two<|return|>",
        [text("One\n\nTwo")],
    ),
    (CHANNELS, "Hello <b>there</b>", [text("Hello <b>there</b>")]),
    (CHANNELS, "assistant", [text("assistant")]),
    (CHANNELS, "<|channel|>final<|message|>a <|b", [text("a <|b")]),
    (CHANNELS, "<|channel|>analy", []),
    (
        CHANNELS,
        "<|channel|>final<|message|>Hello<|channel|>analysis<|message|>hm",
        [text("Hello"), thinking("hm")],
    ),
]

# Answers that hold no call, only what looks like one.
NOT_CALLS = [
    (HERMES, '<tool_call>\n{"name": "nobody", "arguments": {}}\n</tool_call>'),
    (HERMES, '<tool_call>\n{"name": "f", "arguments": {}\n</tool_call>'),
    (HERMES, '<tool_call>\n{"name": "f", "argum'),
    (HERMES, '<tool_call>{"name": "f", "arguments": [1]}</tool_call>'),
    (HERMES, '<tool_call>{"name": "f", "arguments": "no"}</tool_call>'),
    (HERMES, '<tool_call>{"name": "f", "arguments": {"a": NaN}}</tool_call>'),
    (HERMES, '<tool_call>{"name": "f", "arguments": {"a": 01}}</tool_call>'),
    (HERMES, '<tool_call>{"name": "f", "arguments": {}} and more</tool_call>'),
    (HERMES, "<tool_call>{}</tool_call>"),
    (HERMES, "<tool_call></tool_call>"),
    (HERMES, "<tool_call>[]</tool_call>"),
    (HERMES, "<tool_call>" + '{"a":' * 200 + "1" + "}" * 200 + "</tool_call>"),
    (HERMES, "Models write <tool_call> first.\n"),
    (HERMES, "<tool_call"),
    (HERMES, '{"name": "f"}'),
    (HERMES, 'So: {"name": "f", "arguments": {}}'),
    (LLAMA3, '{"city": "Paris"}'),
    (LLAMA3, '{"name": "Alice", "parameters": {}}'),
    (LLAMA3, '{"name": "f", "age": 3}'),
    (LLAMA3, '{"name": "f", "parameters": [1]}'),
    (LLAMA3, '{"name": "f"}'),
    (LLAMA3, '{"name": "f", "parameters": {}'),
    (LLAMA3, 'So: {"name": "f", "parameters": {}}'),
    (LLAMA3, "<|python_tag|>print(1)"),
    (LLAMA3, '[{"name": "f", "parameters": {}}]'),
    (GENERIC, '[1, 2, {"name": "f", "arguments": {}}]'),
    (GENERIC, '{"a": {"name": "f", "arguments": {}}}'),
    (MISTRAL, '[TOOL_CALLS][{"name": "nobody", "arguments": {}}]'),
    (MISTRAL, '[TOOL_CALLS][{"name": "f", "arguments": {}}'),
    (NAMED, "[TOOL_CALLS]nobody[ARGS]{}"),
    (NAMED, "[TOOL_CALLS]f[ARGS]{"),
    (NAMED, "[TOOL_CALLS]f[X]{}"),
    (TAGGED, "<tool_call><function=nobody></function></tool_call>"),
    (TAGGED, "<tool_call><function=f><parameter=s>\nx"),
    (TAGGED, "<tool_call><function=f><parameter=s>x</parameter>y</function></tool_call>"),
    (CHANNELS, "<|channel|>commentary to=functions.nobody<|message|>{}<|call|>"),
    (CHANNELS, '<|channel|>commentary to=functions.f<|message|>{"a": <|call|>'),
    (CHANNELS, '<|channel|>commentary to=functions.f<|message|>{"a'),
]


@pytest.mark.parametrize(("style", "answer", "parts"), EXAMPLES)
def test_an_answer_has_parts(style: AnswerStyle, answer: str, parts: list[Part]) -> None:
    assert read(style, [answer]) == parts
    assert read(style, answer) == parts, "character by character"


@pytest.mark.parametrize(("style", "answer"), NOT_CALLS)
def test_what_only_looks_like_a_call_is_text(style: AnswerStyle, answer: str) -> None:
    assert read(style, [answer]) == [text(answer)]
    assert read(style, answer) == [text(answer)], "character by character"


def test_a_call_after_what_only_looks_like_one_is_found() -> None:
    assert read(HERMES, [f"Write <tool_call>. {F}"]) == [text("Write <tool_call>."), CALL_F]
    assert read(HERMES, [f'<tool_call>{{"name": {F}']) == [text('<tool_call>{"name":'), CALL_F]


def test_thoughts_that_the_prompt_has_opened() -> None:
    assert read(HERMES, ["\nhm\n</think>\n\nHello"], opened=True) == [thinking("hm"), text("Hello")]
    assert read(HERMES, ["<think>\nhm</think>Hello"], opened=True) == [thinking("hm"), text("Hello")], "said again"
    assert read(HERMES, ["hm"], opened=True) == [thinking("hm")]
    assert read(HERMES, "<th", opened=True) == [thinking("<th")]
    assert read(CHANNELS, ["hm<|end|><|start|>assistant<|channel|>final<|message|>Hi"], opened=True) == [
        thinking("hm"),
        text("Hi"),
    ]


def test_half_a_marker_says_nothing_where_the_answer_was_cut() -> None:
    assert read(HERMES, ["<think>hm</thi"], cut=True) == [thinking("hm")]
    assert read(CHANNELS, ["<|channel|>analysis<|message|>hm<|end|><|start|>assist"], cut=True) == [thinking("hm")]
    # Where no marker must come, it may be what it looks like.
    assert read(HERMES, ["the <tool_ca"], cut=True) == [text("the <tool_ca")]
    assert read(CHANNELS, ["assist"], cut=True) == [text("assist")]


def test_thoughts_are_text_where_they_are_not_asked_for() -> None:
    answer = f"\n<think>\n{F}\n</think>\n\nHello\n{F}"
    assert read(HERMES, [answer], thinking=False) == [text(f"\n<think>\n{F}\n</think>\n\nHello"), CALL_F]
    assert read(HERMES, answer, thinking=False, calls=False) == [text(answer)]
    assert read(HERMES, [f"{F}</think>Hello"], thinking=False, opened=True) == [text(f"{F}</think>Hello")]


def test_calls_are_text_where_they_are_not_asked_for() -> None:
    assert read(HERMES, [f"<think>hm</think>{F}"], calls=False) == [thinking("hm"), text(F)]
    assert read(HERMES, [F], tools=[]) == [text(F)]
    assert read(AnswerStyle(thoughts=THINK), [F]) == [text(F)]


def feed_all(style: AnswerStyle, answer: str) -> list[str]:
    """Return the text that has come out after each character."""
    parser = AnswerParser(style, TOOLS, opened_thinking=False, parses_thinking=True, parses_calls=True)
    shown = [""]
    for character in answer:
        shown.append(shown[-1] + text_in(parser.feed(character)))
    return shown


@pytest.mark.parametrize("style", STYLES.values(), ids=STYLES.keys())
def test_text_goes_on_at_once(style: AnswerStyle) -> None:
    shown = feed_all(style, "Good morning, 1 < 2.")
    assert shown[-1] == "Good morning, 1 < 2."
    assert shown[len("Good")] == "Good"
    assert shown[len("Good morning, 1 < 2")] == "Good morning, 1 < 2"


def test_only_the_beginning_of_a_marker_is_held_back() -> None:
    shown = feed_all(HERMES, "say <tool_box> \n now")
    assert shown[len("say <tool_")] == "say"
    assert shown[len("say <tool_b")] == "say <tool_b"
    assert shown[len("say <tool_box> \n")] == "say <tool_box>"


@pytest.mark.parametrize(
    ("style", "answer", "known_at"),
    [
        (LLAMA3, '{"city": "Paris, Texas"}', '{"city"'),
        (LLAMA3, '{"name": "Alice", "parameters": {}}', '{"name": "Alice"'),
        (LLAMA3, '{"name": "f", "parameters": [1, 2, 3]}', '{"name": "f", "parameters": ['),
        (GENERIC, '[{"x": 1}]', '[{"x"'),
        (HERMES, '{"name": "Alice"}', '{"name": "Alice"'),
        (HERMES, "[1, 2, 3]", "[1"),
        (GENERIC, "[1, 2, 3]", "[1"),
    ],
)
def test_other_json_goes_on_as_soon_as_it_cannot_be_a_call(style: AnswerStyle, answer: str, known_at: str) -> None:
    assert feed_all(style, answer)[len(known_at)] == known_at


NAMES = st.sampled_from([tool.name for tool in TOOLS])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
ARGUMENTS = st.dictionaries(st.text(min_size=1, max_size=8), VALUES, max_size=4)
CUTS = st.lists(st.integers(0, 10_000), max_size=12)
JSON_STYLES = [name for name in STYLES if name != "tagged"]


@pytest.mark.parametrize("name", JSON_STYLES)
@given(data=st.data(), cuts=CUTS)
def test_calls_are_read_as_they_were_made(name: str, data: st.DataObject, cuts: list[int]) -> None:
    style = STYLES[name]
    made = data.draw(st.lists(st.tuples(NAMES, ARGUMENTS), min_size=1, max_size=1 if name == "channels" else 3))
    parts = read(style, cut_up(write_calls(style, made), cuts))
    assert [(call.name, json.loads(call.arguments)) for call in calls_in(parts)] == made
    assert len(parts) == len(made), "nothing else"


TAG_NAMES = st.text("abc_é-", min_size=1, max_size=6)
TAG_TEXTS = st.text().filter(lambda value: "</parameter>" not in value)
# A value without a declared type is read as JSON where it is some.
TAG_VALUES = st.lists(st.integers() | TAG_TEXTS, max_size=3) | st.booleans() | st.integers() | st.none()


@given(st.lists(st.tuples(TAG_TEXTS, st.dictionaries(TAG_NAMES, TAG_VALUES, max_size=3)), min_size=1, max_size=3), CUTS)
def test_tagged_calls_are_read_as_they_were_made(drawn: list[tuple[str, dict[str, object]]], cuts: list[int]) -> None:
    made: list[tuple[str, dict[str, object]]] = [
        ("f", {"s": said, **{f"x{k}": v for k, v in rest.items()}}) for said, rest in drawn
    ]
    parts = read(TAGGED, cut_up(write_calls(TAGGED, made), cuts))
    assert [(call.name, json.loads(call.arguments)) for call in calls_in(parts)] == made
    assert len(parts) == len(made), "nothing else"


FRAGMENTS = st.sampled_from(
    [
        *sorted({marker for style in STYLES.values() for marker in style.markers}),
        *'{ } [ ] " : , ; < > \\ a 1 é \n'.split(" "),
        " ",
        "\n\n",
        '{"name": "f", "arguments": {"a": 1}}',
        '{"name": "f", "parameters": {}}',
        '"name": "nobody"',
        "<function=f>",
        "<parameter=s>",
        "</parameter>",
        "</function>",
        " to=functions.f",
        "assistant",
        "analysis",
        "commentary",
        "final",
        "f",
        "<tool",
        "<|",
    ]
)
TEXTS = st.lists(FRAGMENTS | st.text(max_size=4), max_size=14).map("".join)
FLAGS = st.fixed_dictionaries({key: st.booleans() for key in ("opened", "thinking", "calls", "cut")})


@pytest.mark.parametrize("name", STYLES)
@given(answer=TEXTS, cuts=CUTS, flags=FLAGS)
def test_where_pieces_are_cut_does_not_matter(name: str, answer: str, cuts: list[int], flags: Any) -> None:
    whole = read(STYLES[name], [answer], **flags)
    assert read(STYLES[name], cut_up(answer, cuts), **flags) == whole
    assert read(STYLES[name], answer, **flags) == whole
    for found in calls_in(whole):
        assert found.name in {tool.name for tool in TOOLS}
        assert isinstance(json.loads(found.arguments), dict)


@pytest.mark.parametrize("name", [name for name in STYLES if name != "channels"])
@given(answer=TEXTS)
def test_without_thoughts_and_calls_the_text_is_the_answer(name: str, answer: str) -> None:
    parts = read(STYLES[name], [answer], thinking=False)
    if not calls_in(parts):
        assert text_in(parts) == answer


@pytest.mark.parametrize("name", [name for name in STYLES if name != "channels"])
@given(answer=TEXTS)
@example("<think>a</think> b")
def test_nothing_is_lost_but_markers_of_thoughts_and_whitespace(name: str, answer: str) -> None:
    style = STYLES[name]
    parts = read(style, [answer])
    if calls_in(parts):
        return
    kept = "".join(part.thinking + part.text for part in parts)
    expected = answer
    if style.thoughts is not None and answer.lstrip(" \t\r\n").startswith(style.thoughts.opener):
        expected = answer.replace(style.thoughts.opener, "", 1).replace(style.thoughts.closer, "", 1)
    assert "".join(kept.split()) == "".join(expected.split())


@given(st.lists(st.text("xyz .", min_size=1, max_size=6), min_size=1, max_size=5), st.data())
def test_no_message_in_a_channel_is_lost(contents: list[str], data: st.DataObject) -> None:
    channels = [data.draw(st.sampled_from(["analysis", "final", "commentary"])) for _ in contents]
    answer = "<|end|><|start|>assistant".join(
        f"<|channel|>{channel}<|message|>{content}" for channel, content in zip(channels, contents, strict=True)
    )
    parts = read(CHANNELS, [answer])
    for kind, found in (("analysis", [part.thinking for part in parts]), ("", [part.text for part in parts])):
        said = [text for channel, text in zip(channels, contents, strict=True) if (channel == "analysis") == bool(kind)]
        assert "\n\n".join(part for part in found if part).replace("\n", "") == "".join(said)


WORK = [
    "<tool_call>",
    "<tool_call>{",
    '<tool_call>{"',
    '<tool_call>{"a":"',
    '<tool_call>{",',
    '<tool_call>{"name": "nobody", "arguments": {}}</tool_call>',
    '<tool_call>{"name": "f", "arguments": {}}</tool_call>',
    "<tool_call><function=f><parameter=s>",
    "<tool_call><function=f><parameter=s></parameter>",
    '{"name": "f", "parameters": {}};',
    "<|python_tag|>{",
    "[TOOL_CALLS]f[ARGS]{",
    "[TOOL_CALLS][{",
    "<think>",
    "<",
    "\n",
    "a ",
    "<|channel|>",
    "<|channel|>final<|message|>",
    "<|end|>assistant ",
]


def count_lines(style: AnswerStyle, pieces: list[str]) -> int:
    """Return how many lines of the parser are executed for an answer."""
    count = 0

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal count
        count += event == "line"
        return trace if frame.f_code.co_filename.startswith(_RUNNER) else None

    former = sys.gettrace()
    parser = AnswerParser(style, TOOLS, opened_thinking=False, parses_thinking=True, parses_calls=True)
    sys.settrace(trace)
    try:
        for piece in pieces:
            parser.feed(piece)
        parser.finish(cut=False)
    finally:
        sys.settrace(former)
    return count


@pytest.mark.parametrize("name", STYLES)
@pytest.mark.parametrize("unit", WORK)
def test_work_grows_with_the_length_of_the_answer(name: str, unit: str) -> None:
    for size, counts in ((1, (15, 60)), (100_000, (100, 400))):
        answers = (cut_up(unit * count, range(0, len(unit) * count, size)) for count in counts)
        short, long = (count_lines(STYLES[name], pieces) for pieces in answers)
        assert long < 6 * short + 500, f"in pieces of {size}"
