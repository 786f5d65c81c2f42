"""Data on stdout: tables that line up, and JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

import click

from lmd.cli.terminal import cell_width, is_terminal, one_line, palette_for, terminal_size

_GAP = "  "
_SHORTEST_NAME = 16


def print_json(value: object) -> None:
    """Print one JSON document, indented for a terminal and compact for a pipe."""
    indent = 2 if is_terminal(sys.stdout) else None
    click.echo(json.dumps(value, ensure_ascii=False, indent=indent))


def print_table(headers: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[str] = ()) -> None:
    """Print *rows* in columns under *headers*; the columns named in *right* align to the right.

    On a terminal that is too narrow the first column is shortened in its middle; a pipe gets everything.
    """
    cells = [[one_line(cell) for cell in row] for row in rows]
    if is_terminal(sys.stdout):
        _fit(headers, cells, terminal_size().columns)
    widths = [max(cell_width(line[i]) for line in [list(headers), *cells]) for i in range(len(headers))]
    to_right = [header in right for header in headers]
    palette = palette_for(sys.stdout)
    click.echo(palette.faint(_join(headers, widths, to_right)))
    for line in cells:
        click.echo(_join(line, widths, to_right))


def _join(line: Sequence[str], widths: Sequence[int], to_right: Sequence[bool]) -> str:
    padded = []
    for cell, width, right in zip(line, widths, to_right, strict=True):
        gap = " " * (width - cell_width(cell))
        padded.append(gap + cell if right else cell + gap)
    return _GAP.join(padded).rstrip()


def _fit(headers: Sequence[str], cells: list[list[str]], columns: int) -> None:
    others = sum(
        max(cell_width(text) for text in (headers[i], *(line[i] for line in cells))) + len(_GAP)
        for i in range(1, len(headers))
    )
    room = max(columns - others, _SHORTEST_NAME)
    for line in cells:
        line[0] = shorten(line[0], room)


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
