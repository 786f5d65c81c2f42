"""The reference of metrics is what the program counts."""

from __future__ import annotations

import re
from pathlib import Path

from tests.support.metric_docs import PAGE, exercised, updated

GUIDE = PAGE.parents[1] / "guides" / "metrics.md"


def names(page: Path) -> set[str]:
    return set(re.findall(r"\b(?:lmd|process)_[a-z_]+[a-z]\b", page.read_text()))


def known() -> set[str]:
    return {sample.name for family in exercised().scrape().collect() for sample in family.samples}


def test_the_tables_are_current() -> None:
    page = PAGE.read_text()
    assert updated(page) == page, "run `python -m tests.support.metric_docs`"


def test_every_metric_has_one_line() -> None:
    page = PAGE.read_text()
    for family in exercised().scrape().collect():
        assert len(re.findall(rf"\n\| `{family.name}(_total|_info)?` \|", page)) == 1, family.name


def test_queries_of_the_guide_name_what_there_is() -> None:
    assert names(GUIDE) <= known()
