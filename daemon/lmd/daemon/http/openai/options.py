"""From the fields of a request to the application's settings and options."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from datetime import timedelta

from lmd.daemon.answer_options import AnswerOptions, ContextPolicy, Format, FormatKind, Priority
from lmd.daemon.conversations import Think
from lmd.daemon.http.durations import duration_of
from lmd.daemon.http.openai.requests import ChatRequest, Extras, ResponseFormat, Sampling, TemplateArguments
from lmd.daemon.http.thinking import EFFORTS
from lmd.registry.errors import InvalidRequest
from lmd.registry.parameters import INT32_MAX, INT64_MAX, PARAMETERS, ParameterValue

#: What OpenAI promises where nobody says anything; a model's manifest does say something.
CHAT_DEFAULTS: Mapping[str, ParameterValue] = {"temperature": 1.0, "top_p": 1.0}
COMPLETION_DEFAULTS: Mapping[str, ParameterValue] = {**CHAT_DEFAULTS, "num_predict": 16}


def parameters_of(request: Extras, *, max_tokens: int | None = None) -> dict[str, object]:
    """Return the settings that a request makes, by the registry's names.

    A negative number of tokens is no limit, as many clients of local servers write it. So is the seed -1 any seed;
    other negative ones, which OpenAI allows, are folded into the positive.
    """
    settings = {
        name: value
        for name in PARAMETERS
        if name != "num_predict" and (value := getattr(request, name, None)) is not None
    }
    seed = settings.get("seed")
    if isinstance(seed, int) and not -1 <= seed <= INT64_MAX:
        settings["seed"] = seed % (INT64_MAX + 1)
    if settings.get("stop") == "":
        # What clients send that have a field for it; nothing would stop at nothing.
        del settings["stop"]
    if max_tokens is not None:
        settings["num_predict"] = max(-1, min(max_tokens, INT32_MAX))
    return settings


def keep_alive_of(request: Extras) -> timedelta | None:
    """Return how long the model shall stay: a number is seconds, a text has units, and what is negative is for ever.

    Raises:
        InvalidRequest: the text is no duration.
    """
    return duration_of(request.keep_alive, "keep_alive")


def options_of(
    request: Sampling,
    *,
    response_format: ResponseFormat | None,
    top_logprobs: int | None,
    defaults: Mapping[str, ParameterValue],
) -> AnswerOptions:
    """Return what the answer is asked to be.

    Raises:
        InvalidRequest: fields contradict each other, or one says nothing.
    """
    timeout = duration_of(request.timeout, "timeout")
    return AnswerOptions(
        format=_format(response_format, request.grammar),
        choices=1 if request.n is None else request.n,
        top_logprobs=top_logprobs,
        logit_bias=_logit_bias(request.logit_bias or {}),
        priority=Priority(request.priority or Priority.INTERACTIVE),
        context_policy=_policy(request),
        adapters=request.adapters or {},
        timeout_s=None if timeout is None else timeout.total_seconds(),
        defaults=defaults,
    )


def think_of(request: ChatRequest) -> Think | None:
    """Return how much the model is to think, None when the request does not say."""
    effort = request.reasoning_effort or (request.reasoning.effort if request.reasoning else None)
    if effort is not None:
        return EFFORTS[effort]
    return think_of_arguments(request.chat_template_kwargs)


def think_of_arguments(arguments: TemplateArguments | None) -> Think | None:
    """Return whether the model is to think, as other servers are told it: by an argument of Qwen's template."""
    if arguments is None or arguments.enable_thinking is None:
        return None
    return Think.ON if arguments.enable_thinking else Think.OFF


def max_tokens_of(request: ChatRequest) -> int | None:
    """Return how many tokens a chat may generate, None when the request does not say.

    Raises:
        InvalidRequest: it says two things, or none at all is wanted.
    """
    old, new = request.max_tokens, request.max_completion_tokens
    if old is not None and new is not None and old != new:
        raise InvalidRequest(
            "`max_tokens` and `max_completion_tokens` differ", field="max_completion_tokens", hint="send one of them"
        )
    name, value = ("max_tokens", old) if new is None else ("max_completion_tokens", new)
    if value == 0:
        raise InvalidRequest(f"`{name}` must be at least 1", field=name)
    return value


def top_logprobs_of(request: ChatRequest) -> int | None:
    """Return how many alternatives are told for each token, None for no log probabilities at all.

    Raises:
        InvalidRequest: alternatives of nothing are asked for.
    """
    if request.logprobs:
        return request.top_logprobs or 0
    if request.top_logprobs:
        raise InvalidRequest("`top_logprobs` needs `logprobs` to be true", field="top_logprobs")
    return None


def _policy(request: Sampling) -> ContextPolicy:
    if request.context_policy is not None:
        return ContextPolicy(request.context_policy)
    if request.truncation == "auto" or request.truncate:
        return ContextPolicy.TRUNCATE
    return ContextPolicy.ERROR


def _logit_bias(biases: Mapping[str, float]) -> dict[int, float]:
    found: dict[int, float] = {}
    for token, bias in biases.items():
        if not token.isascii() or not token.isdecimal() or len(token) > 10:
            raise InvalidRequest(
                f"`logit_bias` names the token {token[:40]!r}; ids are whole numbers from 0, as text",
                field="logit_bias",
            )
        if math.isfinite(bias) and not -100 <= bias <= 100:
            raise InvalidRequest(
                f"`logit_bias` of token {token} must be from -100 to 100, not {bias:g}", field="logit_bias"
            )
        found[int(token)] = bias
    return found


def _format(wanted: ResponseFormat | None, grammar: str | None) -> Format | None:
    kind = None if wanted is None else wanted.type
    if grammar is not None and kind not in (None, "text"):
        raise InvalidRequest("`grammar` and `response_format` cannot both be followed", field="grammar")
    if grammar is not None:
        return Format(FormatKind.GBNF, grammar)
    if wanted is None or kind == "text":
        return None
    if kind == "json_object":
        schema = wanted.object_schema
        return Format(FormatKind.JSON_OBJECT) if schema is None else _schema(schema)
    if kind == "json_schema":
        if wanted.json_schema is None or wanted.json_schema.json_schema is None:
            raise InvalidRequest(
                "`response_format` has no `json_schema.schema`", field="response_format.json_schema.schema"
            )
        return _schema(wanted.json_schema.json_schema)
    raise InvalidRequest(
        f"`response_format.type` must be text, json_object or json_schema, not {str(kind)[:40]!r}",
        field="response_format.type",
    )


def _schema(schema: Mapping[str, object]) -> Format:
    return Format(FormatKind.JSON_SCHEMA, json.dumps(schema, ensure_ascii=False))
