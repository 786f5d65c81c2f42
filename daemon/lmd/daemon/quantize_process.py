"""The child process that quantizes or measures a model, seen from the daemon."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import sys
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import structlog

from lmd.daemon.errors import QuantizeFailed
from lmd.daemon.runner_spec import make_view, runner_environment, view_names
from lmd.daemon.tasks import to_the_end

log = structlog.get_logger(__name__)

QUANTIZE_COMMAND = (sys.executable, "-P", "-m", "lmd.runner.quantize")

_TAIL_BYTES = 1024
_OUTPUT, _IMATRIX = "out.gguf", "imatrix.gguf"


@dataclass(frozen=True, slots=True)
class QuantizeJob:
    """What a child is to do, for messages the name of the model, and the files it sees.

    *what* is the rest of the job in the words of `lmd.runner.quantize`.
    """

    name: str
    weights: tuple[Path, ...]
    what: Mapping[str, Any] = field(default_factory=dict)
    output: Path | None = None
    imatrix: Path | None = None
    command: Sequence[str] = QUANTIZE_COMMAND


async def run_job(job: QuantizeJob, views_dir: Path) -> AsyncGenerator[dict[str, Any]]:
    """Run the job in a child of its own; yields its events, `done` last. Closing the iterator kills the child.

    Raises:
        BlobMissing: a file of the model is gone.
        QuantizeFailed: the engine refuses, or the child died.
    """
    view = make_view(views_dir, job.weights)
    try:
        for name, path in ((_OUTPUT, job.output), (_IMATRIX, job.imatrix)):
            if path is not None:
                (view / name).symlink_to(path)
        process = await asyncio.create_subprocess_exec(
            *job.command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            # Read at the end only: the child drops what the pipe does not take.
            stderr=asyncio.subprocess.PIPE,
            cwd=view,
            env=runner_environment(os.environ),
            start_new_session=True,
        )
        log.info("quantize_spawned", model=job.name, pid=process.pid, what=job.what["do"])
        finished = False
        try:
            request = {
                **job.what,
                "inputs": view_names(len(job.weights)),
                "output": _OUTPUT,
                "imatrix": _IMATRIX if job.imatrix is not None else "",
            }
            async for event in _events(process, request):
                if event["event"] == "failed":
                    raise QuantizeFailed(job.name, str(event["message"]), log=await _tail(process))
                finished = event["event"] == "done"
                yield event
                if finished:
                    return
            status = await process.wait()
            raise QuantizeFailed(job.name, f"its process died ({_cause(status)})", log=await _tail(process))
        finally:
            await to_the_end(_end(process))
            log.info("quantize_exited", model=job.name, pid=process.pid, finished=finished)
    finally:
        shutil.rmtree(view, ignore_errors=True)


async def _events(process: asyncio.subprocess.Process, request: Mapping[str, Any]) -> AsyncGenerator[dict[str, Any]]:
    assert process.stdin is not None, "the child has no standard input"
    assert process.stdout is not None, "the child has no standard output"
    process.stdin.write(json.dumps(request).encode() + b"\n")
    with contextlib.suppress(ConnectionError):  # it died at once; its exit says why
        await process.stdin.drain()
    while line := await process.stdout.readline():
        if line.endswith(b"\n"):
            event: dict[str, Any] = json.loads(line)
            yield event


async def _end(process: asyncio.subprocess.Process) -> None:
    """Kill the child and what it started, and reap it."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    await process.wait()


async def _tail(process: asyncio.subprocess.Process) -> str:
    """Return the end of what a child that is done wrote to its standard error."""
    await _end(process)
    assert process.stderr is not None, "the child has no standard error"
    text = (await process.stderr.read())[-_TAIL_BYTES:].decode(errors="replace")
    return "".join(c if c.isprintable() or c == "\n" else " " for c in text).strip()


def _cause(status: int) -> str:
    if status == -signal.SIGKILL:
        return "SIGKILL, most likely by the kernel because memory ran out"
    if status < 0:
        return signal.Signals(-status).name if -status in set(signal.Signals) else f"signal {-status}"
    return f"exit status {status}"
