"""The options of a command that say what an answer is asked to be."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from lmd.cli.errors import BadUsage
from lmd.cli.options import DURATION

if TYPE_CHECKING:
    from lmd.v1 import inference_service_pb2 as pb

_MAX_CHOICES = 16
_MAX_LOGPROBS = 20

_OPTIONS = (
    click.option(
        "--format",
        "format_text",
        metavar="FORMAT",
        help="Make the answer look like this: `json`, a JSON Schema (FILE.json, or its text), a grammar (FILE.gbnf), "
        "or `regex:EXPRESSION`.",
    ),
    click.option(
        "--context",
        type=click.Choice(["error", "truncate", "shift"]),
        help="When the context is too short: fail (the default), leave out the oldest messages, or that and go on "
        "past its end.",
    ),
    click.option("--timeout", type=DURATION, metavar="DURATION", help="Fail when it takes longer, such as 30s."),
    click.option(
        "--priority",
        type=click.Choice(["interactive", "batch"]),
        help="How urgent it is: a batch request lets interactive ones pass.",
    ),
    click.option(
        "--choices", type=click.IntRange(1, _MAX_CHOICES), metavar="N", help="Give N answers to the prompt, up to 16."
    ),
    click.option(
        "--logprobs",
        type=click.IntRange(0, _MAX_LOGPROBS),
        metavar="N",
        help="With --json, tell how likely each token was, and the N most likely ones at its place, up to 20.",
    ),
    click.option(
        "--adapter",
        "adapters",
        multiple=True,
        metavar="NAME=SCALE",
        help="Scale one of the model's adapters, such as pirate=0.5; 0 leaves it out. May be repeated.",
    ),
)


@dataclass(frozen=True, slots=True)
class Asked:
    """What an answer is asked to be, as it was typed."""

    format_text: str | None
    context: str | None
    timeout: float | None
    priority: str | None
    choices: int | None
    logprobs: int | None
    adapters: tuple[str, ...] = ()

    def check(self, *, one_prompt: bool, as_json: bool) -> None:
        """Refuse what does not go together.

        Raises:
            BadUsage: something does not.
        """
        if self.timeout is not None and self.timeout <= 0:
            raise BadUsage("`--timeout` must be longer than 0", hint="such as `30s`; without it there is no limit")
        if self.logprobs is not None and not as_json:
            raise BadUsage("`--logprobs` needs `--json`")
        if self.choices is not None and self.choices > 1 and not one_prompt:
            raise BadUsage("`--choices` needs a PROMPT", hint="a chat goes on from one answer")

    def message(self) -> pb.AnswerOptions:
        """Return it as the daemon takes it.

        Raises:
            BadUsage: the format is none, its file cannot be read, or an adapter has no scale.
        """
        from lmd.cli.formats import parse_format
        from lmd.v1 import inference_service_pb2 as pb

        options = pb.AnswerOptions(choices=self.choices or 0, top_logprobs=self.logprobs)
        options.adapters.update(_scale(text) for text in self.adapters)
        if self.format_text is not None:
            options.format.CopyFrom(parse_format(self.format_text))
        if self.context is not None:
            options.context_policy = pb.ContextPolicy.Value(f"CONTEXT_POLICY_{self.context.upper()}")
        if self.priority is not None:
            options.priority = pb.Priority.Value(f"PRIORITY_{self.priority.upper()}")
        if self.timeout is not None:
            options.timeout.FromNanoseconds(int(self.timeout * 1e9))
        return options


def _scale(text: str) -> tuple[str, float]:
    name, _, number = text.rpartition("=")
    try:
        scale = float(number)
    except ValueError:
        scale = math.nan
    if not name.strip() or not math.isfinite(scale):
        raise BadUsage(
            f"`--adapter {text}` is not NAME=SCALE",
            hint="such as `--adapter pirate=0.5`; `lm show` names a model's adapters",
        )
    return name.strip(), scale


def answer_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options, which it gets together as `asked`."""

    @functools.wraps(function)
    def collect(*args: Any, **values: Any) -> Any:
        asked = Asked(**{name: values.pop(name) for name in Asked.__slots__})
        return function(*args, asked=asked, **values)

    for option in reversed(_OPTIONS):
        collect = option(collect)
    return collect
