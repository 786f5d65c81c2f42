"""The prompt of a chat on a terminal, with history, editing and completion."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document
from prompt_toolkit.formatted_text import FormattedText
from prompt_toolkit.history import FileHistory

from lmd.cli.repl.reader import PROMPT

#: From the text before the cursor to the words that may stand where its last word does.
Complete = Callable[[str], Iterable[str]]


class _PrivateHistory(FileHistory):
    """The history file, which can be paused."""

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self.keeping = True

    def store_string(self, string: str) -> None:
        """Append *string* unless the history is paused."""
        if self.keeping:
            super().store_string(string)


class _SlashCompleter(Completer):
    """Completes commands; messages are left alone."""

    def __init__(self, complete: Complete) -> None:
        self._complete = complete

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterator[Completion]:
        """Yield the words that fit."""
        before = document.text_before_cursor
        if before.startswith("/"):
            typed = before.rsplit(" ", 1)[-1]
            for word in self._complete(before):
                yield Completion(word, start_position=-len(typed))


class PromptReader:
    """Reads lines from the terminal. The history file is readable by its owner only: prompts are private."""

    def __init__(self, history: Path, complete: Complete, placeholder: Callable[[], str]) -> None:
        history.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(history, os.O_CREAT | os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC, 0o600)
        os.close(descriptor)
        self._history = _PrivateHistory(history)
        self._placeholder = placeholder
        self._session: PromptSession[str] = PromptSession(
            history=self._history,
            completer=_SlashCompleter(complete),
            complete_while_typing=False,
            enable_history_search=True,
            enable_open_in_editor=True,
        )

    def read(self, prompt: str) -> str:
        """Show *prompt* and return what is typed."""
        text = self._placeholder() if prompt == PROMPT else ""
        return self._session.prompt(prompt, placeholder=FormattedText([("fg:ansibrightblack", text)]))

    def remember(self, wanted: bool) -> None:
        """Write to the history file from now on, or stop doing so."""
        self._history.keeping = wanted
