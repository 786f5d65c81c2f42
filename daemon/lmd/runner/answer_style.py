"""How a model writes its thoughts and its calls of functions, found from the text of its chat template.

A template shows how earlier calls and thoughts are written, and so how the model was taught to write new ones: by its
markers. The families differ in little, so each is a line in a table here; `answer_parser` reads them and
`forced_calls` writes the grammars for them.
"""

from __future__ import annotations

import enum
import functools
import re
from dataclasses import dataclass

from lmd.gotemplate.survey import is_go_template
from lmd.runner.go_style import marks_of


class Form(enum.Enum):
    """How one call is written, between the markers around it."""

    #: `{"name": "f", "arguments": {…}}`
    OBJECT = enum.auto()
    #: `f[ARGS]{…}`
    NAMED = enum.auto()
    #: `<function=f>`, and each argument between `<parameter=…>` and `</parameter>`
    TAGGED = enum.auto()
    #: ` to=functions.f<|channel|>commentary json<|message|>{…}`, which only whole answers in channels can hold
    CHANNEL = enum.auto()


@dataclass(frozen=True, slots=True)
class Thoughts:
    """What is around thoughts."""

    opener: str
    closer: str


@dataclass(frozen=True, slots=True)
class Calls:
    """How calls are written.

    Attributes:
        opener: the marker before them; empty when calls are told from text only by what they are.
        closer: the marker after them; empty when they end by themselves.
        form: how one call is written.
        listed: all calls are in one JSON list; otherwise each has its own markers.
        pad: what the model writes between a marker and the call.
        gap: what the model writes between one call and the next.
        name_key: the key of the function's name.
        arguments_key: the key of its arguments.
        lead: what the model writes before the name.
        bare: an answer may begin with a call without any marker.
        unmarked: the model was taught to write calls without the markers.
    """

    opener: str
    closer: str
    form: Form = Form.OBJECT
    listed: bool = False
    bare: bool = False
    unmarked: bool = False
    pad: str = ""
    gap: str = ""
    name_key: str = "name"
    arguments_key: str = "arguments"
    lead: str = ""


@dataclass(frozen=True, slots=True)
class AnswerStyle:
    """How a model answers; None where it does not think, or does not call functions.

    Attributes:
        final: what the model writes before the text of its answer; empty when that needs no mark.
    """

    thoughts: Thoughts | None = None
    calls: Calls | None = None
    final: str = ""

    @property
    def in_channels(self) -> bool:
        """Whether answers are messages in channels, as those of gpt-oss are."""
        return self.calls is not None and self.calls.form is Form.CHANNEL

    @property
    def markers(self) -> tuple[str, ...]:
        """The special tokens that the parser must see as text, where the vocabulary has them."""
        markers: list[str] = []
        if self.in_channels:
            return CHANNEL_MARKERS
        if self.thoughts is not None:
            markers += [self.thoughts.opener, self.thoughts.closer]
        if self.calls is not None:
            markers += [self.calls.opener, self.calls.closer]
            if self.calls.opener == _MISTRAL.opener:
                markers += ["[ARGS]", "[CALL_ID]"]
        return tuple(dict.fromkeys(marker for marker in markers if marker))

    def opens_thoughts(self, prompt: str) -> bool:
        """Tell whether a rendered prompt ends inside thoughts, so that the answer begins with them."""
        return self.thoughts is not None and prompt.rstrip().endswith(self.thoughts.opener.rstrip())


@dataclass(frozen=True, slots=True)
class Gate:
    """What comes before the text that a constraint is for.

    Attributes:
        opener: what begins thoughts.
        closer: what ends them.
        lead: what comes first where there are no thoughts.
        lead_after: what comes first after thoughts.
    """

    opener: str
    closer: str
    lead: str = ""
    lead_after: str = ""


def gate_of(style: AnswerStyle, *, calls: bool) -> Gate | None:
    """Return the gate before an answer in *style*; None where the answer begins at once.

    *calls*: what is behind it are calls, and not text.
    """
    if style.thoughts is None:
        return None
    opener, closer = style.thoughts.opener, style.thoughts.closer
    if not style.in_channels:
        return Gate(opener, closer)
    lead = "" if calls else style.final
    return Gate(opener, closer, lead, "<|start|>assistant" + lead)


#: What messages in channels are made of. `<|call|>` and `<|return|>` end an answer.
CHANNEL_MARKERS = ("<|start|>", "<|channel|>", "<|constrain|>", "<|message|>", "<|end|>", "<|call|>", "<|return|>")
_CHANNELS = AnswerStyle(
    thoughts=Thoughts("<|channel|>analysis<|message|>", "<|end|>"),
    calls=Calls(" to=functions.", "", Form.CHANNEL),
    final="<|channel|>final<|message|>",
)

