"""Makes tokens of what a request brings: renders its turns, tokenizes its text."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import dataclass, replace

from lmd.runner.background import INLINE_BYTES, Background, Frames
from lmd.runner.failures import failure, too_long
from lmd.runner.insertion import read_gap
from lmd.runner.job import Request
from lmd.runner.prefix_cache import common_prefix
from lmd.runner.templates import Rendered, TemplateClient, TemplateSetup
from lmd.runner.trimming import Trim, room_for_prompt
from lmd.runner.v1 import frames_pb2
from lmd.runner.vocab import InsertTokens, TooManyTokens, Vocab

# A template that a request brings; the longest on the Hub have some 30 kB.
_MAX_TEMPLATE_CHARACTERS = 256 << 10
# Enough for what opens thoughts, and the space after it.
_PROMPT_END_BYTES = 256

# Not ids of requests: two chats that differ in all but what the manifest puts before them.
_PROBES = {-2: "A", -3: "B"}


@dataclass(frozen=True, slots=True)
class Prepared:
    """The outcome for one request: it has its prompt, or this is the failure to report."""

    request: Request
    failed: frames_pb2.Failed | None


@dataclass(frozen=True, slots=True)
class _Tokenized:
    """What the tokenizer made of a text: tokens, or how many too many there are, and how many were left out."""

    tokens: array[int]
    excess: int = 0
    dropped: int = 0


class PromptMaker:
    """Prepares requests, several at a time, without blocking.

    Not thread-safe; call `advance` when the templates have something, when their `deadline` has passed, and after the
    background's `collect`: long texts are tokenized there.

    Attributes:
        manifest: the tokens that every chat begins with, since the manifest puts them there; empty until known.
    """

    def __init__(
        self,
        vocab: Vocab,
        setup: TemplateSetup,
        background: Background,
        *,
        num_ctx: int,
        manifest_chat: frames_pb2.Chat | None = None,
    ) -> None:
        self.manifest: array[int] = array("i")
        self._vocab = vocab
        self._num_ctx = num_ctx
        self._setup = setup
        self._templates = TemplateClient(setup) if setup.template else None
        #: Renders templates that requests bring, in a child of its own: no stranger's template comes near the turns
        #: of others, or holds them up.
        self._guests: TemplateClient | None = None
        self._requests: dict[int, Request] = {}
        self._trims: dict[int, Trim] = {}
        self._probed: list[array[int]] = []
        self._renders: set[int] = set()
        self._rendered: list[Rendered] = []
        self._background = background
        self._arrived: list[Prepared] = []
        if self._templates is not None and manifest_chat is not None and manifest_chat.messages:
            for probe, text in _PROBES.items():
                chat = frames_pb2.Chat(messages=[*manifest_chat.messages, frames_pb2.ChatMessage(role="user")])
                chat.messages[-1].content = text
                self._templates.submit(probe, chat.SerializeToString())

    @property
    def clients(self) -> list[TemplateClient]:
        """The clients of the render processes."""
        return [client for client in (self._templates, self._guests) if client is not None]

    @property
    def pending(self) -> int:
        """Requests that are being prepared."""
        return len(self._requests)

    def submit(self, request: Request) -> list[Prepared]:
        """Take a request; return it if that decides it at once."""
        self._requests[request.request_id] = request
        message = request.message
        kind = message.WhichOneof("input")
        if kind == "chat":
            if len(message.chat.template) > _MAX_TEMPLATE_CHARACTERS:
                problem = f"it has more than {_MAX_TEMPLATE_CHARACTERS} characters"
                return self._decided(request, _failed(request, frames_pb2.Failed.KIND_TEMPLATE, problem))
            if not self._render(request.request_id, message.chat):
                return self._decided(
                    request, _failed(request, frames_pb2.Failed.KIND_NO_TEMPLATE, "the model has no chat template")
                )
            return self.advance()
        if kind == "tokens":
            return self._settle(request, _Tokenized(array("i", message.tokens.ids)))
        if kind == "insert":
            return self._insert(request)
        return self._tokenize(request, message.prompt.encode(), self._vocab.tokenize_prompt)

    def render(self, request_id: int, chat: frames_pb2.Chat) -> bool:
        """Render turns for `take_rendered`; return false when the model has no template."""
        if self._render(request_id, chat):
            self._renders.add(request_id)
            return True
        return False

    def take_rendered(self) -> list[Rendered]:
        """Return what came of `render` up to the last `advance`."""
        rendered, self._rendered = self._rendered, []
        return rendered

    def cancel(self, request_id: int) -> bool:
        """Take a request back; return whether it was here."""
        if request_id in self._renders:
            self._renders.remove(request_id)
        elif self._requests.pop(request_id, None) is None:
            return False
        self._trims.pop(request_id, None)
        for client in self.clients:
            client.cancel(request_id)
        return True

    def advance(self) -> list[Prepared]:
        """Do what can be done now; return the requests that are decided."""
        prepared: list[Prepared] = []
        for client in self.clients:
            for rendered in client.advance():
                prepared += self._take(rendered)
        prepared += self._arrived
        self._arrived.clear()
        return prepared

    def close(self) -> None:
        """End the render processes."""
        for client in self.clients:
            client.close()

    def _render(self, request_id: int, chat: frames_pb2.Chat) -> bool:
        """Have turns rendered; false when there is no template."""
        client = self._templates
        if chat.template:
            if self._guests is None:
                self._guests = TemplateClient(replace(self._setup, template=""))
            client = self._guests
        if client is None:
            return False
        client.submit(request_id, chat.SerializeToString())
        return True

    def _take(self, rendered: Rendered) -> list[Prepared]:
        """Go on with what was rendered."""
        if rendered.request_id in _PROBES:
            self._note_probe(rendered.prompt)
        elif rendered.request_id in self._renders:
            self._renders.remove(rendered.request_id)
            self._rendered.append(rendered)
        elif (request := self._requests.get(rendered.request_id)) is not None:
            if rendered.error:
                return self._decided(request, _failed(request, frames_pb2.Failed.KIND_TEMPLATE, rendered.error))
            if request.reading is not None:
                end = rendered.prompt[-_PROMPT_END_BYTES:].decode(errors="replace")
                request.opens_thoughts = request.reading.style.opens_thoughts(end)
            return self._tokenize(request, rendered.prompt, self._vocab.tokenize_rendered)
        return []

    def _note_probe(self, prompt: bytes) -> None:
        """Learn from two chats that end differently what all begin with; a template that fails teaches nothing."""
        try:
            self._probed.append(self._vocab.tokenize_rendered(prompt, self._num_ctx - 1))
        except TooManyTokens:
            return
        if len(self._probed) == len(_PROBES):
            one, other = self._probed
            self.manifest = one[: common_prefix(one, other, len(one))]

    def _decided(self, request: Request, failed: frames_pb2.Failed | None) -> list[Prepared]:
        # A request that was taken back meanwhile is not in the table, or another one has its place.
        if self._requests.get(request.request_id) is not request:
            return []
        del self._requests[request.request_id]
        self._trims.pop(request.request_id, None)
        return [Prepared(request, failed)]

    def _tokenize(self, request: Request, text: bytes, tokenize: Callable[[bytes, int], array[int]]) -> list[Prepared]:
        return self._here_or_there(request, len(text), lambda: self._read(request, text, tokenize))

    def _insert(self, request: Request) -> list[Prepared]:
        insert, marks = request.message.insert, self._vocab.insert_tokens
        if marks is None:
            kind, problem = frames_pb2.Failed.KIND_CAPABILITY, "the model has no tokens for filling a gap"
            return self._decided(request, failure(request.request_id, kind, problem, field="insert").failed)
        prefix, suffix = insert.prefix.encode(), insert.suffix.encode()

        def read() -> _Tokenized:
            return self._read_gap(request, marks, prefix, suffix)

        return self._here_or_there(request, len(prefix) + len(suffix), read)

    def _here_or_there(self, request: Request, size_bytes: int, read: Callable[[], _Tokenized]) -> list[Prepared]:
        if size_bytes <= INLINE_BYTES:
            return self._settle(request, read())
        self._background.run(read, lambda tokenized: self._arrive(request, tokenized))
        return []

    def _arrive(self, request: Request, tokenized: _Tokenized) -> Frames:
        """Take what the background made of a long text, for the next `advance`."""
        if self._requests.get(request.request_id) is request:
            self._arrived += self._settle(request, tokenized)
        return []

    def _read(self, request: Request, text: bytes, tokenize: Callable[[bytes, int], array[int]]) -> _Tokenized:
        # A raw prompt that may be cut is needed whole: its end is what stays.
        cut_raw = _may_drop(request) and request.message.WhichOneof("input") == "prompt"
        limit = len(text) + 8 if cut_raw else self._limit(request)
        try:
            return _Tokenized(tokenize(text, limit))
        except TooManyTokens as error:
            return _Tokenized(array("i"), error.count)

    def _read_gap(self, request: Request, marks: InsertTokens, prefix: bytes, suffix: bytes) -> _Tokenized:
        gap = read_gap(self._vocab, marks, prefix, suffix)
        if gap.size < self._num_ctx:
            return _Tokenized(gap.prompt())
        if not _may_drop(request):
            return _Tokenized(array("i"), gap.size)
        tokens = gap.prompt(room_for_prompt(self._num_ctx, request.message.sampling.num_predict))
        return _Tokenized(tokens, dropped=gap.size - len(tokens))

    def _limit(self, request: Request) -> int:
        """Return the most tokens that the prompt may have now: once it is shortened, the answer gets room."""
        if request.request_id in self._trims:
            return room_for_prompt(self._num_ctx, request.message.sampling.num_predict)
        # One place must be left for an answer.
        return self._num_ctx - 1

    def _settle(self, request: Request, tokenized: _Tokenized) -> list[Prepared]:
        """Take the tokens, or shorten what they come from and try again, or give up."""
        tokens, limit = tokenized.tokens, self._num_ctx - 1
        count = tokenized.excess or len(tokens)
        is_chat = request.message.WhichOneof("input") == "chat"
        if is_chat and _may_drop(request) and (request.request_id in self._trims or count > limit):
            return self._shorten(request, tokenized)
        if count > limit and tokens and _may_drop(request):
            keep = room_for_prompt(self._num_ctx, request.message.sampling.num_predict)
            first = 1 if tokens[0] == self._vocab.bos else 0
            request.dropped_tokens = len(tokens) - keep
            tokens, count = tokens[:first] + tokens[len(tokens) - keep + first :], keep
        if count > limit:
            return self._decided(request, self._too_long(request, count))
        if not tokens:
            return self._decided(request, _failed(request, frames_pb2.Failed.KIND_INVALID, "the prompt is empty"))
        request.prompt = tokens
        request.dropped_tokens += tokenized.dropped
        return self._decided(request, None)

    def _shorten(self, request: Request, tokenized: _Tokenized) -> list[Prepared]:
        """Go on with the search for the most turns that fit."""
        trim = self._trims.get(request.request_id)
        if trim is None:
            trim = self._trims[request.request_id] = Trim(request.message.chat)
        else:
            trim.note(tokenized.tokens if not tokenized.excess else None, tokenized.excess)
        if (shorter := trim.next_chat()) is not None:
            rendering = self._render(request.request_id, shorter)
            assert rendering, "the whole chat was rendered"
            return self.advance()
        if trim.best is None:
            return self._decided(request, self._too_long(request, trim.shortest or tokenized.excess))
        request.prompt, request.dropped_messages = trim.best
        return self._decided(request, None)

    def _too_long(self, request: Request, count: int) -> frames_pb2.Failed:
        return too_long(request.request_id, tokens=count, context=self._num_ctx, what="the prompt").failed


def _may_drop(request: Request) -> bool:
    return request.message.context_policy in (frames_pb2.CONTEXT_POLICY_TRUNCATE, frames_pb2.CONTEXT_POLICY_SHIFT)


def _failed(request: Request, kind: frames_pb2.Failed.Kind.ValueType, message: str) -> frames_pb2.Failed:
    return failure(request.request_id, kind, message).failed
