"""Runs models: what every adapter (gRPC, HTTP) offers, in terms of plain values."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol

from lmd.daemon.config import Config
from lmd.daemon.errors import RunnerCrashed, RunnerHung
from lmd.daemon.parameters import effective, load_settings, sampling
from lmd.daemon.residency.residency import WAITING_INTERVAL_S, Residency
from lmd.daemon.residency.values import Loadable, Waiting
from lmd.daemon.runner_answer import Answer
from lmd.registry.errors import CapabilityMissing, InvalidRequest
from lmd.registry.lm_config import Message
from lmd.runner.v1 import frames_pb2 as frames

ROLES = ("system", "user", "assistant", "tool")


class AnswerableModel(Loadable, Protocol):
    """What inference has to know of a resolved model, beside what residency does."""

    @property
    def system(self) -> str | None:
        """The manifest's system prompt."""

    @property
    def messages(self) -> Sequence[Message]:
        """The messages that start every chat."""

    @property
    def capabilities(self) -> Sequence[str]:
        """What the model can do."""


class ModelSource(Protocol):
    """Finds models by what users call them."""

    async def resolve(self, text: str) -> AnswerableModel:
        """Return the model that a reference means."""


@dataclass(frozen=True, slots=True)
class Delta:
    """The next text: whole characters, never empty; *generated_tokens* counts from the start of the answer."""

    text: str
    generated_tokens: int


@dataclass(frozen=True, slots=True)
class Done:
    """The end of an answer; *finish_reason* is "stop" or "length"."""

    finish_reason: str
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    total_ns: int
    load_ns: int
    queue_ns: int
    prompt_ns: int
    generate_ns: int
    seed: int
    stop: str


Event = Waiting | Delta | Done