_THOUGHTS = (
    Thoughts("<think>", "</think>"),
    Thoughts("<|START_THINKING|>", "<|END_THINKING|>"),
    Thoughts("[THINK]", "[/THINK]"),
    Thoughts("<seed:think>", "</seed:think>"),
    Thoughts("<|channel>thought\n", "<channel|>"),
    Thoughts("<thinking>", "</thinking>"),
    Thoughts("<thought>", "</thought>"),
    Thoughts("<reasoning>", "</reasoning>"),
)

_MISTRAL = Calls("[TOOL_CALLS]", "", listed=True)
_LLAMA3 = Calls("<|python_tag|>", "", bare=True, unmarked=True, gap="; ", arguments_key="parameters")
# Small models of this family often forget the markers.
_HERMES = Calls("<tool_call>", "</tool_call>", bare=True, pad="\n", gap="\n")
_GENERIC = Calls("", "", bare=True, unmarked=True, gap="\n")
# Each with the texts that a template must have. The first whose texts are all there is taken.
_CALLS: tuple[tuple[tuple[str, ...], Calls], ...] = (
    (("[TOOL_CALLS]", "[ARGS]"), Calls("[TOOL_CALLS]", "", Form.NAMED)),
    (("[TOOL_CALLS]",), _MISTRAL),
    (("<tool_calls>[",), Calls("<tool_calls>", "</tool_calls>", listed=True)),
    (("<tool_calls>", "</tool_calls>"), Calls("<tool_calls>", "</tool_calls>", pad="\n", gap="\n")),
    (("<tool_call>", "<function="), Calls("<tool_call>", "</tool_call>", Form.TAGGED, pad="\n", gap="\n")),
    (("<tool_call>", '"name"'), _HERMES),
    (("<TOOLCALL>",), Calls("<TOOLCALL>", "</TOOLCALL>", listed=True)),
    (
        ("<|START_ACTION|>", "tool_name"),
        Calls(
            "<|START_ACTION|>",
            "<|END_ACTION|>",
            listed=True,
            name_key="tool_name",
            arguments_key="parameters",
            lead='"tool_call_id": "0", ',
        ),
    ),
    (("<|tool_call|>", "<|/tool_call|>"), Calls("<|tool_call|>", "<|/tool_call|>")),
    (("<|tool_call|>", "JSON list"), Calls("<|tool_call|>", "", listed=True)),
    (("functools[",), Calls("functools", "", listed=True)),
    (("<|python_tag|>", '"parameters"'), _LLAMA3),
    (('{"name": function name, "parameters":',), _LLAMA3),
)
_MENTIONS_TOOLS = re.compile(r"\btools\b")


@functools.lru_cache(maxsize=16)
def style_of(template: str) -> AnswerStyle:
    """Return how a model with this chat template answers.

    A template that shows functions in none of the known ways gets JSON: models that were taught something else often
    write that, and with a grammar all do.
    """
    if "<|channel|>" in template and "<|message|>" in template:
        return _CHANNELS
    # In a template quotes may stand in quotes.
    plain = template.replace('\\"', '"')
    if is_go_template(template):
        return _go_style(plain, template)
    return AnswerStyle(thoughts=_thoughts_of(template), calls=_calls_of(plain))


def _go_style(plain: str, template: str) -> AnswerStyle:
    """Return the style of a known family, else what the template itself writes around thoughts and calls."""
    marks = marks_of(template)
    thoughts, calls = _thoughts_of(template), _known_calls(plain)
    if thoughts is None and marks.thoughts is not None:
        thoughts = Thoughts(*marks.thoughts)
    if calls is None and marks.calls is not None:
        opener, closer = marks.calls
        calls = Calls(
            opener,
            closer,
            listed=marks.listed,
            bare=not opener,
            unmarked=not opener,
            gap="" if marks.listed else "\n",
            name_key=marks.name_key,
            arguments_key=marks.arguments_key,
        )
    if calls is None and ".Tools" in template:
        calls = _GENERIC
    return AnswerStyle(thoughts=thoughts, calls=calls)


def _thoughts_of(template: str) -> Thoughts | None:
    for thoughts in _THOUGHTS:
        # Most templates write no opener of their own, or look only for the closer, to cut off earlier thoughts.
        if thoughts.closer in template or thoughts.opener.rstrip() in template:
            return thoughts
    return None


def _calls_of(template: str) -> Calls | None:
    return _known_calls(template) or (_GENERIC if _MENTIONS_TOOLS.search(template) else None)


def _known_calls(template: str) -> Calls | None:
    for texts, calls in _CALLS:
        if all(text in template for text in texts):
            return calls
    return None
