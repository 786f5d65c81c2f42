"""Markdown on a terminal while it is still being written.

The text is taken apart into top-level blocks. A block that another one follows is final and scrolls away; only the
last one, which may still change, is redrawn. The final picture does not depend on how the text was cut into pieces.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from itertools import pairwise
from typing import ClassVar, TextIO

from markdown_it import MarkdownIt
from rich.console import Console, ConsoleOptions, RenderResult
from rich.markdown import CodeBlock, Heading, ListItem, Markdown, MarkdownElement
from rich.padding import Padding
from rich.segment import Segment
from rich.syntax import Syntax
from rich.theme import Theme

from lmd.cli.live import LiveRegion
from lmd.cli.terminal import printable, terminal_size, use_colour, without_colour

#: Lines longer than this are hard to read.
_WIDEST = 100
_REDRAW_S = 0.06

_THEME = Theme(
    {
        "markdown.code": "cyan",
        "markdown.h1": "bold underline",
        "markdown.h2": "bold",
        "markdown.h3": "bold",
        "markdown.h4": "italic",
        "markdown.item.bullet": "cyan",
        "markdown.item.number": "cyan",
        "markdown.block_quote": "dim",
        "markdown.hr": "dim",
        "markdown.table.border": "dim",
        "markdown.table.header": "bold",
    }
)


class _QuietHeading(Heading):
    """A heading at the left margin."""

    LEVEL_ALIGN: ClassVar = dict.fromkeys(Heading.LEVEL_ALIGN, "left")


class _QuietCode(CodeBlock):
    """Code in the terminal's own colours, indented, without a box of background around it."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        code = str(self.text).rstrip()
        syntax = Syntax(code, self.lexer_name, theme="ansi_dark", background_color="default", word_wrap=True)
        yield Padding(syntax, (0, 0, 0, 2))


class _DottedItem(ListItem):
    """A list item whose number ends with a dot, as it was written."""

    def render_number(self, console: Console, options: ConsoleOptions, number: int, last_number: int) -> RenderResult:
        """Yield the number before the first line, and as much space before the others."""
        width = len(str(last_number)) + 3
        lines = console.render_lines(self.elements, options.update(width=options.max_width - width), style=self.style)
        style = console.get_style("markdown.item.number", default="none")
        for row, line in enumerate(lines):
            yield Segment(f"{number}. ".rjust(width) if row == 0 else " " * width, style)
            yield from line
            yield Segment.line()


class _QuietMarkdown(Markdown):
    """Markdown without decoration that outweighs the text. Line breaks stay where the model put them."""

    elements: ClassVar[dict[str, type[MarkdownElement]]] = {
        **Markdown.elements,
        "heading_open": _QuietHeading,
        "fence": _QuietCode,
        "code_block": _QuietCode,
        "list_item_open": _DottedItem,
    }

    def __init__(self, markup: str) -> None:
        super().__init__(markup, hyperlinks=False)
        self.parsed = _parser().parse(markup)
        for token in self.parsed:
            for child in token.children or ():
                if child.type == "softbreak":
                    child.type = "hardbreak"


def _parser() -> MarkdownIt:
    # Tags are shown as text: models write them as such, `<think>` for one, and nothing may get lost.
    return MarkdownIt("commonmark", {"html": False}).enable(["strikethrough", "table"])


def _block_starts(text: str) -> list[int]:
    """Return the first line of each top-level block."""
    return [token.map[0] for token in _parser().parse(text) if token.level == 0 and token.map and token.nesting >= 0]


def split_blocks(text: str) -> list[str]:
    """Return the source of the top-level blocks of *text*, in order, without blank lines behind them."""
    lines = text.split("\n")
    bounds = [*_block_starts(text), len(lines)]
    return ["\n".join(lines[start:end]).rstrip() for start, end in pairwise(bounds)]


def render_block(block: str, columns: int, *, colour: bool) -> str:
    """Return the lines of one block for a terminal that is *columns* wide, each ended by a line feed."""
    console = Console(
        file=io.StringIO(),
        force_terminal=True,
        color_system="standard" if colour else None,
        no_color=not colour,
        width=max(min(columns - 1, _WIDEST), 10),
        theme=_THEME,
        highlight=False,
        emoji=False,
    )
    with console.capture() as capture:
        console.print(_QuietMarkdown(block))
    lines = [line.rstrip() for line in capture.get().split("\n")]
    while lines and not without_colour(lines[-1]).strip():
        lines.pop()
    while lines and not without_colour(lines[0]).strip():
        lines.pop(0)
    return "".join(f"{line}\n" for line in lines)


class MarkdownBody:
    """Writes an answer to a terminal as Markdown."""

    def __init__(self, stream: TextIO, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._region = LiveRegion(stream)
        self._colour = use_colour(stream)
        self._pending = ""
        self._written = False
        self._next_draw = 0.0

    def feed(self, piece: str) -> None:
        """Take the next piece of text."""
        self._pending += printable(piece)
        self.refresh()

    def refresh(self) -> None:
        """Redraw if enough time has passed; a slow terminal or a long block is redrawn less often."""
        started = self._clock()
        if started < self._next_draw or not self._pending:
            return
        final, tail = self._split()
        columns = terminal_size().columns
        above = "".join(self._render(block, columns) for block in final)
        lines = self._render(tail, columns, last=True).splitlines() if tail.strip() else []
        self._region.draw(lines, above=above)
        self._next_draw = self._clock() + max(_REDRAW_S, 4 * (self._clock() - started))

    def close(self) -> None:
        """Write what is left, for good."""
        columns = terminal_size().columns
        blocks = split_blocks(self._pending)
        self._pending = ""
        self._region.clear(above="".join(self._render(block, columns) for block in blocks))

    def _split(self) -> tuple[list[str], str]:
        """Return the blocks that are final, and the text that is not. Only whole lines decide where a block ends."""
        whole, line_feed, _ = self._pending.rpartition("\n")
        starts = _block_starts(whole + line_feed)
        if len(starts) < 2:
            return [], self._pending
        lines = self._pending.split("\n")
        self._pending = "\n".join(lines[starts[-1] :])
        return split_blocks("\n".join(lines[: starts[-1]])), self._pending

    def _render(self, block: str, columns: int, *, last: bool = False) -> str:
        gap = "\n" if self._written else ""
        if not last:
            self._written = True
        return gap + render_block(block, columns, colour=self._colour)