class Inference:
    """Answers prompts and chats.

    The streams end with exactly one `Done`, or raise. `Waiting` comes before the first text only, when what a request
    waits for changes, at most five times a second. Text that a slow consumer has not taken is merged into its next
    `Delta`. Closing a stream stops the work; use `contextlib.aclosing`. *cache_scope* names the caller: prefixes of
    prompts are shared within one scope only.
    """

    def __init__(self, catalog: ModelSource, residency: Residency, config: Config) -> None:
        self._catalog = catalog
        self._residency = residency
        self._num_ctx = config.runtime.num_ctx

    def generate(
        self,
        *,
        model: str,
        prompt: str,
        system: str | None = None,
        raw: bool = False,
        parameters: Mapping[str, object] | None = None,
        keep_alive: timedelta | None = None,
        cache_scope: str = "",
    ) -> AsyncGenerator[Event, None]:
        """Continue a prompt.

        With a chat template and without *raw* the prompt is one user turn, after the system prompt and the manifest's
        messages. Without a template a system prompt is put before the prompt, and a blank line between them. *system*
        replaces the manifest's; "" means none.

        Raises:
            InvalidRef, ModelNotFound, InvalidRequest, CapabilityMissing: the request cannot be served.
            LmdError: as `Residency.enqueue`, and what loading and running end with.
        """

        def build(resolved: AnswerableModel) -> frames.Submit:
            _require(resolved, "completion")
            if raw and system:
                raise InvalidRequest("a raw prompt takes no system prompt", field="system")
            in_effect = resolved.system if system is None else system
            if raw:
                return frames.Submit(prompt=prompt)
            if "chat" in resolved.capabilities:
                return frames.Submit(chat=_chat(_conversation(resolved, in_effect, [Message("user", prompt)])))
            return frames.Submit(prompt=f"{in_effect}\n\n{prompt}" if in_effect else prompt)

        return self._answer(model, build, parameters or {}, keep_alive, cache_scope)

    def chat(
        self,
        *,
        model: str,
        messages: Sequence[Message],
        parameters: Mapping[str, object] | None = None,
        keep_alive: timedelta | None = None,
        cache_scope: str = "",
    ) -> AsyncGenerator[Event, None]:
        """Answer a chat.

        The manifest's system prompt is put before the messages unless the first of them is a system message; the
        manifest's own messages follow the system prompt.

        Raises:
            CapabilityMissing: the model has no chat template; and as `generate`.
        """

        def build(resolved: AnswerableModel) -> frames.Submit:
            _require(resolved, "chat")
            _check(messages)
            system, turns = resolved.system, list(messages)
            if turns[0].role == "system":
                system = turns.pop(0).content
            return frames.Submit(chat=_chat(_conversation(resolved, system, turns)))

        return self._answer(model, build, parameters or {}, keep_alive, cache_scope)

    async def _answer(
        self,
        ref: str,
        build: Callable[[AnswerableModel], frames.Submit],
        requested: Mapping[str, object],
        keep_alive: timedelta | None,
        cache_scope: str,
    ) -> AsyncGenerator[Event, None]:
        arrived_ns = time.monotonic_ns()
        model = await self._catalog.resolve(ref)
        submit = build(model)
        parameters = effective(
            requested, model.parameters, num_ctx=self._num_ctx, train_ctx=model.header.context_length
        )
        settings = load_settings(parameters)
        submit.sampling.CopyFrom(sampling(parameters))
        submit.cache_scope = cache_scope
        load_ns = 0
        shown: Waiting | None = None
        for last_try in (False, True):
            answer = None
            with self._residency.enqueue(model, settings, keep_alive) as ticket:
                queued_ns = time.monotonic_ns()
                while not await ticket.wait(WAITING_INTERVAL_S if shown is not None else 0):
                    if (waiting := ticket.status()) != shown:
                        shown = waiting
                        yield waiting
                if shown is not None:
                    load_ns += time.monotonic_ns() - queued_ns
                try:
                    answer = await ticket.runner.submit(submit)
                    while True:
                        if not await _changed(answer, None if answer.started else WAITING_INTERVAL_S):
                            waiting = Waiting(ticket.runner.position(answer))
                            if waiting != shown:
                                shown = waiting
                                yield waiting
                            continue
                        # What comes while the consumer has the text is for the next round.
                        finished, error = answer.finished, answer.error
                        text, tokens = answer.take()
                        if text:
                            yield Delta(text, tokens)
                        if error is not None:
                            raise error
                        if finished is not None:
                            yield _done(finished, submit.sampling.seed, load_ns, arrived_ns)
                            return
                except (RunnerCrashed, RunnerHung):
                    # A request that never got a slot was not what broke the runner, and has lost nothing yet.
                    if last_try or (answer is not None and answer.started is not None):
                        raise
                finally:
                    if answer is not None:
                        answer.close()


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


def _require(model: AnswerableModel, capability: str) -> None:
    if capability not in model.capabilities:
        hint = "it has no chat template; give it a text to continue instead" if capability == "chat" else ""
        raise CapabilityMissing(model.name, capability, hint=hint)


def _check(messages: Sequence[Message]) -> None:
    if not messages:
        raise InvalidRequest("a chat needs a message", field="messages")
    for number, message in enumerate(messages):
        if message.role not in ROLES:
            raise InvalidRequest(
                f"message {number + 1} has role {message.role!a}, not one of {', '.join(ROLES)}",
                field=f"messages[{number}].role",
            )


def _conversation(model: AnswerableModel, system: str | None, turns: Sequence[Message]) -> list[Message]:
    first = [Message("system", system)] if system else []
    return [*first, *model.messages, *turns]


def _chat(messages: Sequence[Message]) -> frames.Chat:
    return frames.Chat(messages=[frames.ChatMessage(role=m.role, content=m.content) for m in messages])


def _done(finished: frames.Finished, seed: int, load_ns: int, arrived_ns: int) -> Done:
    return Done(
        finish_reason="length" if finished.reason == frames.Finished.REASON_LENGTH else "stop",
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
    )
