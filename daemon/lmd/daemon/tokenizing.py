"""Shows what a model reads: the tokens of texts, the text of tokens, the prompt that its template makes of a chat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

from lmd.daemon.conversations import Think, Tools, Turn, chat_frame, chat_turns
from lmd.daemon.inference import AnswerableModel, check_template_inputs, require
from lmd.daemon.model_calls import Caller, ModelCalls
from lmd.registry.errors import InvalidRequest
from lmd.registry.lm_config import Message
from lmd.runner.v1 import frames_pb2 as frames

#: The bytes of one text; more makes a reply that few clients take.
MAX_TEXT_BYTES = 1 << 20
MAX_TOKENS = 1 << 20

_EVERYONE = Caller()


@dataclass(frozen=True, slots=True)
class Tokens:
    """Tokens, and the bytes of each, which need not be whole characters."""

    ids: Sequence[int]
    pieces: Sequence[bytes]


@dataclass(frozen=True, slots=True)
class Prompt:
    """A rendered chat, and its tokens."""

    text: str
    tokens: Tokens


class Tokenizing:
    """Tokenizes with the models' own tokenizers; they are loaded for that."""

    def __init__(self, calls: ModelCalls) -> None:
        self._calls = calls

    async def tokenize(
        self,
        *,
        model: str | AnswerableModel,
        text: str,
        add_special: bool = False,
        plain: bool = False,
        keep_alive: timedelta | None = None,
        caller: Caller = _EVERYONE,
    ) -> Tokens:
        """Return the tokens of a text of at most a mebibyte.

        *add_special* adds those that the model wants around a prompt; with *plain* text that names a special token
        stays text.

        Raises:
            LmdError: as `ModelCalls.call`.
        """
        size_bytes = len(text.encode())
        if size_bytes > MAX_TEXT_BYTES:
            raise InvalidRequest(f"`text` has {size_bytes} bytes, more than {MAX_TEXT_BYTES}", field="text")

        def build(_: AnswerableModel) -> frames.DaemonFrame:
            return frames.DaemonFrame(tokenize=frames.Tokenize(text=text, add_special=add_special, plain=plain))

        tokenized = (await self._calls.call(model, build, caller=caller, keep_alive=keep_alive)).frame.tokenized
        return Tokens(tokenized.tokens, tokenized.pieces)

    async def detokenize(
        self,
        *,
        model: str | AnswerableModel,
        tokens: Sequence[int],
        keep_alive: timedelta | None = None,
        caller: Caller = _EVERYONE,
    ) -> str:
        """Return the text of tokens; bytes that are no character become U+FFFD.

        Raises:
            InvalidRequest: the model has no such token; and as `ModelCalls.call`.
        """
        if len(tokens) > MAX_TOKENS:
            raise InvalidRequest(f"`tokens` has {len(tokens)}, more than {MAX_TOKENS}", field="tokens")

        def build(_: AnswerableModel) -> frames.DaemonFrame:
            return frames.DaemonFrame(detokenize=frames.Detokenize(tokens=tokens))

        reply = await self._calls.call(model, build, caller=caller, keep_alive=keep_alive)
        return reply.frame.detokenized.text

    async def apply_template(
        self,
        *,
        model: str | AnswerableModel,
        messages: Sequence[Turn | Message],
        tools: Tools | None = None,
        think: Think | None = None,
        keep_alive: timedelta | None = None,
        caller: Caller = _EVERYONE,
    ) -> Prompt:
        """Return the prompt that a chat of *messages* would be, with the manifest's system prompt and messages.

        Raises:
            CapabilityMissing: the model has no chat template.
            TemplateFailed: the template fails on this chat; and as `ModelCalls.call`.
        """

        def build(resolved: AnswerableModel) -> frames.DaemonFrame:
            require(resolved, "chat")
            check_template_inputs(resolved, tools, think)
            turns = chat_turns(resolved.system, resolved.messages, messages)
            return frames.DaemonFrame(render=frames.Render(chat=chat_frame(turns, tools=tools, think=think)))

        rendered = (await self._calls.call(model, build, caller=caller, keep_alive=keep_alive)).frame.rendered
        return Prompt(rendered.prompt, Tokens(rendered.tokens, rendered.pieces))
