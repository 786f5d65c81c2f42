"""Runs the user's editor on a file."""

from __future__ import annotations

import shutil
import signal
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from lmd.cli.errors import ClientError

_FALLBACKS = ("sensible-editor", "editor", "nano", "vim", "vi")


def editor_from(environment: Mapping[str, str]) -> str:
    """Return the command of the user's editor: `$VISUAL`, `$EDITOR`, or the first usual one that is installed.

    Raises:
        ClientError: there is none.
    """
    for variable in ("VISUAL", "EDITOR"):
        if command := environment.get(variable, "").strip():
            return command
    found = next((name for name in _FALLBACKS if shutil.which(name)), None)
    if found is None:
        raise ClientError("no editor found", reason="EDITOR_FAILED", hint="name one in the variable EDITOR")
    return found


def run_editor(command: str, path: Path) -> None:
    """Open *path* with *command*, which may have arguments, and wait until it ends.

    Raises:
        ClientError: it cannot be run, or says by its exit status that it failed.
    """
    with _interrupts_left_to_it():
        # As git and crontab do it: the variable is a piece of shell, "code --wait" and quoted paths included.
        shell = ["/bin/sh", "-c", f'{command} "$@"', command, str(path)]
        done = subprocess.run(shell, check=False)  # noqa: S603 - the user's own command
    if done.returncode:
        how = f"was ended by signal {-done.returncode}" if done.returncode < 0 else f"ended with {done.returncode}"
        raise ClientError(
            f"the editor `{command}` {how}",
            reason="EDITOR_FAILED",
            hint="nothing was changed; VISUAL and EDITOR name the editor",
        )


@contextmanager
def _interrupts_left_to_it() -> Iterator[None]:
    """Ignore Ctrl-C and Ctrl-\\ meanwhile: to an editor they are keys. What it runs gets the default back."""
    numbers = (signal.SIGINT, signal.SIGQUIT)
    before = [signal.signal(number, _ignore) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def _ignore(*_: object) -> None:
    # Not SIG_IGN, which a program that is run inherits.
    pass
