"""Where the lines of a chat come from, and how several of them make one message."""

from __future__ import annotations

import sys
from typing import Protocol

PROMPT = ">>> "
MORE_PROMPT = "... "

_BLOCK = '"""'
_BLOCK_STARTS = (_BLOCK, f"/set system {_BLOCK}")


class Reader(Protocol):
    """Reads one line at a time."""

    def read(self, prompt: str) -> str:
        """Return the next line.

        Raises:
            EOFError: there are no more.
            KeyboardInterrupt: the user pressed Ctrl-C.
        """

    def remember(self, wanted: bool) -> None:
        """Keep what is typed from now on in the history file, or not."""


class StreamReader:
    """Reads lines from stdin without showing a prompt."""

    def read(self, prompt: str) -> str:
        """Return the next line without its line feed."""
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.removesuffix("\n")

    def remember(self, wanted: bool) -> None:
        """Do nothing: there is no history."""


def read_message(reader: Reader) -> str:
    r"""Return the next message or command; one that begins with three double quotes goes on until the closing ones.

    Raises:
        EOFError: there are no more.
        KeyboardInterrupt: the user pressed Ctrl-C.
    """
    text = reader.read(PROMPT).strip()
    if text.startswith(_BLOCK_STARTS):
        while text.count(_BLOCK) < 2:
            try:
                text += "\n" + reader.read(MORE_PROMPT)
            except EOFError:
                break
    return text if text.startswith("/") else unquote_block(text)


def unquote_block(text: str) -> str:
    """Return what stands between three double quotes, or *text* where there are none around it."""
    stripped = text.strip()
    if not stripped.startswith(_BLOCK):
        return stripped
    inner, _, after = stripped.removeprefix(_BLOCK).partition(_BLOCK)
    return f"{inner} {after}".strip() if after.strip() else inner.strip("\n")
