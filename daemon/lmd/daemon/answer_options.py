"""What an answer is asked to be, beside the settings that a manifest can have too; all of it is checked here."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from lmd.daemon.adapter_scales import AdapterFile, check_scales, scale_frames
from lmd.daemon.parameters import check_logit_bias, check_stop_tokens
from lmd.registry.errors import InvalidRequest
from lmd.registry.parameters import ParameterValue
from lmd.runner.v1 import frames_pb2 as frames

MAX_CHOICES = 16
MAX_TOP_LOGPROBS = 20
MAX_FORMAT_BYTES = 256 << 10


class Priority(StrEnum):
    """How urgent a request is."""

    INTERACTIVE = "interactive"
    BATCH = "batch"


class ContextPolicy(StrEnum):
    """What to do when the context is too short; see `ContextPolicy` of the API."""

    ERROR = "error"
    TRUNCATE = "truncate"
    SHIFT = "shift"


class FormatKind(StrEnum):
    """How a format is written."""

    JSON_OBJECT = "json_object"
    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    GBNF = "gbnf"


@dataclass(frozen=True, slots=True)
class Format:
    """What a text must look like; *text* is the schema, expression or grammar, and empty for any JSON object."""

    kind: FormatKind
    text: str = ""


@dataclass(frozen=True, slots=True)
class AnswerOptions:
    """What an answer is asked to be; ranges and defaults are those of `AnswerOptions` of the API."""

    format: Format | None = None
    choices: int = 0
    top_logprobs: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop_tokens: Sequence[int] = ()
    priority: Priority = Priority.INTERACTIVE
    context_policy: ContextPolicy = ContextPolicy.ERROR
    #: Scales of adapters by their names; see `scale_frames`.
    adapters: Mapping[str, float] = field(default_factory=dict)
    #: Seconds, from the arrival of the request to its end.
    timeout_s: float | None = None
    #: Settings, by the registry's names, that an API promises where neither the request nor the manifest makes them.
    defaults: Mapping[str, ParameterValue] = field(default_factory=dict)

    def checked(self) -> AnswerOptions:
        """Return this when everything is in its range.

        Raises:
            InvalidRequest: something is not; *field* says what.
        """
        _check_range("choices", self.choices, MAX_CHOICES)
        if self.top_logprobs is not None:
            _check_range("top_logprobs", self.top_logprobs, MAX_TOP_LOGPROBS)
        check_logit_bias(self.logit_bias)
        check_stop_tokens(self.stop_tokens)
        check_scales(self.adapters)
        if self.timeout_s is not None and not 0 < self.timeout_s < math.inf:
            raise InvalidRequest(f"`timeout` must be above 0 s, not {self.timeout_s:g} s", field="timeout")
        if self.format is not None:
            _check_format(self.format)
        return self

    def apply(self, submit: frames.Submit, adapters: Sequence[AdapterFile] = ()) -> None:
        """Write everything but the time-out into a request that has its sampling settings already.

        *adapters* are those of the model.

        Raises:
            InvalidRequest: it has no such adapter as is asked for.
        """
        submit.adapters.extend(scale_frames(adapters, self.adapters))
        submit.priority = _PRIORITIES[self.priority]
        submit.context_policy = _POLICIES[self.context_policy]
        submit.choices = self.choices
        if self.top_logprobs is not None:
            submit.top_logprobs = self.top_logprobs
        if self.format is not None:
            submit.format.CopyFrom(_format_frame(self.format))
        submit.sampling.logit_bias.update(check_logit_bias(self.logit_bias))
        submit.sampling.stop_tokens.extend(check_stop_tokens(self.stop_tokens))


_PRIORITIES = {
    Priority.INTERACTIVE: frames.PRIORITY_INTERACTIVE,
    Priority.BATCH: frames.PRIORITY_BATCH,
}
_POLICIES = {
    ContextPolicy.ERROR: frames.CONTEXT_POLICY_ERROR,
    ContextPolicy.TRUNCATE: frames.CONTEXT_POLICY_TRUNCATE,
    ContextPolicy.SHIFT: frames.CONTEXT_POLICY_SHIFT,
}


def _check_range(name: str, value: int, maximum: int) -> None:
    if not 0 <= value <= maximum:
        raise InvalidRequest(f"`{name}` must be a whole number from 0 to {maximum}, not {value}", field=name)


def _check_format(wanted: Format) -> None:
    if wanted.kind is FormatKind.JSON_OBJECT:
        return
    if not wanted.text.strip():
        raise InvalidRequest(f"the `{wanted.kind}` of `format` is empty", field="format")
    size_bytes = len(wanted.text.encode())
    if size_bytes > MAX_FORMAT_BYTES:
        raise InvalidRequest(
            f"the `{wanted.kind}` of `format` has {size_bytes} bytes; at most {MAX_FORMAT_BYTES} are legal",
            field="format",
        )


def _format_frame(wanted: Format) -> frames.Format:
    match wanted.kind:
        case FormatKind.JSON_OBJECT:
            return frames.Format(json_object=True)
        case FormatKind.JSON_SCHEMA:
            return frames.Format(json_schema=wanted.text)
        case FormatKind.REGEX:
            return frames.Format(regex=wanted.text)
        case FormatKind.GBNF:
            return frames.Format(gbnf=wanted.text)
