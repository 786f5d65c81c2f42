"""Makes tokens of what a request brings: renders its turns, tokenizes its text."""

from __future__ import annotations

import concurrent.futures
import os
import queue
from array import array
from collections.abc import Callable
from dataclasses import dataclass

from lmd.runner.job import Request
from lmd.runner.templates import Rendered, TemplateClient, TemplateSetup
from lmd.runner.v1 import frames_pb2
from lmd.runner.vocab import TooManyTokens, Vocab

# Below this a text is tokenized in well under a step's time; a longer one goes to a thread, for the engine's sake.
_INLINE_BYTES = 32 << 10


@dataclass(frozen=True, slots=True)
class Prepared:
    """The outcome for one request: it has its prompt, or this is the failure to report."""

    request: Request
    failed: frames_pb2.Failed | None


class PromptMaker:
    """Prepares requests, several at a time, without blocking.

    Not thread-safe; call `advance` when one of `filenos` is ready or `deadline` has passed.
    """

    def __init__(self, vocab: Vocab, setup: TemplateSetup, *, num_ctx: int) -> None:
        self._vocab = vocab
        self._num_ctx = num_ctx
        self._templates = TemplateClient(setup) if setup.template else None
        self._requests: dict[int, Request] = {}
        self._renders: set[int] = set()
        self._rendered: list[Rendered] = []
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "tokenizer")
        self._tokenized: queue.SimpleQueue[Prepared] = queue.SimpleQueue()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    @property
    def wake_fileno(self) -> int:
        """The descriptor that becomes readable when the thread has something."""
        return self._wake

    @property
    def templates(self) -> TemplateClient | None:
        """The client of the render process, None when the model has no template."""
        return self._templates

    @property
    def pending(self) -> int:
        """Requests that are being prepared."""
        return len(self._requests)

    def submit(self, request: Request, message: frames_pb2.Submit) -> list[Prepared]:
        """Take a request; return it if that decides it at once."""
        self._requests[request.request_id] = request
        if message.WhichOneof("input") == "chat":
            if self._templates is None:
                return self._decided(
                    request, _failed(request, frames_pb2.Failed.KIND_NO_TEMPLATE, "the model has no chat template")
                )
            self._templates.submit(request.request_id, message.chat.SerializeToString())
            return self.advance()
        return self._tokenize(request, message.prompt.encode(), self._vocab.tokenize_prompt)

    def render(self, request_id: int, chat: frames_pb2.Chat) -> bool:
        """Render turns for `take_rendered`; return false when the model has no template."""
        if self._templates is None:
            return False
        self._renders.add(request_id)
        self._templates.submit(request_id, chat.SerializeToString())
        return True

    def take_rendered(self) -> list[Rendered]:
        """Return what came of `render` up to the last `advance`."""
        rendered, self._rendered = self._rendered, []
        return rendered

    def cancel(self, request_id: int) -> bool:
        """Take a request back; return whether it was here."""
        if request_id in self._renders and self._templates is not None:
            self._renders.remove(request_id)
            self._templates.cancel(request_id)
            return True
        if self._requests.pop(request_id, None) is None:
            return False
        if self._templates is not None:
            self._templates.cancel(request_id)
        return True

    def advance(self) -> list[Prepared]:
        """Do what can be done now; return the requests that are decided."""
        prepared: list[Prepared] = []
        if self._templates is not None:
            for rendered in self._templates.advance():
                if rendered.request_id in self._renders:
                    self._renders.remove(rendered.request_id)
                    self._rendered.append(rendered)
                    continue
                request = self._requests.get(rendered.request_id)
                if request is None:
                    continue
                if rendered.error:
                    failed = _failed(request, frames_pb2.Failed.KIND_TEMPLATE, rendered.error)
                    prepared += self._decided(request, failed)
                else:
                    prepared += self._tokenize(request, rendered.prompt, self._vocab.tokenize_rendered)
        while not self._tokenized.empty():
            done = self._tokenized.get()
            prepared += self._decided(done.request, done.failed)
        return prepared

    def drain_wake(self) -> None:
        """Reset the descriptor of the thread."""
        try:
            os.eventfd_read(self._wake)
        except BlockingIOError:
            return

    def close(self) -> None:
        """End the render process and the thread."""
        if self._templates is not None:
            self._templates.close()
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _decided(self, request: Request, failed: frames_pb2.Failed | None) -> list[Prepared]:
        # A request that was taken back meanwhile is not in the table, or another one has its place.
        if self._requests.get(request.request_id) is not request:
            return []
        del self._requests[request.request_id]
        return [Prepared(request, failed)]

    def _tokenize(self, request: Request, text: bytes, tokenize: Callable[[bytes, int], array[int]]) -> list[Prepared]:
        if len(text) <= _INLINE_BYTES:
            return self._decided(request, self._fill(request, text, tokenize))
        self._thread.submit(self._fill_in_thread, request, text, tokenize)
        return []

    def _fill_in_thread(self, request: Request, text: bytes, tokenize: Callable[[bytes, int], array[int]]) -> None:
        failed = self._fill(request, text, tokenize)
        self._tokenized.put(Prepared(request, failed))
        os.eventfd_write(self._wake, 1)

    def _fill(
        self, request: Request, text: bytes, tokenize: Callable[[bytes, int], array[int]]
    ) -> frames_pb2.Failed | None:
        try:
            # One place must be left for an answer.
            request.prompt = tokenize(text, self._num_ctx - 1)
        except TooManyTokens as error:
            return frames_pb2.Failed(
                request_id=request.request_id,
                kind=frames_pb2.Failed.KIND_CONTEXT_LENGTH,
                message=f"the prompt has {error.count} tokens, the context holds {self._num_ctx}",
                prompt_tokens=error.count,
                context_tokens=self._num_ctx,
            )
        if not request.prompt:
            return _failed(request, frames_pb2.Failed.KIND_INVALID, "the prompt is empty")
        return None


def _failed(request: Request, kind: frames_pb2.Failed.Kind.ValueType, message: str) -> frames_pb2.Failed:
    return frames_pb2.Failed(request_id=request.request_id, kind=kind, message=message)
