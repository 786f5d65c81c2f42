"""What went wrong, as the user sees it: one type, one layout, five exit codes.

Imports nothing heavy, because every start of `lm` loads it.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import click

from lmd.cli.terminal import Palette, palette_for, printable, text_columns, wrapped

EXIT_FAILURE = 1
EXIT_USAGE = 2
EXIT_UNREACHABLE = 3
EXIT_INTERRUPTED = 130

#: Reasons that say the request itself is wrong, as a mistyped option would be.
_USAGE_REASONS = frozenset({"USAGE", "INVALID_ARGUMENT", "INVALID_MODEL_REF", "MODELFILE_SYNTAX"})

#: The reasons that only the client gives; all others come from the daemon's `ErrorReason`.
UNREACHABLE = "DAEMON_UNREACHABLE"
API_MISMATCH = "API_VERSION_MISMATCH"


@dataclass(frozen=True, slots=True)
class Violation:
    """One thing that is wrong with a request: where, and what."""

    field: str
    description: str


class ClientError(Exception):
    """A failure that ends a command: from the daemon, or on the way to it.

    *reason* is a name of the wire API's `ErrorReason` without its prefix, or one of the client's own.
    *context* holds lines that are printed, indented, below the message.
    """

    def __init__(
        self,
        message: str,
        *,
        reason: str,
        hint: str = "",
        metadata: Mapping[str, str] | None = None,
        violations: Sequence[Violation] = (),
        context: Sequence[str] = (),
    ) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason
        self.hint = hint
        self.metadata: dict[str, str] = dict(metadata or {})
        self.violations = tuple(violations)
        self.context = tuple(context)

    @property
    def exit_code(self) -> int:
        """The exit status of a command that ends with this."""
        if self.reason == UNREACHABLE:
            return EXIT_UNREACHABLE
        return EXIT_USAGE if self.reason in _USAGE_REASONS else EXIT_FAILURE

    def as_json(self) -> dict[str, object]:
        """Return what `--json` prints on stderr."""
        body: dict[str, object] = {
            "reason": self.reason,
            "message": self.message,
            "hint": self.hint,
            "metadata": self.metadata,
        }
        if self.violations:
            body["violations"] = [{"field": v.field, "description": v.description} for v in self.violations]
        return {"error": body}


class Unreachable(ClientError):
    """Raised when no daemon answers, or the one that did is gone."""

    def __init__(self, message: str, *, hint: str = "", context: Sequence[str] = ()) -> None:
        super().__init__(message, reason=UNREACHABLE, hint=hint, context=context)


class BadUsage(ClientError):
    """Raised when arguments contradict each other or do not parse."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message, reason="USAGE", hint=hint)


def render_error(error: ClientError, palette: Palette, *, verbose: bool = False, columns: int | None = None) -> str:
    """Return the lines for people: the message, indented context, and after a blank line the hint.

    Message and hint are broken at blanks to fit into *columns*.
    """
    lines = [wrapped(f"{palette.error('error:')} {printable(error.message)}", columns)]
    context = list(error.context)
    if not context and error.metadata.get("log"):
        context = ["the last lines of its log:", *(f"  {line}" for line in error.metadata["log"].splitlines())]
    if verbose:
        context.append(f"reason: {error.reason}")
        context += [f"{key}: {value}" for key, value in sorted(error.metadata.items()) if key not in ("log", "hint")]
    if context:
        lines += ["", *(f"  {printable(line)}".rstrip() for line in context)]
    if error.hint:
        lines += ["", wrapped(f"{palette.hint('hint:')} {printable(error.hint)}", columns)]
    return "\n".join(lines)


def show_error(error: ClientError, *, verbose: bool = False) -> None:
    """Print an error on stderr, for people."""
    palette, columns = palette_for(sys.stderr), text_columns(sys.stderr)
    click.echo(render_error(error, palette, verbose=verbose, columns=columns), err=True)
