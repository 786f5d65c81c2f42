"""The objects that Ollama's routes answer with, as JSON; numbers that are zero are left out, as Ollama does."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from datetime import UTC, datetime

from starlette.responses import Response

from lmd.daemon.answer_events import Done, TokenLogprob
from lmd.daemon.http.ollama.failures import Refusal
from lmd.daemon.http.progress import EXTRA_KEY, done_extra

JSON = "application/json; charset=utf-8"
NDJSON = "application/x-ndjson"

# Made once: it writes a line for every token.
_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False)

#: A call of functions ends an answer as everything else does.
_REASONS = {"stop": "stop", "length": "length", "tool_calls": "stop"}


def encoded(value: Mapping[str, object]) -> bytes:
    """Return an object as JSON in UTF-8; what is no Unicode becomes a question mark."""
    return _ENCODER.encode(value).encode(errors="replace")


def line(value: Mapping[str, object]) -> bytes:
    """Return an object as a line of a stream."""
    return encoded(value) + b"\n"


def json_response(
    value: Mapping[str, object] | bytes, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """Return an object as a whole answer."""
    body = value if isinstance(value, bytes) else encoded(value)
    return Response(body, status, headers, media_type=JSON)


def refused(refusal: Refusal) -> Response:
    """Return a refusal as an answer."""
    headers = {}
    if refusal.retry_after_s is not None:
        headers["retry-after"] = str(max(1, round(refusal.retry_after_s)))
    return json_response({"error": refusal.message}, refusal.status, headers)


def now_text() -> str:
    """Return the time as Go writes it: RFC 3339, UTC, up to nine digits of a second without zeros at the end."""
    seconds, nanoseconds = divmod(time.time_ns(), 10**9)
    fraction = f".{nanoseconds:09d}".rstrip("0").rstrip(".")
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}{fraction}Z"


def head(model: str) -> dict[str, object]:
    """Return what every object begins with; *model* is the name as it was asked for."""
    return {"model": model, "created_at": now_text()}


def ending(done: Done) -> dict[str, object]:
    """Return what the last object has: why the answer ended, and what it took."""
    counts = {
        "total_duration": done.total_ns,
        "load_duration": done.load_ns,
        "prompt_eval_count": done.prompt_tokens,
        "prompt_eval_duration": done.prompt_ns,
        "eval_count": done.generated_tokens,
        "eval_duration": done.generate_ns,
    }
    return {
        "done_reason": _REASONS[done.finish_reason],
        **{name: count for name, count in counts.items() if count},
        EXTRA_KEY: done_extra(done),
    }


def logprobs_shown(tokens: tuple[TokenLogprob, ...]) -> list[dict[str, object]]:
    """Return log probabilities as Ollama shows them."""
    shown = []
    for token in tokens:
        one = _token(token)
        if token.top:
            one["top_logprobs"] = [_token(other) for other in token.top]
        shown.append(one)
    return shown


def _token(token: TokenLogprob) -> dict[str, object]:
    return {"token": token.token.decode(errors="replace"), "logprob": token.logprob, "bytes": list(token.token)}
