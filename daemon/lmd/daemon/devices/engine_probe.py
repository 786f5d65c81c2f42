"""Asks the installed engine which accelerators it can use, in a process of its own that ends with the answer."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import os
import re
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import structlog

from lmd.daemon.devices.values import EngineDevice, Probed
from lmd.daemon.runner_spec import runner_environment
from lmd.daemon.tasks import to_the_end

log = structlog.get_logger(__name__)

PROBE_COMMAND = (sys.executable, "-P", "-m", "lmd.runner.probe")

#: A driver that starts for the first time after boot takes seconds, and may compile its kernels.
PROBE_TIMEOUT_S = 60.0

_MAX_BYTES = 1 << 20
_TAIL_CHARACTERS = 300

#: How the engine's libraries name backends that have no devices of their own, or only what others lend.
_NO_ACCELERATOR = frozenset({"base", "blas", "cpu", "rpc", "zdnn", "zendnn"})
#: What we call some of the others.
_WORDS = {"hip": "rocm"}
_LIBRARY = re.compile(r"(?:lib)?ggml-([a-z]+)")


def engine_backends(directories: Sequence[Path] | None = None) -> frozenset[str]:
    """Return the accelerators' backends that the installed engine was built with, such as "cuda".

    Found by the libraries that lie beside it, without loading it. *directories* replace the package's.
    """
    found = set()
    for directory in directories if directories is not None else _package():
        for file in Path(directory, "lib").glob("*ggml-*"):
            match = _LIBRARY.match(file.name)
            if match is not None and match[1] not in _NO_ACCELERATOR:
                found.add(_WORDS.get(match[1], match[1]))
    return frozenset(found)


async def probe_engine(
    command: Sequence[str] = PROBE_COMMAND, *, timeout_s: float = PROBE_TIMEOUT_S, env: Mapping[str, str] | None = None
) -> Probed:
    """Return what the engine offers. Whatever goes wrong is in the answer; cancelling ends the process."""
    try:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=runner_environment(os.environ if env is None else env),
            start_new_session=True,
        )
    except OSError as error:
        return Probed(fault=f"the engine's probe cannot be started: {error.strerror or error}")
    try:
        async with asyncio.timeout(timeout_s):
            out, err = await process.communicate()
    except TimeoutError:
        return Probed(fault=f"the engine's probe did not answer for {timeout_s:g} s; a driver may hang")
    finally:
        await to_the_end(_end(process))
    if process.returncode:
        return Probed(fault=f"the engine's probe died ({_cause(process.returncode)}){_tail(err)}")
    try:
        return read_answer(out)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("probe_nonsense", error=str(error))
        return Probed(fault="the engine's probe talks nonsense")


def read_answer(document: bytes) -> Probed:
    """Return the accelerators of what `lmd.runner.probe` prints.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: it is something else.
    """
    if len(document) > _MAX_BYTES:
        raise ValueError("too long")
    answer: dict[str, Any] = json.loads(document)
    devices = [
        EngineDevice(
            id=_word(fields["id"]),
            backend=_word(fields["backend"]),
            kind=fields["kind"],
            description=_printable(fields["description"]),
            bus_id=_printable(fields["bus_id"]),
            total_bytes=_count(fields["total_bytes"]),
            free_bytes=_count(fields["free_bytes"]),
        )
        for fields in answer["devices"]
        if fields["kind"] in ("gpu", "igpu") and fields["backend"] != "rpc"
    ]
    limits = {_printable(name): _printable(value) for name, value in answer["limits"].items()}
    return Probed(tuple(devices), limits, fault="")


def _package() -> list[Path]:
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or spec.submodule_search_locations is None:
        return []
    return [Path(place) for place in spec.submodule_search_locations]


async def _end(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    await process.wait()


def _cause(status: int) -> str:
    if status < 0:
        return signal.Signals(-status).name if -status in set(signal.Signals) else f"signal {-status}"
    return f"exit status {status}"


def _tail(err: bytes) -> str:
    last = _printable(err.decode(errors="replace").strip()[-_TAIL_CHARACTERS:])
    return f": {last}" if last else ""


def _word(value: str) -> str:
    if not re.fullmatch(r"[a-z0-9]{1,32}", value):
        raise ValueError(f"{value!r} is no name of a device or backend")
    return value


def _count(value: Any) -> int:
    if not isinstance(value, int) or not 0 <= value < 1 << 62:
        raise ValueError(f"{value!r} is no number of bytes")
    return value


def _printable(value: str) -> str:
    return "".join(c if c.isprintable() else " " for c in value)
