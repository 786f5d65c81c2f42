"""One answer of a model, from the request to the last character on the screen."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lmd.cli.bodies import Body, HeldBody, RawBody, WrappedBody
from lmd.cli.context import note
from lmd.cli.errors import ClientError
from lmd.cli.spinner import Spinner, waiting_text
from lmd.cli.terminal import can_redraw, is_terminal, quiet_keyboard
from lmd.cli.thoughts import HiddenThoughts, ShownThoughts, Thoughts
from lmd.cli.ticking import with_ticks
from lmd.v1 import inference_service_pb2 as pb
from lmd.v1 import model_pb2

if TYPE_CHECKING:
    from google.protobuf.duration_pb2 import Duration

    from lmd.cli.client import Client, EventStream

AnswerEvent = pb.ChatResponse | pb.GenerateResponse


@dataclass(slots=True)
class Request:
    """What is asked of a model. Chats for a model that chats; otherwise the last message is completed."""

    model: model_pb2.ModelInfo
    messages: list[model_pb2.Message]
    system: str | None = None
    parameters: model_pb2.Parameters | None = None
    keep_alive: Duration | None = None
    raw: bool = False
    options: pb.AnswerOptions | None = None
    think: pb.Think.ValueType = pb.THINK_UNSPECIFIED
    hides_thoughts: bool = False

    @property
    def chats(self) -> bool:
        """Whether this is a chat rather than a completion."""
        return "chat" in self.model.model.capabilities and not self.raw

    def send(self, client: Client) -> EventStream[AnswerEvent]:
        """Send it and return the events of the answer."""
        name = self.model.model.name
        if self.chats:
            system = [model_pb2.Message(role="system", content=self.system)] if self.system is not None else []
            chat = pb.ChatRequest(
                model=name,
                messages=[*system, *self.messages],
                parameters=self.parameters,
                keep_alive=self.keep_alive,
                options=self.options,
                think=self.think,
            )
            return client.stream(client.inference.Chat, chat)
        generate = pb.GenerateRequest(
            model=name,
            prompt=self.messages[-1].content,
            system=self.system,
            raw=self.raw,
            parameters=self.parameters,
            keep_alive=self.keep_alive,
            options=self.options,
            think=self.think,
        )
        return client.stream(client.inference.Generate, generate)

    def asked_for(self, tokens: int) -> bool:
        """Return whether an answer of *tokens* has the length that the request, or else the model, sets."""
        for parameters in (self.parameters, self.model.parameters):
            if parameters is not None and parameters.HasField("num_predict"):
                return 0 <= parameters.num_predict <= tokens
        return False


@dataclass(slots=True)
class Choice:
    """One of the answers that were asked for."""

    text: str = ""
    thinking: str = ""
    logprobs: list[pb.TokenLogprob] = field(default_factory=list)


@dataclass(slots=True)
class Answer:
    """What came back. *done* is unset when the user interrupted it."""

    choices: dict[int, Choice] = field(default_factory=dict)
    done: pb.AnswerDone | None = None

    @property
    def text(self) -> str:
        """The text of the first choice."""
        return self.choice(0).text

    def choice(self, number: int) -> Choice:
        """Return a choice, from 0."""
        return self.choices.setdefault(number, Choice())


def body_for_stdout(*, markdown: bool, wrap: bool) -> Body:
    """Return what suits stdout: everything untouched into a pipe, and on a terminal what is asked for."""
    if not is_terminal(sys.stdout):
        return RawBody(sys.stdout)
    if markdown and can_redraw(sys.stdout):
        from lmd.cli.markdown import MarkdownBody

        return MarkdownBody(sys.stdout, time.monotonic)
    return WrappedBody(sys.stdout) if wrap else RawBody(sys.stdout, clean=True)


def receive(client: Client, request: Request, body: Body) -> Answer:
    """Send *request* and show the answer as it comes. Ctrl-C stops the answer: the result is then not done.

    Raises:
        ClientError: the answer fails; what came before is on the screen.
    """
    answer, interrupted = Answer(), False
    spinner = Spinner()
    shown = not request.hides_thoughts and not isinstance(body, HeldBody)
    thoughts: Thoughts = ShownThoughts(sys.stderr) if shown else HiddenThoughts()
    beating = spinner.visible or not isinstance(body, RawBody | HeldBody)
    try:
        with quiet_keyboard(), request.send(client) as events:
            for event in with_ticks(events) if beating else events:
                _take(event, answer, request, body, thoughts, spinner)
    except KeyboardInterrupt:
        interrupted = True
    finally:
        spinner.clear()
        thoughts.end(answered=False)
        body.close()
    if answer.done is None and not interrupted:
        raise ClientError("the daemon ended the answer without a result", reason="INTERNAL")
    if answer.done is not None:
        _note_limits(request, answer.done)
    return answer


def _note_limits(request: Request, done: pb.AnswerDone) -> None:
    """Say where the context was too short: what was left out, and that an answer ends for want of room."""
    left_out = [
        f"{count} {what}" if count == 1 else f"{count} {what}s"
        for count, what in ((done.dropped_messages, "message"), (done.dropped_tokens, "token"))
        if count
    ]
    if left_out:
        note(f"the context is too short: the first {' and '.join(left_out)} were left out")
    if done.shifted_tokens:
        note(f"the context is full: {done.shifted_tokens} tokens were left out while answering")
    if any(_is_cut(request, ended) for ended in done.choices or [done]):
        note("the context is full: the answer ends here; a larger `num_ctx` leaves more room")


def _is_cut(request: Request, done: pb.AnswerDone | pb.ChoiceDone) -> bool:
    """Return whether an answer ends for want of room, which nobody asked for."""
    return done.finish_reason == pb.AnswerDone.FINISH_REASON_LENGTH and not request.asked_for(done.generated_tokens)


def _take(
    event: AnswerEvent | None, answer: Answer, request: Request, body: Body, thoughts: Thoughts, spinner: Spinner
) -> None:
    if event is None:
        if answer.text:
            body.refresh()
        else:
            spinner.refresh()
    elif event.HasField("delta"):
        delta = event.delta
        choice = answer.choice(delta.choice)
        choice.logprobs.extend(delta.logprobs)
        choice.thinking += delta.thinking
        choice.text += delta.text
        if delta.choice == 0:
            _show(delta, body, thoughts, spinner)
    elif event.HasField("waiting"):
        spinner.say(waiting_text(request.model.model.name, event.waiting))
    elif event.HasField("done"):
        answer.done = event.done


def _show(delta: pb.TextDelta, body: Body, thoughts: Thoughts, spinner: Spinner) -> None:
    """Show a piece of the first choice."""
    if delta.thinking:
        if thoughts.visible:
            spinner.clear()
            thoughts.feed(delta.thinking)
        else:
            spinner.say("thinking")
    if delta.text:
        spinner.clear()
        thoughts.end(answered=True)
        body.feed(delta.text)
