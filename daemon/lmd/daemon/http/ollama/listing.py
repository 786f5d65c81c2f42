"""Answers what Ollama's clients ask first: who is there, which models, and which of them are loaded."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import BaseRoute

from lmd.daemon.catalog import Catalog
from lmd.daemon.http.ollama.manage_replies import managing
from lmd.daemon.http.ollama.replies import JSON, encoded, json_response
from lmd.daemon.http.ollama.shapes import details, moment_text, shown_capabilities, time_text
from lmd.daemon.http.services import Services
from lmd.daemon.ollama_level import API_LEVEL
from lmd.daemon.residency.values import RunnerState, RunnerStatus
from lmd.daemon.summaries import ListedModel, Summary
from lmd.registry.store import TagRecord

#: What "for ever" is in a date: the longest duration that Ollama has, 2^63 ns, from now on.
FOR_EVER = timedelta(microseconds=2**63 // 1000)


def routes(services: Services) -> Sequence[BaseRoute]:
    """Return the routes; GET includes HEAD."""
    listing = Listing(services)
    return [
        managing("/", greet, ["GET"]),
        managing("/api/version", listing.version, ["GET"]),
        managing("/api/status", cloud_status, ["GET"]),
        managing("/api/tags", listing.tags, ["GET"]),
        managing("/api/ps", listing.loaded, ["GET"]),
    ]


async def greet(request: Request) -> Response:
    """Say what clients look for to find out whether there is an Ollama."""
    return PlainTextResponse("Ollama is running")


async def cloud_status(request: Request) -> Response:
    """Say that there is no cloud behind this."""
    return json_response({"cloud": {"disabled": True, "source": "none"}})


class Listing:
    """Lists the models of the store and of memory."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._tags = TagList(services.catalog)

    async def version(self, request: Request) -> Response:
        """Tell which release of Ollama this answers as, and beside it which daemon this is."""
        return json_response({"version": API_LEVEL, "lmd": self._services.version})

    async def tags(self, request: Request) -> Response:
        """List the models of the store, the last modified first."""
        return Response(await self._tags.body(), media_type=JSON)

    async def loaded(self, request: Request) -> Response:
        """List the models in memory, those that stay longest first."""
        now = datetime.now(UTC)
        keep_alive = self._services.config.runtime.keep_alive
        listed = [
            (expiry(status, now, keep_alive), status)
            for status in self._services.residency.list()
            if status.state is not RunnerState.FAILED
        ]
        listed.sort(key=lambda entry: entry[0], reverse=True)
        models = [await self._loaded_model(status, expires_at) for expires_at, status in listed]
        return json_response({"models": models})

    async def _loaded_model(self, status: RunnerStatus, expires_at: datetime) -> dict[str, object]:
        # A model stays resident under a name that is gone, so it is described by its manifest.
        described = await self._services.catalog.describe(TagRecord(status.name, status.digest, 0, 0))
        return {
            "name": status.name,
            "model": status.name,
            "size": status.memory_bytes,
            "digest": status.digest.hex,
            "details": details(described.summary),
            "expires_at": moment_text(expires_at),
            "size_vram": status.vram_bytes,
            "context_length": status.context_length,
        }


def expiry(status: RunnerStatus, now: datetime, keep_alive: timedelta) -> datetime:
    """Return when a model leaves: *now* when it is on its way out; as if it got idle now while it is busy or loads."""
    if status.state is RunnerState.DRAINING:
        return now
    if status.keep_forever or status.pinned:
        return now + FOR_EVER
    return status.expires_at or now + keep_alive


class TagList:
    """The answer to `GET /api/tags`, made anew when a name has changed and else sent again.

    Nothing that it shows changes while the generation of the names stays: a name is a pointer to a manifest, and what
    a manifest is never changes. A damaged model is another matter, since it can be repaired under the same name, so a
    list with one is not kept.
    """

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._generation = -1
        self._body = b""

    async def body(self) -> bytes:
        """Return the answer as it is now."""
        generation = self._catalog.generation
        if generation == self._generation:
            return self._body
        models = await self._catalog.models()
        body = encoded({"models": [tag_entry(listed) for listed in models]})
        if all(listed.summary != Summary() for listed in models):
            self._generation, self._body = generation, body
        return body


def tag_entry(listed: ListedModel) -> dict[str, object]:
    """Return one model of the list."""
    tag, summary = listed.tag, listed.summary
    return {
        "name": tag.name,
        "model": tag.name,
        "modified_at": time_text(tag.modified_at),
        "size": summary.size_bytes,
        "digest": tag.manifest.hex,
        "details": details(summary),
        "capabilities": shown_capabilities(summary.capabilities),
    }
