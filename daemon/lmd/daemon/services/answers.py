"""Translates between the messages of an answer and the values of `lmd.daemon.inference`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypedDict

from google.protobuf.duration_pb2 import Duration

from lmd.daemon.answer_events import Delta, Done, Event, TokenLogprob
from lmd.daemon.answer_options import AnswerOptions, ContextPolicy, Format, FormatKind, Priority
from lmd.daemon.conversations import Think, Tool, ToolCall, ToolChoice, Tools, Turn
from lmd.daemon.residency.values import Waiting
from lmd.registry.errors import InvalidRequest
from lmd.v1 import inference_service_pb2 as pb
from lmd.v1 import model_pb2, runtime_service_pb2

_REASONS = {
    "stop": pb.AnswerDone.FINISH_REASON_STOP,
    "length": pb.AnswerDone.FINISH_REASON_LENGTH,
    "tool_calls": pb.AnswerDone.FINISH_REASON_TOOL_CALLS,
}
_CHOICES = {
    pb.TOOL_CHOICE_UNSPECIFIED: ToolChoice.AUTO,
    pb.TOOL_CHOICE_AUTO: ToolChoice.AUTO,
    pb.TOOL_CHOICE_NONE: ToolChoice.NONE,
    pb.TOOL_CHOICE_REQUIRED: ToolChoice.REQUIRED,
}
_THINK = {
    pb.THINK_UNSPECIFIED: None,
    pb.THINK_OFF: Think.OFF,
    pb.THINK_ON: Think.ON,
    pb.THINK_LOW: Think.LOW,
    pb.THINK_MEDIUM: Think.MEDIUM,
    pb.THINK_HIGH: Think.HIGH,
}
_PRIORITIES = {
    pb.PRIORITY_UNSPECIFIED: Priority.INTERACTIVE,
    pb.PRIORITY_INTERACTIVE: Priority.INTERACTIVE,
    pb.PRIORITY_BATCH: Priority.BATCH,
}
_POLICIES = {
    pb.CONTEXT_POLICY_UNSPECIFIED: ContextPolicy.ERROR,
    pb.CONTEXT_POLICY_ERROR: ContextPolicy.ERROR,
    pb.CONTEXT_POLICY_TRUNCATE: ContextPolicy.TRUNCATE,
    pb.CONTEXT_POLICY_SHIFT: ContextPolicy.SHIFT,
}


class EventFields(TypedDict, total=False):
    """The one field that an event sets, the same for prompts and for chats."""

    waiting: pb.Waiting
    delta: pb.TextDelta
    done: pb.AnswerDone


def options_of(options: pb.AnswerOptions) -> AnswerOptions:
    """Return what an answer is asked to be.

    Raises:
        InvalidRequest: an enum has a value that this version does not know, or a format says nothing.
    """
    if options.priority not in _PRIORITIES:
        raise InvalidRequest(f"`priority` {options.priority} is not known", field="priority")
    if options.context_policy not in _POLICIES:
        raise InvalidRequest(f"`context_policy` {options.context_policy} is not known", field="context_policy")
    return AnswerOptions(
        format=_format(options.format) if options.HasField("format") else None,
        choices=options.choices,
        top_logprobs=options.top_logprobs if options.HasField("top_logprobs") else None,
        logit_bias=dict(options.logit_bias),
        stop_tokens=tuple(options.stop_tokens),
        priority=_PRIORITIES[options.priority],
        context_policy=_POLICIES[options.context_policy],
        adapters=dict(options.adapters),
        timeout_s=options.timeout.seconds + options.timeout.nanos / 1e9 if options.HasField("timeout") else None,
    )


def turns_of(messages: Iterable[model_pb2.Message]) -> list[Turn]:
    """Return the turns of a chat."""
    return [
        Turn(
            message.role,
            message.content,
            message.thinking,
            tuple(ToolCall(call.id, call.name, call.arguments) for call in message.tool_calls),
            message.tool_name,
            message.tool_call_id,
        )
        for message in messages
    ]


def tools_of(request: pb.ChatRequest | pb.ApplyTemplateRequest) -> Tools:
    """Return the functions of a request.

    Raises:
        InvalidRequest: `tool_choice` has a value that this version does not know.
    """
    tools = tuple(Tool(tool.name, tool.description, tool.parameters) for tool in request.tools)
    if isinstance(request, pb.ApplyTemplateRequest):
        return Tools(tools)
    if request.tool_choice not in _CHOICES:
        raise InvalidRequest(f"`tool_choice` {request.tool_choice} is not known", field="tool_choice")
    return Tools(tools, _CHOICES[request.tool_choice], request.tool_name)


def think_of(request: pb.ChatRequest | pb.GenerateRequest | pb.ApplyTemplateRequest) -> Think | None:
    """Return whether the model is to think.

    Raises:
        InvalidRequest: `think` has a value that this version does not know.
    """
    if request.think not in _THINK:
        raise InvalidRequest(f"`think` {request.think} is not known", field="think")
    return _THINK[request.think]


def _format(message: pb.Format) -> Format | None:
    kind = message.WhichOneof("format")
    if kind is None:
        raise InvalidRequest("`format` is of no kind that is known", field="format")
    if kind == "json_object":
        return Format(FormatKind.JSON_OBJECT) if message.json_object else None
    return Format(FormatKind(kind), getattr(message, kind))


def event_fields(event: Event) -> EventFields:
    """Return an event as the field of a response that it sets."""
    match event:
        case Delta():
            return {"delta": _delta(event)}
        case Waiting():
            return {"waiting": _waiting(event)}
        case Done():
            return {"done": _done(event)}


def load_progress(waiting: Waiting) -> runtime_service_pb2.LoadProgress:
    """Return how far the load is that *waiting* tells of."""
    return runtime_service_pb2.LoadProgress(fraction=waiting.load_fraction or 0.0, detail=waiting.detail)


def duration(nanoseconds: int) -> Duration:
    """Return a duration."""
    message = Duration()
    message.FromNanoseconds(nanoseconds)
    return message


def _delta(delta: Delta) -> pb.TextDelta:
    return pb.TextDelta(
        text=delta.text,
        generated_tokens=delta.generated_tokens,
        choice=delta.choice,
        logprobs=_logprobs(delta.logprobs),
        thinking=delta.thinking,
        tool_calls=[model_pb2.ToolCall(id=c.id, name=c.name, arguments=c.arguments) for c in delta.tool_calls],
    )


def _logprobs(tokens: Iterable[TokenLogprob]) -> list[pb.TokenLogprob]:
    return [pb.TokenLogprob(id=t.id, token=t.token, logprob=t.logprob, top=_logprobs(t.top)) for t in tokens]


def _waiting(waiting: Waiting) -> pb.Waiting:
    message = pb.Waiting(queue_position=waiting.queue_position)
    if waiting.load_fraction is not None or waiting.detail:
        message.load.CopyFrom(load_progress(waiting))
    return message


def _done(done: Done) -> pb.AnswerDone:
    return pb.AnswerDone(
        finish_reason=_REASONS[done.finish_reason],
        prompt_tokens=done.prompt_tokens,
        cached_tokens=done.cached_tokens,
        generated_tokens=done.generated_tokens,
        total_duration=duration(done.total_ns),
        load_duration=duration(done.load_ns),
        queue_duration=duration(done.queue_ns),
        prompt_duration=duration(done.prompt_ns),
        generate_duration=duration(done.generate_ns),
        seed=done.seed,
        stop=done.stop,
        choices=[
            pb.ChoiceDone(
                finish_reason=_REASONS[choice.finish_reason],
                generated_tokens=choice.generated_tokens,
                stop=choice.stop,
            )
            for choice in done.choices
        ],
        dropped_messages=done.dropped_messages,
        dropped_tokens=done.dropped_tokens,
        shifted_tokens=done.shifted_tokens,
        drafted_tokens=done.drafted_tokens,
        accepted_tokens=done.accepted_tokens,
    )
