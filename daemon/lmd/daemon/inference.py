"""Runs models: what every adapter (gRPC, HTTP) offers, in terms of plain values."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from datetime import timedelta
from typing import Protocol

from lmd.daemon.answer_events import ChoiceDone, Done, Event, Started
from lmd.daemon.answer_options import AnswerOptions, Priority
from lmd.daemon.config import Config
from lmd.daemon.conversations import Think, ToolChoice, Tools, Turn, chat_frame, chat_turns, conversation
from lmd.daemon.deadline import Deadline, shorter
from lmd.daemon.errors import HandedBack, RunnerCrashed, RunnerHung
from lmd.daemon.metrics import Metrics, ModelWork
from lmd.daemon.parameters import context_floor, effective, load_settings, sampling, usable_kv_type
from lmd.daemon.residency.residency import WAITING_INTERVAL_S, Residency
from lmd.daemon.residency.values import Loadable, LoadSettings, Waiting
from lmd.daemon.runner_answer import Answer
from lmd.gotemplate.survey import writes_suffix
from lmd.registry.errors import CapabilityMissing, InvalidRequest
from lmd.registry.lm_config import Message
from lmd.registry.parameters import INT32_MAX
from lmd.runner.v1 import frames_pb2 as frames


class AnswerableModel(Loadable, Protocol):
    """What inference has to know of a resolved model, beside what residency does."""

    @property
    def capabilities(self) -> Sequence[str]:
        """What the model can do."""


class ModelSource(Protocol):
    """Finds models by what users call them."""

    async def resolve(self, text: str) -> AnswerableModel:
        """Return the model that a reference means."""


async def resolved_model(catalog: ModelSource, asked: str | AnswerableModel) -> AnswerableModel:
    """Return the model that is asked for: by a reference, or itself, by who has resolved one just now."""
    return await catalog.resolve(asked) if isinstance(asked, str) else asked


class Inference:
    """Answers prompts and chats. A model is asked for by a reference; who has resolved one already gives it instead.

    The streams end with exactly one `Done`, or raise. `Waiting` comes before the first text only, when what a request
    waits for changes, at most five times a second. Text that a slow consumer has not taken is merged into its next
    `Delta` of the choice; it keeps neither the slot nor the model once the answer is over. Closing a stream stops the
    work; use `contextlib.aclosing`.

    *caller* is the authenticated identity: prefixes of prompts are shared within one caller only, the engine is shared
    fairly between them, and none fills a queue alone. A request ends with `DeadlineExceeded` when the time-out of its
    options, or *time_left_s*, what the call itself may take, has passed, wherever it is then.
    """

    def __init__(
        self, catalog: ModelSource, residency: Residency, config: Config, work: ModelWork | None = None
    ) -> None:
        self._catalog = catalog
        self._residency = residency
        self._num_ctx = config.runtime.num_ctx
        self._min_ctx = config.runtime.min_ctx
        self._kv_type = config.runtime.kv_type
        self._weights = config.runtime.caller_weights
        self._work = work or Metrics().work

    def generate(
        self,
        *,
        model: str | AnswerableModel,
        prompt: str,
        system: str | None = None,
        raw: bool = False,
        suffix: str = "",
        template: str = "",
        think: Think | None = None,
        tokens: Sequence[int] | None = None,
        parameters: Mapping[str, object] | None = None,
        keep_alive: timedelta | None = None,
        options: AnswerOptions | None = None,
        caller: str = "",
        time_left_s: float | None = None,
    ) -> AsyncGenerator[Event, None]:
        """Continue a prompt.

        With a chat template and without *raw* the prompt is one user turn, after the system prompt and the manifest's
        messages. Without a template a system prompt is put before the prompt, and a blank line between them. *system*
        replaces the manifest's; "" means none. *template* is used instead of the model's. With a *suffix* the answer
        fills the gap between the two texts, and nothing else is put around them but by a Go template that knows of it.
        *tokens* of the model are a raw prompt that is tokenized already; nothing is added to them.

        Raises:
            InvalidRef, ModelNotFound, InvalidRequest, CapabilityMissing: the request cannot be served.
            LmdError: as `Residency.enqueue`, and what loading and running end with.
        """

        def build(resolved: AnswerableModel) -> frames.Submit:
            require(resolved, "completion")
            if raw and system:
                raise InvalidRequest("a raw prompt takes no system prompt", field="system")
            if raw and (template or suffix):
                field = "template" if template else "suffix"
                raise InvalidRequest(f"a raw prompt takes no {field}", field=field)
            in_effect = resolved.system if system is None else system
            if tokens is not None:
                return frames.Submit(tokens=frames.Tokens(ids=_token_ids(tokens)))
            if raw:
                return frames.Submit(prompt=prompt)
            if suffix and writes_suffix(template or resolved.template or ""):
                gap = chat_frame([Turn("user", prompt)], think=think, template=template, suffix=suffix)
                return frames.Submit(chat=gap)
            if suffix:
                require(resolved, "insert")
                return frames.Submit(insert=frames.Insert(prefix=prompt, suffix=suffix))
            if template or "chat" in resolved.capabilities:
                check_template_inputs(resolved, None, think)
                turns = conversation(in_effect, resolved.messages, [Turn("user", prompt)])
                return frames.Submit(chat=chat_frame(turns, think=think, template=template))
            if think is not None:
                require(resolved, "thinking")
            return frames.Submit(prompt=f"{in_effect}\n\n{prompt}" if in_effect else prompt)

        return self._answer("generate", model, build, parameters or {}, keep_alive, options, caller, time_left_s)

    def chat(
        self,
        *,
        model: str | AnswerableModel,
        messages: Sequence[Turn | Message],
        tools: Tools | None = None,
        think: Think | None = None,
        parameters: Mapping[str, object] | None = None,
        keep_alive: timedelta | None = None,
        options: AnswerOptions | None = None,
        caller: str = "",
        time_left_s: float | None = None,
        on_started: Callable[[Started], None] | None = None,
    ) -> AsyncGenerator[Event, None]:
        """Answer a chat.

        The manifest's system prompt is put before the messages unless the first of them is a system message; the
        manifest's own messages follow the system prompt. *on_started* is called once, before the first `Delta`, for
        those who must tell the size of the prompt ahead of the answer.

        Raises:
            CapabilityMissing: the model has no chat template, or one without a place for *tools*, or which cannot be
                told to *think*; and as `generate`.
        """
        if tools is not None:
            tools = tools.checked()

        def build(resolved: AnswerableModel) -> frames.Submit:
            require(resolved, "chat")
            check_template_inputs(resolved, tools, think)
            turns = chat_turns(resolved.system, resolved.messages, messages)
            return frames.Submit(chat=chat_frame(turns, tools=tools, think=think))

        return self._answer(
            "chat", model, build, parameters or {}, keep_alive, options, caller, time_left_s, on_started
        )

    async def _answer(
        self,
        operation: str,
        asked: str | AnswerableModel,
        build: Callable[[AnswerableModel], frames.Submit],
        requested: Mapping[str, object],
        keep_alive: timedelta | None,
        options: AnswerOptions | None,
        caller: str,
        time_left_s: float | None,
        on_started: Callable[[Started], None] | None = None,
    ) -> AsyncGenerator[Event, None]:
        meter = self._work.answer(operation)
        options = (options or AnswerOptions()).checked()
        deadline = Deadline(shorter(options.timeout_s, time_left_s))
        model = await resolved_model(self._catalog, asked)
        submit = build(model)
        settings = self._fill(submit, model, requested, options, caller)
        load_ns = 0
        shown: Waiting | None = None
        tries_left, again = 2, False
        while True:
            answer = None
            with (
                meter,
                self._residency.enqueue(
                    model, settings, keep_alive, caller=caller, again=again, batch=options.priority is Priority.BATCH
                ) as ticket,
            ):
                queued_ns = time.monotonic_ns()
                while not await ticket.wait(deadline.within(WAITING_INTERVAL_S if shown is not None else 0)):
                    deadline.check()
                    if (waiting := ticket.status()) != shown:
                        shown = waiting
                        yield waiting
                if shown is not None:
                    load_ns += time.monotonic_ns() - queued_ns
                try:
                    answer = meter.answer = await ticket.runner.submit(submit, deadline)
                    # A client that takes its time with the last text keeps the model from nobody.
                    answer.when_ended(ticket.close)
                    while True:
                        if not await _changed(answer, deadline.within(None if answer.started else WAITING_INTERVAL_S)):
                            deadline.check()
                            waiting = Waiting(ticket.runner.position(answer))
                            if waiting != shown and not answer.started:
                                shown = waiting
                                yield waiting
                            continue
                        if on_started is not None and answer.started is not None:
                            on_started(Started(answer.started.prompt_tokens, answer.started.cached_tokens))
                            on_started = None
                        # What comes while the consumer has the text is for the next round.
                        finished, error = answer.finished, answer.error
                        deltas = answer.take()
                        meter.note(deltas)
                        for delta in deltas:
                            yield delta
                        if error is not None:
                            raise error
                        if finished is not None:
                            self._residency.note_answer(model, finished)
                            meter.done = _done(finished, submit.sampling.seed, load_ns, meter.arrived_ns)
                            yield meter.done
                            return
                except (RunnerCrashed, RunnerHung, HandedBack) as error:
                    # A request that never got a slot was not what broke the runner, and has lost nothing yet.
                    tries_left -= not isinstance(error, HandedBack)
                    if not tries_left or (answer is not None and answer.started is not None):
                        raise
                    again = True
                finally:
                    if answer is not None:
                        answer.close()

    def _fill(
        self,
        submit: frames.Submit,
        model: AnswerableModel,
        requested: Mapping[str, object],
        options: AnswerOptions,
        caller: str,
    ) -> LoadSettings:
        """Complete a request that has its input, and return the settings to load its model with."""
        parameters = effective(
            requested,
            {**options.defaults, **model.parameters},
            num_ctx=self._num_ctx,
            train_ctx=model.header.context_length,
            kv_type=usable_kv_type(model.header, self._kv_type),
        )
        submit.sampling.CopyFrom(sampling(parameters))
        options.apply(submit, model.adapters)
        submit.cache_scope = submit.caller = caller
        submit.weight = self._weights.get(caller, 1.0)
        floor = context_floor(requested, {**options.defaults, **model.parameters}, self._min_ctx)
        return load_settings(parameters, model.header, min_ctx=floor)


async def _changed(answer: Answer, timeout_s: float | None) -> bool:
    """Wait for news of an answer; tell whether they came in time."""
    if timeout_s is None:
        await answer.changed()
        return True
    try:
        async with asyncio.timeout(timeout_s):
            await answer.changed()
    except TimeoutError:
        return False
    return True


def _token_ids(tokens: Sequence[int]) -> Sequence[int]:
    """Return the tokens of a prompt; whether the model has them only its runner knows."""
    if not tokens:
        raise InvalidRequest("a prompt of tokens needs a token", field="prompt")
    for token in tokens:
        if not 0 <= token <= INT32_MAX:
            raise InvalidRequest(f"{token} is no token; ids are whole numbers from 0", field="prompt")
    return tokens


def require(model: AnswerableModel, capability: str) -> None:
    """Raise `CapabilityMissing` when a model lacks something."""
    if capability not in model.capabilities:
        hint = "it has no chat template; give it a text to continue instead" if capability == "chat" else ""
        raise CapabilityMissing(model.name, capability, hint=hint)


def check_template_inputs(model: AnswerableModel, tools: Tools | None, think: Think | None) -> None:
    """Raise `CapabilityMissing` when a model's template has no place for what a request brings.

    Not to think is what a model without thoughts does anyway.
    """
    if tools is not None and tools.tools and tools.choice != ToolChoice.NONE:
        require(model, "tools")
    if think is not None and think != Think.OFF:
        require(model, "thinking")


def _reason(reason: frames.Finished.Reason.ValueType) -> str:
    return _REASONS.get(reason, "stop")


_REASONS = {
    frames.Finished.REASON_LENGTH: "length",
    frames.Finished.REASON_TOOL_CALLS: "tool_calls",
}


def _done(finished: frames.Finished, seed: int, load_ns: int, arrived_ns: int) -> Done:
    return Done(
        finish_reason=_reason(finished.reason),
        prompt_tokens=finished.prompt_tokens,
        cached_tokens=finished.cached_tokens,
        generated_tokens=finished.generated_tokens,
        total_ns=time.monotonic_ns() - arrived_ns,
        load_ns=load_ns,
        queue_ns=finished.queue_ns,
        prompt_ns=finished.prompt_ns,
        generate_ns=finished.generate_ns,
        seed=seed,
        stop=finished.stop,
        choices=tuple(ChoiceDone(_reason(c.reason), c.generated_tokens, c.stop) for c in finished.choices),
        dropped_messages=finished.dropped_messages,
        dropped_tokens=finished.dropped_tokens,
        shifted_tokens=finished.shifted_tokens,
        drafted_tokens=finished.drafted_tokens,
        accepted_tokens=finished.accepted_tokens,
    )
