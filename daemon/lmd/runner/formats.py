"""Compiles formats, and loads what that takes when the first one comes: most runners never need it."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from lmd.runner.format_error import FormatError
from lmd.runner.v1 import frames_pb2
from lmd.runner.vocab import Vocab

if TYPE_CHECKING:
    from lmd.runner.after_thinking import AfterThinking
    from lmd.runner.answer_style import Gate
    from lmd.runner.forced_calls import CallGrammar
    from lmd.runner.structured import Constraint, FormatCompiler


class Formats:
    """The formats of one model. For one thread beside the engine's, since compiling takes a while."""

    def __init__(self, llama: Any, vocab: Vocab) -> None:
        self._llama = llama
        self._vocab = vocab

    def compile(
        self, format_: frames_pb2.Format | CallGrammar, gate: Gate | None = None
    ) -> Constraint | AfterThinking | FormatError:
        """Return what an answer is held to, after *gate* if there is one, or why nothing can be."""
        try:
            return self._compiler.compile(format_, gate)
        except FormatError as error:
            return error

    @functools.cached_property
    def _compiler(self) -> FormatCompiler:
        from lmd.runner.structured import FormatCompiler

        return FormatCompiler(self._llama, self._vocab)
