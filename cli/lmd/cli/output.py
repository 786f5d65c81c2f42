"""Data on stdout: tables that line up, and JSON."""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Sequence

import click

from lmd.cli.terminal import cell_width, is_terminal, one_line, palette_for, terminal_size

_GAP = "  "
#: A column that goes on in further lines is not made narrower than this.
_WRAPPED_CELLS = 24


def print_json(value: object) -> None:
    """Print one JSON document, indented for a terminal and compact for a pipe."""
    indent = 2 if is_terminal(sys.stdout) else None
    click.echo(json.dumps(value, ensure_ascii=False, indent=indent))


def print_table(
    headers: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    right: Sequence[str] = (),
    optional: Sequence[str] = (),
    wrapped: str = "",
) -> None:
    """Print *rows* in columns under *headers*; the columns named in *right* align to the right.

    On a terminal that is too narrow, columns of *optional* are left out, the first named first, and the last column
    goes on in further lines if it is *wrapped*; cells are never cut, as people copy names from them. A pipe gets
    everything, a line for each row.
    """
    columns = terminal_size().columns if is_terminal(sys.stdout) else None
    palette = palette_for(sys.stdout)
    lines = table_lines(headers, rows, right=right, optional=optional, wrapped=wrapped, columns=columns)
    for number, line in enumerate(lines):
        click.echo(palette.faint(line) if number == 0 else line)


def table_lines(
    headers: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    right: Sequence[str] = (),
    optional: Sequence[str] = (),
    wrapped: str = "",
    columns: int | None = None,
) -> list[str]:
    """Return the lines of a table that is made to fit into *columns* as `print_table` says."""
    table = [list(headers), *([one_line(cell) for cell in row] for row in rows)]
    widths = [max(cell_width(line[i]) for line in table) for i in range(len(headers))]
    shown = list(range(len(headers)))
    wraps = columns is not None and headers[-1] == wrapped
    least = [*widths[:-1], min(widths[-1], _WRAPPED_CELLS)] if wraps else widths
    for header in optional:
        if columns is not None and sum(least[i] + len(_GAP) for i in shown) - len(_GAP) > columns:
            shown.remove(headers.index(header))
    if columns is not None and wraps:
        left = columns - sum(widths[i] + len(_GAP) for i in shown[:-1])
        table = [line for row in table for line in _wrap_last(row, max(left, _WRAPPED_CELLS))]
    lines = []
    for line in table:
        padded = []
        for i in shown:
            gap = " " * (widths[i] - cell_width(line[i]))
            padded.append(gap + line[i] if headers[i] in right else line[i] + gap)
        lines.append(_GAP.join(padded).rstrip())
    return lines


def _wrap_last(row: Sequence[str], columns: int) -> list[list[str]]:
    """Return *row* with the text of its last cell in as many rows as it takes."""
    first, *more = textwrap.wrap(row[-1], columns, break_long_words=False, break_on_hyphens=False) or [""]
    blank = [""] * (len(row) - 1)
    return [[*row[:-1], first], *([*blank, text] for text in more)]


def shorten(text: str, width: int) -> str:
    """Return *text* with its middle left out where it is wider than *width* cells."""
    if cell_width(text) <= width:
        return text
    head = (width - 1) * 2 // 3
    return f"{text[:head]}…{text[len(text) - (width - 1 - head) :]}"


def print_facts(sections: Sequence[tuple[str, Sequence[tuple[str, str]]]]) -> None:
    """Print sections of labelled facts, leaving out facts without a value and sections without facts.

    A fact without a label is text of its own; it stands below the heading.
    """
    palette = palette_for(sys.stdout)
    filled = [(title, [(label, value) for label, value in facts if value]) for title, facts in sections]
    filled = [(title, facts) for title, facts in filled if facts]
    width = max((cell_width(label) for _, facts in filled for label, _ in facts), default=0)
    for number, (title, facts) in enumerate(filled):
        if number:
            click.echo()
        if title:
            click.echo(palette.strong(title))
        indent = "  " if title else ""
        for label, value in facts:
            if label:
                click.echo(f"{indent}{palette.faint(label.ljust(width))}  {value}")
            else:
                for line in value.splitlines():
                    click.echo(f"{indent}{line}".rstrip())
