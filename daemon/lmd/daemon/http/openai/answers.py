"""What the answers to chats and completions have in common: their envelope, usage, log probabilities."""

from __future__ import annotations

import codecs
import json
import secrets
import time
from collections.abc import Iterable, Sequence

from lmd.daemon.answer_events import Done, TokenLogprob
from lmd.daemon.http.openai.requests import StreamOptions
from lmd.daemon.http.progress import EXTRA_KEY, done_extra

DONE = b"data: [DONE]\n\n"

_dump = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode


class Envelope:
    """The fields that an answer begins with, and what stands around its choices."""

    __slots__ = ("fields",)

    def __init__(self, prefix: str, kind: str, model: str, version: str) -> None:
        #: In the order of the API.
        self.fields: dict[str, object] = {
            "id": f"{prefix}-{secrets.token_hex(12)}",
            "object": kind,
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": f"fp_lmd_{version}",
        }

    def answer(self, choices: Sequence[dict[str, object]], ends: Sequence[Done]) -> bytes:
        """Return the whole answer."""
        whole = {**self.fields, "choices": choices, "usage": usage_of(ends), EXTRA_KEY: extra_of(ends)}
        return _dump(whole).encode()


class StreamEnvelope(Envelope):
    """The same around the choices of each chunk; one id and one time for all."""

    __slots__ = ("_head", "_tail", "_with_usage")

    def __init__(self, prefix: str, kind: str, model: str, version: str, options: StreamOptions | None) -> None:
        super().__init__(prefix, kind, model, version)
        self._with_usage = options is not None and options.include_usage is True
        self._head = "data: " + _dump(self.fields)[:-1] + ',"choices":['
        # With usage at the end, OpenAI sends null everywhere else.
        self._tail = '],"usage":null}\n\n' if self._with_usage else "]}\n\n"

    def chunk(self, choice: dict[str, object]) -> bytes:
        """Return the event that tells of one choice."""
        return f"{self._head}{_dump(choice)}{self._tail}".encode()

    def end(self, ends: Sequence[Done]) -> list[bytes]:
        """Return the events after the last choice: usage, when the client asked for it, and the mark of the end."""
        if not self._with_usage:
            return [DONE]
        usage, extra = _dump(usage_of(ends)), _dump(extra_of(ends))
        return [f'{self._head}],"usage":{usage},"{EXTRA_KEY}":{extra}}}\n\n'.encode(), DONE]


def extra_of(ends: Iterable[Done]) -> dict[str, int]:
    """Return what answers to one request tell beyond OpenAI's fields."""
    extra: dict[str, int] = {}
    for done in ends:
        for name, value in done_extra(done).items():
            extra[name] = extra.get(name, 0) + value
    return extra


def usage_of(ends: Iterable[Done]) -> dict[str, object]:
    """Return what answers to one request took together."""
    ends = tuple(ends)
    prompt_tokens = sum(done.prompt_tokens for done in ends)
    completion_tokens = sum(done.generated_tokens for done in ends)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": sum(done.cached_tokens for done in ends)},
    }


def finish_reasons(done: Done) -> list[str]:
    """Return how each choice ended, in order."""
    return [choice.finish_reason for choice in done.choices] or [done.finish_reason]


def chat_logprobs(tokens: Iterable[TokenLogprob]) -> list[dict[str, object]]:
    """Return log probabilities as chats tell them."""
    return [
        {**_chat_token(token), "top_logprobs": [_chat_token(alternative) for alternative in token.top]}
        for token in tokens
    ]


def _chat_token(token: TokenLogprob) -> dict[str, object]:
    return {
        "token": token.token.decode(errors="replace"),
        "logprob": token.logprob,
        "bytes": list(token.token),
    }


class LegacyLogprobs:
    """Writes log probabilities as completions tell them, where every token has its place in the text of its choice."""

    def __init__(self, offset: int = 0) -> None:
        self._offset = offset
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def of(self, tokens: Sequence[TokenLogprob]) -> dict[str, object]:
        """Return what to tell of the next tokens. A character of several tokens begins where the first of them does."""
        offsets: list[int] = []
        for token in tokens:
            offsets.append(self._offset)
            self._offset += len(self._decoder.decode(token.token))
        return {
            "tokens": [_legacy_text(token) for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [_alternatives(token) for token in tokens],
            "text_offset": offsets,
        }


def _alternatives(token: TokenLogprob) -> dict[str, float]:
    found = {_legacy_text(alternative): alternative.logprob for alternative in token.top}
    found.setdefault(_legacy_text(token), token.logprob)
    return found


def _legacy_text(token: TokenLogprob) -> str:
    """Return the text of a token; bytes that are no text are written as OpenAI does it."""
    try:
        return token.token.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token.token)
