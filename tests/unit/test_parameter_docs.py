"""The reference of parameters is the table that the program checks against."""

from __future__ import annotations

from lmd.daemon.parameters import MAX_LOGIT_BIAS, MAX_LOGIT_BIASES, MAX_STOP_TOKENS
from lmd.registry.parameters import PARAMETERS
from tests.support.parameter_docs import PAGE, updated


def test_the_tables_are_current() -> None:
    page = PAGE.read_text()
    assert updated(page) == page, "run `python -m tests.support.parameter_docs`"


def test_every_parameter_has_one_line() -> None:
    page = PAGE.read_text()
    for name in PARAMETERS:
        assert page.count(f"\n| `{name}` |") == 1, name


def test_the_limits_of_a_request_are_the_programs() -> None:
    page = PAGE.read_text()
    assert f"up to {MAX_LOGIT_BIASES} tokens, each from -{MAX_LOGIT_BIAS} to {MAX_LOGIT_BIAS} or" in page
    assert f"up to {MAX_STOP_TOKENS} tokens" in page
