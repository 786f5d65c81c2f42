"""What Ollama's routes say when a model cannot be run: the statuses and the sentences that clients look for."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import structlog

from lmd.daemon.errors import ContextLengthExceeded, QueueFull, RunnerError, TemplateFailed
from lmd.daemon.http.errors import retry_after, status_of
from lmd.daemon.outcomes import note_failure
from lmd.registry.errors import CapabilityMissing, InvalidRef, LmdError, ModelNotFound

log = structlog.get_logger(__name__)

#: With two spaces, as clients know it.
BUSY = "server busy, please try again.  maximum pending requests exceeded"


class Refusal(Exception):
    """Raised to answer with a status and a sentence of Ollama's own."""

    def __init__(self, status: int, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.retry_after_s = retry_after_s


Translate = Callable[[LmdError], Refusal]


def answer_refusal(model: str) -> Translate:
    """Return how errors of generate and chat are told; *model* is the name as it was asked for."""

    def translate(error: LmdError) -> Refusal:
        if isinstance(error, ModelNotFound):
            return Refusal(404, f"model '{model}' not found")
        if isinstance(error, CapabilityMissing):
            return Refusal(400, _missing(model, error.metadata["capability"]))
        if isinstance(error, TemplateFailed):
            return Refusal(500, told(error))
        return _common(error)

    return translate


def embed_refusal(model: str) -> Translate:
    """Return how errors of the embedding routes are told."""

    def translate(error: LmdError) -> Refusal:
        if isinstance(error, ModelNotFound):
            return Refusal(404, f'model "{model}" not found, try pulling it first')
        if isinstance(error, CapabilityMissing):
            return Refusal(400, f'"{model}" does not support embedding')
        if isinstance(error, ContextLengthExceeded):
            return Refusal(400, "the input length exceeds the context length")
        return _common(error)

    return translate


@contextmanager
def refusing(translate: Translate) -> Iterator[None]:
    """Turn errors of the block into refusals."""
    try:
        yield
    except LmdError as error:
        note_failure(error)
        raise translate(error) from error


def defect(error: Exception) -> Refusal:
    """Log what nobody expected, and return what the client is told: where to look."""
    error_id = secrets.token_hex(6)
    note_failure(error)
    log.error("http_stream_failed", error_id=error_id, exc_info=error)
    return Refusal(500, f"internal error in the daemon; its log has more under error_id {error_id}")


def told(error: LmdError) -> str:
    """Return an error as one line for people: what was wrong, the last words of a runner, and what to do."""
    message = error.message
    if isinstance(error, RunnerError) and (log := error.metadata["log"].strip()):
        message += f": {log.splitlines()[-1].strip()}"
    return f"{message} ({error.hint})" if error.hint else message


def _common(error: LmdError) -> Refusal:
    if isinstance(error, InvalidRef):
        return Refusal(400, "invalid model name")
    after = retry_after(error)
    said = BUSY if isinstance(error, QueueFull) else told(error)
    return Refusal(status_of(error), said, retry_after_s=float(after) if after else None)


def _missing(model: str, capability: str) -> str:
    if capability in ("tools", "insert"):
        return f"{model} does not support {capability}"
    return f'"{model}" does not support {"generate" if capability == "completion" else capability}'
