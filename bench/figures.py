"""Promises that were measured, and a table of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure: *ours*, what lies beside it, what is compared, and the bar it has to keep.

    Attributes:
        theirs: None where nothing lies beside it.
        kind: ">=" or "<="; "" for a figure without a bar, which is only told.
        others_cores: what everything else on the machine used meanwhile, in cores.
    """

    case: str
    title: str
    unit: str
    ours: float
    theirs: float | None
    value: float
    kind: str
    limit: float
    others_cores: float

    @property
    def met(self) -> bool:
        if not self.kind:
            return True
        return self.value >= self.limit if self.kind == ">=" else self.value <= self.limit

    def row(self) -> str:
        ours = f"{self.ours:.4g} {self.unit}".rstrip()
        theirs = "" if self.theirs is None else f"{self.theirs:.4g} {self.unit}".rstrip()
        bar = f"{self.kind} {self.limit:g}" if self.kind else ""
        met = "" if not self.kind else "yes" if self.met else "**no**"
        return f"| {self.title} | {ours} | {theirs} | {self.value:.3g} | {bar} | {met} |"


def table(figures: Sequence[Figure]) -> str:
    """Return the figures in Markdown."""
    lines = ["| case | ours | beside | compared | bar | met |", "|---|---|---|---|---|---|"]
    return "\n".join([*lines, *(figure.row() for figure in figures)])
