"""How much text a grammar demands without a choice.

llguidance works through such text as a whole before the first character of it is generated: `"a"` doubled by forty
rules would keep it busy for ever.
"""

from __future__ import annotations

from collections.abc import Mapping

from lmd.runner.format_error import FormatError
from lmd.runner.gbnf import Chars, Choice, Name, Node, Repeat, children_first

_MAX_FORCED_CHARACTERS = 32 * 1024


def check_forced(rules: Mapping[str, Node]) -> None:
    """Check the rules that `parse_gbnf` returned.

    Raises:
        FormatError: a stretch without a choice is too long.
    """
    lengths: dict[str, int | None] = {}
    for name in children_first(rules):
        lengths[name] = _length(rules[name], lengths)


def _length(node: Node, lengths: Mapping[str, int | None]) -> int | None:
    """Return the length of the only text that a node matches; None when there are several.

    What forced stretches on both sides of a node's border add up to is left out: it is twice the limit at most.
    """
    if isinstance(node, Chars):
        first, last = node.ranges[0]
        return 1 if len(node.ranges) == 1 and first == last else None
    if isinstance(node, Name):
        return lengths.get(node.name)
    if isinstance(node, Repeat):
        once = _length(node.node, lengths)
        times = _check(None if once is None else once * node.least)
        return times if node.least == node.most else None
    if isinstance(node, Choice):
        for option in node.options:
            _length(option, lengths)
        return None
    total: int | None = 0
    stretch = 0
    for part in node.parts:
        length = _length(part, lengths)
        stretch = 0 if length is None else stretch + length
        _check(stretch)
        total = None if length is None or total is None else total + length
    return total


def _check(length: int | None) -> int | None:
    if length is not None and length > _MAX_FORCED_CHARACTERS:
        raise FormatError(
            f"the grammar demands more than {_MAX_FORCED_CHARACTERS:,} characters without a choice; "
            "leave them out and add them to the answer afterwards"
        )
    return length
