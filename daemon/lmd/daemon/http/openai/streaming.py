"""How the streams of chats and completions fail."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

from lmd.daemon.http.openai.errors import error_event
from lmd.daemon.http.sse import defect
from lmd.registry.errors import LmdError


async def told_errors(chunks: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    """Yield what *chunks* yields; an error after the first chunk becomes the last event, one before it is raised."""
    begun = False
    async with aclosing(chunks):
        try:
            async for chunk in chunks:
                yield chunk
                begun = True
        except Exception as error:  # the boundary: the status is out, so the stream itself has to tell
            if not begun:
                raise
            yield error_event(error if isinstance(error, LmdError) else defect(error))
