"""Takes in the files that models are made of."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute

from lmd.daemon.http.ollama.failures import Refusal
from lmd.daemon.http.ollama.manage_replies import blob_digest, managing
from lmd.daemon.http.services import Services
from lmd.daemon.uploads import MAX_CHUNK_BYTES
from lmd.registry.errors import DigestMismatch
from lmd.registry.manifest import MAX_BLOB_BYTES


def routes(services: Services) -> Sequence[BaseRoute]:
    """Return the routes."""

    async def has_blob(request: Request) -> Response:
        """Say whether a file is here; then it stays for as long as an uploaded one."""
        here = await services.uploads.keep(blob_digest(request.path_params["digest"]))
        return Response(status_code=200 if here else 404)

    async def upload(request: Request) -> Response:
        """Store a file that hashes to the digest of the path: 201, or 200 when it was here."""
        digest = blob_digest(request.path_params["digest"])
        if await services.uploads.keep(digest):
            return Response(status_code=200)
        async with aclosing(_pieces(request)) as pieces:
            try:
                await services.uploads.store(pieces, size_bytes=_announced(request), expected=digest)
            except DigestMismatch as error:
                expected, actual = error.metadata["expected"], error.metadata["actual"]
                raise Refusal(400, f'digest mismatch, expected "{expected}", got "{actual}"') from error
        return Response(status_code=201)

    return [
        managing("/api/blobs/{digest}", has_blob, ["HEAD"]),
        managing("/api/blobs/{digest}", upload, ["POST"]),
    ]


def _announced(request: Request) -> int | None:
    """Return the size of the body where the client tells it. Raises: Refusal when no file is that large."""
    text = request.headers.get("content-length", "")
    size_bytes = int(text) if text.isdecimal() and len(text) <= 20 else None
    if size_bytes is not None and size_bytes > MAX_BLOB_BYTES:
        raise Refusal(413, f"a file has at most {MAX_BLOB_BYTES} bytes")
    return size_bytes


async def _pieces(request: Request) -> AsyncGenerator[bytes, None]:
    """Yield the body in pieces that are worth a trip to a thread. Raises: ClientDisconnect."""
    collected = bytearray()
    async for data in request.stream():
        collected += data
        while len(collected) >= MAX_CHUNK_BYTES:
            yield bytes(collected[:MAX_CHUNK_BYTES])
            del collected[:MAX_CHUNK_BYTES]
    if collected:
        yield bytes(collected)
