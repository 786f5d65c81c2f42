"""Pulls models, and tells how far it is in Ollama's words."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute

from lmd.daemon.http.bodies import read_model
from lmd.daemon.http.ollama.failures import Refusal, told
from lmd.daemon.http.ollama.manage_replies import (
    Step,
    as_it_is,
    managing,
    model_ref,
    progress_reply,
)
from lmd.daemon.http.ollama.manage_requests import PullBody
from lmd.daemon.http.services import Services
from lmd.daemon.pulls import Pulls
from lmd.registry.digest import Digest
from lmd.registry.errors import InvalidRef, LmdError, ModelNotFound, SourceError, SourceNotFound
from lmd.registry.pull import PullEvent, PullState
from lmd.registry.ref import ModelRef

VERIFYING: Step = {"status": "verifying sha256 digest"}
WRITING: Step = {"status": "writing manifest"}
SUCCESS: Step = {"status": "success"}

_ARRIVED = frozenset({PullState.COMMITTING, PullState.DONE, PullState.PRESENT})


def routes(services: Services) -> Sequence[BaseRoute]:
    """Return the route."""

    async def pull(request: Request) -> Response:
        body = await read_model(request, PullBody)
        try:
            ref = model_ref(body.wanted)
        except InvalidRef as error:
            raise as_it_is(error) from error
        steps = pull_steps(services.pulls, ref, body.wanted)
        return await progress_reply(steps, stream=body.streams, translate=pull_refusal)

    return [managing("/api/pull", pull, ["POST"])]


async def pull_steps(pulls: Pulls, ref: ModelRef, text: str) -> AsyncGenerator[Step, None]:
    """Pull a model; closing the iterator is leaving the pull, which stops when nobody else waits for it.

    Raises: what a pull raises.
    """
    async with pulls.attach(ref, text=text) as watcher:
        yield {"status": "pulling manifest"}
        progress = PullProgress()
        async for event in watcher:
            for step in progress.steps(event):
                yield step
        watcher.result()
    for step in progress.last_steps():
        yield step


class PullProgress:
    """Puts the events of a pull into Ollama's words."""

    def __init__(self) -> None:
        self._states: dict[str, PullState] = {}
        self._verifying = False

    def steps(self, event: PullEvent) -> list[Step]:
        """Return what to tell after *event*."""
        if event.state is PullState.RESOLVING or not event.filename:
            return []
        before = self._states.get(event.filename)
        self._states[event.filename] = event.state
        if before is PullState.COMMITTING and event.state is PullState.DONE:
            return []  # all of it has come, which was told
        step: dict[str, object] = {"status": f"pulling {_layer(event)}"}
        if event.digest:
            step["digest"] = event.digest
        if event.total_bytes:
            step["total"] = event.total_bytes
        if event.completed_bytes:
            step["completed"] = event.completed_bytes
        if not self._verifying and event.state is PullState.COMMITTING and _ARRIVED.issuperset(self._states.values()):
            self._verifying = True
            return [step, VERIFYING]
        return [step]

    def last_steps(self) -> list[Step]:
        """Return what to tell when the model is there."""
        return [WRITING, SUCCESS] if self._verifying else [VERIFYING, WRITING, SUCCESS]


def pull_refusal(error: LmdError) -> Refusal:
    """Return how a pull that failed is told; clients look for these words when there is no such model."""
    if isinstance(error, ModelNotFound | SourceNotFound):
        return Refusal(500, f"pull model manifest: file does not exist: {told(error)}")
    if isinstance(error, SourceError):
        return Refusal(500, told(error))
    return as_it_is(error)


def _layer(event: PullEvent) -> str:
    return Digest.parse(event.digest).short if event.digest else event.filename
