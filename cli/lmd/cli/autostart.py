"""Starting the user's own daemon when none answers.

Two `lm` that start at once agree through a lock file beside the socket: one starts the daemon, the other waits and
finds it running. A daemon that someone else starts meanwhile is as good as ours, whatever becomes of ours.
"""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from lmd.cli.endpoints import Answer, Place, find_daemon, probe
from lmd.cli.errors import Unreachable
from lmd.cli.places import log_file
from lmd.cli.terminal import palette_for, printable

DAEMON_COMMAND = (sys.executable, "-P", "-m", "lmd.daemon.main")

#: How long a daemon may take to answer: it checks its store first, which a slow disk draws out.
READY_TIMEOUT_S = 60.0
#: How long to look for another's daemon after ours found the place taken.
_OTHER_TIMEOUT_S = 1.0
_FIRST_PAUSE_S = 0.01
_LONGEST_PAUSE_S = 0.25
_LOG_TAIL_LINES = 12
_LOG_TAIL_BYTES = 16 * 1024


def start_daemon(
    place: Place,
    env: Mapping[str, str],
    *,
    command: Sequence[str] = DAEMON_COMMAND,
    ready_timeout_s: float = READY_TIMEOUT_S,
) -> Path:
    """Start the user's daemon, unless another `lm` just did, and return its socket once it listens.

    Raises:
        Unreachable: it does not start; the error shows the last lines of its log.
    """
    deadline = time.monotonic() + ready_timeout_s
    _make_private_dir(place.own.parent)
    with _starting(place.own.parent / "start.lock", deadline):
        running = find_daemon(place)
        if running is not None:
            return running
        log = log_file(env)
        log.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        log_start = log.stat().st_size if log.exists() else 0
        child = _spawn(command, env, log)
        _wait_until_listening(place, child, log, log_start, deadline)
        child.returncode = 0  # it outlives us, and nobody waits for it; without this, Popen complains
    palette = palette_for(sys.stderr)
    print(palette.faint(f"started lmd (pid {child.pid}), log in {log}"), file=sys.stderr)  # noqa: T201
    return place.own


def _make_private_dir(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        owner = directory.stat().st_uid
    except OSError as error:
        raise Unreachable(
            f"cannot create {directory} for the daemon's socket: {error.strerror}",
            hint="set `LMD_HOME` to a directory that you can write to",
        ) from error
    if owner != os.getuid():
        raise Unreachable(
            f"{directory} belongs to another user, so no daemon is started there",
            hint="set `LMD_HOME` to a directory of your own",
        )


@contextmanager
def _starting(lock_path: Path, deadline: float) -> Iterator[None]:
    """Hold the lock of whoever starts the daemon; the kernel releases it when its holder dies."""
    descriptor = os.open(lock_path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        for pause_s in _pauses():
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise Unreachable("another `lm` has been starting the daemon for too long") from None
                time.sleep(pause_s)
        yield
    finally:
        os.close(descriptor)


def _spawn(command: Sequence[str], env: Mapping[str, str], log: Path) -> subprocess.Popen[bytes]:
    descriptor = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        return subprocess.Popen(  # noqa: S603 - our own interpreter and module
            command,
            stdin=subprocess.DEVNULL,
            stdout=descriptor,
            stderr=descriptor,
            env=_without_relative_paths(env),
            cwd="/",  # the daemon must not keep the caller's directory busy
            start_new_session=True,
        )
    finally:
        os.close(descriptor)


def _without_relative_paths(env: Mapping[str, str]) -> dict[str, str]:
    """Return *env* with the paths it may hold made absolute, as the daemon has another working directory."""
    absolute = dict(env)
    for name in ("LMD_HOME", "LMD_SOCKET", "PYTHONPATH"):
        if env.get(name):
            absolute[name] = os.pathsep.join(os.path.abspath(part) for part in env[name].split(os.pathsep))
    return absolute


def _wait_until_listening(
    place: Place, child: subprocess.Popen[bytes], log: Path, log_start: int, deadline: float
) -> None:
    """Wait for the socket. It accepts connections only once the daemon serves, or holds them until it does."""
    ended = False
    for pause_s in _pauses():
        if probe(place.own, trust_directory=place.own != place.implicit) is Answer.LISTENS:
            return
        if not ended and child.poll() is not None:
            # The place may be taken by a daemon that is itself about to listen.
            ended = True
            deadline = min(deadline, time.monotonic() + (_OTHER_TIMEOUT_S if child.returncode != 0 else 0))
        if time.monotonic() > deadline:
            break
        time.sleep(pause_s)
    if ended:
        how = f"exit status {child.returncode}" if child.returncode >= 0 else f"signal {-child.returncode}"
        message = f"the daemon ended at once ({how})"
    else:
        message = f"the daemon (pid {child.pid}) did not answer in time"
    tail = _tail(log, log_start)
    raise Unreachable(
        message,
        context=[f"the last lines of {log}:", *(f"  {line}" for line in tail)] if tail else [],
        hint="`lm serve` runs it in the foreground, where you can watch it",
    )


def _tail(log: Path, start: int) -> list[str]:
    """Return the last lines that were written to *log* since it had *start* bytes."""
    with log.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(start, end - _LOG_TAIL_BYTES))
        text = file.read().decode(errors="replace")
    return [printable(_in_words(line)) for line in text.splitlines()[-_LOG_TAIL_LINES:]]


def _in_words(line: str) -> str:
    """Return a structured log line as people read it, and any other line as it is."""
    try:
        entry = json.loads(line)
    except ValueError:
        return line
    if not isinstance(entry, dict) or "event" not in entry:
        return line
    exception = str(entry.pop("exception", "")).strip().rpartition("\n")[2]
    entry.pop("timestamp", None)
    level, event = entry.pop("level", "info"), entry.pop("event")
    rest = "".join(f" {key}={value}" for key, value in entry.items())
    return f"{level}: {event}{rest}{f': {exception}' if exception else ''}"


def _pauses() -> Iterator[float]:
    pause_s = _FIRST_PAUSE_S
    while True:
        yield pause_s
        pause_s = min(pause_s * 1.5, _LONGEST_PAUSE_S)
