"""A chat: reads messages, shows answers, and remembers both."""

from __future__ import annotations

import os
import sys

import click

from lmd.cli.answer import Request, body_for_stdout, receive
from lmd.cli.client import Client
from lmd.cli.context import note
from lmd.cli.errors import ClientError, show_error
from lmd.cli.loading import ensure_model, load, require_generating
from lmd.cli.places import history_file
from lmd.cli.repl.reader import Reader, StreamReader, read_message
from lmd.cli.repl.slash import Slash
from lmd.cli.terminal import is_terminal
from lmd.cli.timings import print_timings
from lmd.v1 import inference_service_pb2 as inference_pb
from lmd.v1 import model_pb2

_LEAVE_HINT = "Ctrl-D or /bye leaves"
#: The daemon cannot know that most of the prompt is what was said before.
_FULL_HINT = (
    "`/clear` forgets the conversation, `/set parameter num_ctx N` makes room for more; "
    "`lm run --context truncate` drops the oldest messages by itself"
)


class Session:
    """One chat with a model. What `/set` changes is public, for the commands to change."""

    def __init__(self, client: Client, request: Request, *, plain: bool = False, timings: bool = False) -> None:
        self.client = client
        self.request = request
        if request.parameters is None:
            request.parameters = model_pb2.Parameters()
        if request.options is None:
            request.options = inference_pb.AnswerOptions()
        self.parameters, self.options = request.parameters, request.options
        self.markdown = not plain
        self.wordwrap = not plain
        self.timings = timings
        self._on_terminal = is_terminal(sys.stdin) and is_terminal(sys.stdout)
        self._slash = Slash(self)
        self.reader: Reader = self._make_reader()

    def run(self) -> None:
        """Load the model, then take messages until the user leaves.

        Raises:
            ClientError: the model cannot be loaded, or does not generate.
        """
        require_generating(self.request.model)
        load(self.client, self.name, self.parameters, self.request.keep_alive)
        if not self.request.chats:
            note(f"{self.name} has no chat template: it continues what you type")
        while True:
            try:
                text = read_message(self.reader)
            except EOFError:
                return
            except KeyboardInterrupt:
                if not self._on_terminal:
                    raise
                note(_LEAVE_HINT)
                continue
            if text and not self._take(text):
                return

    @property
    def name(self) -> str:
        """The name of the model."""
        return self.request.model.model.name

    def switch(self, ref: str) -> None:
        """Go on with another model and a new conversation; settings stay.

        Raises:
            ClientError: there is no such model, it cannot be loaded, or does not generate; the session goes on with
                the old one.
        """
        info = ensure_model(self.client, ref)
        require_generating(info)
        load(self.client, info.model.name, self.parameters, self.request.keep_alive)
        self.request.model = info
        self.request.messages.clear()

    def _take(self, text: str) -> bool:
        """Answer a message or obey a command; return whether the session goes on."""
        try:
            if text.startswith("/"):
                return self._slash.obey(text)
            self._answer(text)
        except ClientError as error:
            show_error(error)
        except KeyboardInterrupt:
            if not self._on_terminal:
                raise
            note("stopped")
        if self._on_terminal:
            click.echo()
        return True

    def _answer(self, text: str) -> None:
        """Send *text* with what was said before. A message that gets no answer at all is forgotten."""
        message = model_pb2.Message(role="user", content=text)
        messages = self.request.messages
        if not self.request.chats:
            messages.clear()
        messages.append(message)
        body = body_for_stdout(markdown=self.markdown and self.wordwrap and self.request.chats, wrap=self.wordwrap)
        try:
            answer = receive(self.client, self.request, body)
        except ClientError as error:
            messages.pop()
            if error.reason == "CONTEXT_LENGTH_EXCEEDED" and messages:
                error.hint = _FULL_HINT
            raise
        if not answer.text and answer.done is None:
            messages.pop()
        elif self.request.chats:
            thinking = answer.choice(0).thinking
            messages.append(model_pb2.Message(role="assistant", content=answer.text, thinking=thinking))
        if answer.done is None:
            raise KeyboardInterrupt
        if self.timings:
            print_timings(answer.done)

    def _make_reader(self) -> Reader:
        if not self._on_terminal:
            return StreamReader()
        from lmd.cli.repl.prompt import PromptReader

        return PromptReader(history_file(os.environ), self._slash.complete, self._placeholder)

    def _placeholder(self) -> str:
        what = "Send a message" if self.request.chats else "Text to continue"
        return f"{what} (/? for help)"
