"""Runs the commands of a guide as they are written.

A block of the language `sh` is run with bash, in one folder for the whole guide. A block of the language `text` right
after it shows what is printed, on both streams; `…` stands for any text within a line, and alone on a line for any
lines. Where that begins with "error:", the command fails.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_BLOCK = re.compile(r"^```(?P<language>\w+)[^\n]*\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)
_TIMEOUT_S = 120.0
#: Programs whose exit status 1 is an answer, not a failure.
_TELLING = ("lm diff ", "diff ")


@dataclass(frozen=True, slots=True)
class Step:
    """Commands of a guide, the *line* of the page they begin at, and what they print; None when it is not shown."""

    commands: str
    line: int
    shown: str | None

    @property
    def fails(self) -> bool:
        """Whether the guide says that they fail."""
        return self.shown is not None and self.shown.startswith("error:")


def steps(page: str) -> list[Step]:
    """Return the steps of a guide, in order."""
    found: list[Step] = []
    end = -1
    for block in _BLOCK.finditer(page):
        if block["language"] == "sh":
            found.append(Step(block["body"], page.count("\n", 0, block.start()) + 2, None))
            end = block.end()
        elif block["language"] == "text" and found and not page[end : block.start()].strip():
            found[-1] = Step(found[-1].commands, found[-1].line, block["body"])
    return found


def run_step(step: Step, folder: Path, env: Mapping[str, str]) -> str:
    """Run a step and return what it printed. Raises: AssertionError when that is not what the guide shows."""
    # `lm` is the installed one.
    path = os.pathsep.join((str(Path(sys.executable).parent), env.get("PATH", os.defpath)))
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", step.commands],
        cwd=folder,
        env={**env, "PATH": path},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=_TIMEOUT_S,
    )
    where = f"line {step.line} of the guide:\n{step.commands}\nprinted, with status {done.returncode}:\n{done.stdout}"
    tells = done.returncode == 1 and step.commands.startswith(_TELLING)
    assert step.fails == (done.returncode != 0 and not tells), where
    if step.shown is not None:
        assert matches(step.shown, done.stdout), f"{where}\nand not:\n{step.shown}"
    return done.stdout


def matches(shown: str, printed: str) -> bool:
    """Tell whether *printed* is what a guide shows; blanks at the ends of lines do not count."""
    lines = [line.rstrip() for line in shown.strip("\n").split("\n")]
    pattern = "".join(
        r"(?:.*\n)*?" if line.strip() == "…" else ".*?".join(map(re.escape, line.split("…"))) + r"[ ]*\n"
        for line in lines
    )
    return re.fullmatch(pattern, printed.strip("\n") + "\n") is not None
