"""The fields that Ollama takes in several kinds: keep_alive, think, format, images; and what goes with them."""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Iterable, Sequence
from datetime import timedelta
from decimal import Decimal

from lmd.daemon.answer_options import AnswerOptions, ContextPolicy, Format, FormatKind
from lmd.daemon.conversations import Think
from lmd.daemon.http.ollama.failures import Refusal
from lmd.daemon.http.ollama.requests import AnswerBody, GenerateBody
from lmd.daemon.inference import AnswerableModel
from lmd.daemon.residency.values import FOR_EVER, MAX_KEEP_ALIVE
from lmd.registry.errors import CapabilityMissing

MAX_TOP_LOGPROBS = 20

_NANOSECONDS = {
    "ns": 1,
    "us": 10**3,
    "µs": 10**3,
    "μs": 10**3,
    "ms": 10**6,
    "s": 10**9,
    "m": 60 * 10**9,
    "h": 3600 * 10**9,
}
_DURATION = re.compile(r"([+-]?)((?:(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:ns|us|µs|μs|ms|s|m|h))+|0)", re.ASCII)
_DURATION_PART = re.compile(r"([0-9]*\.?[0-9]*)(ns|us|µs|μs|ms|s|m|h)", re.ASCII)
_LONGEST_DURATION_CHARS = 100

_THINK = {
    "low": Think.LOW,
    "medium": Think.MEDIUM,
    "high": Think.HIGH,
    # No template knows more than "high".
    "max": Think.HIGH,
}


def keep_alive_of(value: object) -> timedelta | None:
    """Return how long the model shall stay: numbers are seconds, texts are Go's durations, negative is for ever.

    Raises:
        Refusal: it is neither.
    """
    if value is None:
        return None
    if isinstance(value, int | float) and not isinstance(value, bool):
        if value < 0:
            return FOR_EVER
        return MAX_KEEP_ALIVE if value >= MAX_KEEP_ALIVE.total_seconds() else timedelta(seconds=value)
    if isinstance(value, str):
        return _duration(value)
    raise Refusal(400, f'keep_alive must be a number of seconds or a duration such as "5m", not {_kind(value)}')


def think_of(value: object) -> Think | None:
    """Return whether to think, None when the request does not say.

    Raises:
        Refusal: the value is none of the legal ones, which the message lists.
    """
    if value is None:
        return None
    if isinstance(value, bool):
        return Think.ON if value else Think.OFF
    if isinstance(value, str) and value in _THINK:
        return _THINK[value]
    shown = json.dumps(value[:40]) if isinstance(value, str) else _kind(value)
    raise Refusal(400, f'think must be true, false, "low", "medium", "high" or "max", not {shown}')


def format_of(value: object) -> Format | None:
    """Return what the answer must look like; null and "" are nothing.

    Raises:
        Refusal: it is neither "json" nor a schema.
    """
    if value is None or value == "":
        return None
    if value == "json":
        return Format(FormatKind.JSON_OBJECT)
    if isinstance(value, dict):
        return Format(FormatKind.JSON_SCHEMA, json.dumps(value, ensure_ascii=False))
    shown = json.dumps(value[:40]) if isinstance(value, str) else _kind(value)
    raise Refusal(400, f'format must be "json" or a JSON Schema object, not {shown}')


def answer_options(body: AnswerBody) -> AnswerOptions:
    """Return what the answer is asked to be.

    Raises:
        Refusal: `format` is wrong.
    """
    return AnswerOptions(
        format=format_of(body.format),
        top_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        context_policy=_policy(body),
    )


def check_top_logprobs(body: AnswerBody) -> None:
    """Raise `Refusal` when there are too many, whether they are asked for or not."""
    if not 0 <= (body.top_logprobs or 0) <= MAX_TOP_LOGPROBS:
        raise Refusal(400, f"top_logprobs must be between 0 and {MAX_TOP_LOGPROBS}")


def check_images(model: str, images: Iterable[Sequence[str] | None]) -> None:
    """Raise `Refusal` when there is an image: no model here has eyes yet."""
    for image in (image for some in images for image in some or ()):
        try:
            base64.b64decode(image, validate=True)
        except (binascii.Error, ValueError):
            raise Refusal(400, "images must be texts in base64") from None
        raise Refusal(400, f'"{model}" does not support images: this version has no projectors')


def effective_think(model: AnswerableModel, asked: Think | None) -> Think | None:
    """Return what to tell the template: models that can think do so unless they are told not to.

    That holds for an answer in a format, too, as with Ollama: the format begins when the thoughts are over.

    Raises:
        CapabilityMissing: the model cannot think.
    """
    can_think = "thinking" in model.capabilities
    if can_think:
        return asked or Think.ON
    if asked not in (None, Think.OFF):
        raise CapabilityMissing(model.name, "thinking")
    return None


def _policy(body: AnswerBody) -> ContextPolicy:
    """Return what to do when the context is too short: Ollama cuts the prompt and then the answer unless told not to.

    A prompt, other than a chat, has nothing but its own beginning to lose: without `shift` it is kept whole.
    """
    if body.truncate is False:
        return ContextPolicy.ERROR
    if body.shift is not False:
        return ContextPolicy.SHIFT
    return ContextPolicy.ERROR if isinstance(body, GenerateBody) else ContextPolicy.TRUNCATE


def _duration(text: str) -> timedelta:
    match = _DURATION.fullmatch(text) if len(text) <= _LONGEST_DURATION_CHARS else None
    if match is None:
        why = "has no unit" if re.fullmatch(r"[+-]?[0-9.]+", text) else "is no duration"
        raise Refusal(400, f'keep_alive {json.dumps(text[:40])} {why}: write 300, "300s" or "5m", or -1 for ever')
    total = sum(Decimal(number) * _NANOSECONDS[unit] for number, unit in _DURATION_PART.findall(match[2]))
    if match[1] == "-" and total:
        return FOR_EVER
    return timedelta(microseconds=int(min(total / 1000, Decimal(MAX_KEEP_ALIVE // timedelta(microseconds=1)))))


def _kind(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return "a text"
    return "an array" if isinstance(value, list) else "an object" if isinstance(value, dict) else "a number"
