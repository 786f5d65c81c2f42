"""Compiles Jinja templates before models keep them, in the process that renders them: the daemon itself runs none."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import sys

from lmd.daemon.residency.values import TEMPLATE_TIMEOUT_S
from lmd.daemon.runner_spec import runner_environment
from lmd.registry.errors import InvalidRequest
from lmd.registry.modelfile import is_go_template

RENDER_COMMAND = (sys.executable, "-P", "-m", "lmd.runner.render")

# Nothing is rendered here, so the process needs no room for a prompt.
_MAX_BYTES = 1 << 20
_MAX_ANSWER_BYTES = 64 << 10
# Until it has imported what it needs, on a busy machine.
_START_TIMEOUT_S = 30.0
_OK = b"P"


async def check_template(template: str) -> None:
    """Raise InvalidRequest when a Jinja template does not compile. Go's are checked where they are read."""
    if "{" not in template or is_go_template(template):
        return
    if why := await _compile(template):
        raise InvalidRequest(
            f"the template does not compile: {why}",
            field="template",
            hint="correct TEMPLATE, or leave it out to use the one of the model",
        )


async def _compile(template: str) -> str:
    """Return why a template does not compile; "" when it does."""
    ours, theirs = socket.socketpair()
    with theirs:
        process = await asyncio.create_subprocess_exec(
            *RENDER_COMMAND,
            "--fd",
            str(theirs.fileno()),
            pass_fds=(theirs.fileno(),),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
            env=runner_environment(os.environ),
            start_new_session=True,
        )
    reader, writer = await asyncio.open_unix_connection(sock=ours)
    try:
        async with asyncio.timeout(_START_TIMEOUT_S):
            await _read_frame(reader)
        setup = {"template": template, "bos_token": "", "eos_token": "", "max_bytes": _MAX_BYTES}
        data = json.dumps(setup).encode()
        async with asyncio.timeout(TEMPLATE_TIMEOUT_S):
            writer.write(len(data).to_bytes(4, "big") + data)
            await writer.drain()
            answer = await _read_frame(reader)
    except TimeoutError:
        return f"it takes longer than {TEMPLATE_TIMEOUT_S:g} s"
    except (asyncio.IncompleteReadError, ConnectionError):
        return "its process died; it may have used too much memory"
    finally:
        writer.close()
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
    return "" if answer[:1] == _OK else answer[1:].decode(errors="replace")


async def _read_frame(reader: asyncio.StreamReader) -> bytes:
    size = int.from_bytes(await reader.readexactly(4), "big")
    if size > _MAX_ANSWER_BYTES:
        raise ConnectionError("the answer is too long")
    return await reader.readexactly(size)
