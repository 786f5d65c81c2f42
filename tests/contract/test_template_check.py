"""Templates are compiled when a model is created, by a process that is gone afterwards."""

from __future__ import annotations

import psutil
import pytest

from lmd.daemon import template_check
from lmd.daemon.template_check import check_template
from lmd.registry.errors import InvalidRequest


@pytest.mark.parametrize(
    "template",
    [
        "",
        "no program at all",
        "{{ messages[-1].content }}",
        "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m | tojson }}{% endfor %}",
        "{% generation %}x{% endgeneration %}{{ strftime_now('%Y') }}{{ raise_exception('no') }}",
        # What only shows when it is rendered.
        "{{ nobody.knows.it }}",
    ],
)
async def test_what_compiles_is_accepted(template: str) -> None:
    await check_template(template)
    assert not psutil.Process().children()


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{% for m in messages %}", "line 1: Unexpected end of template"),
        ("one\ntwo {{ }}", "line 2: Expected an expression"),
        ("{{ x | no_such_filter }}", "line 1: No filter named 'no_such_filter'"),
        ("{% include 'x' %}{% endif %}", "line 1: Encountered unknown tag 'endif'"),
        ("{{" + "(" * 5000 + ")" * 5000 + "}}", "nests too deeply"),
    ],
)
async def test_what_does_not_compile_is_refused(template: str, why: str) -> None:
    with pytest.raises(InvalidRequest, match=why) as refused:
        await check_template(template)
    assert refused.value.metadata["field"] == "template"
    assert refused.value.message.startswith("the template does not compile: ")
    assert not psutil.Process().children()


async def test_one_that_takes_for_ever_to_compile_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Jinja computes what is constant while it compiles."""
    monkeypatch.setattr(template_check, "TEMPLATE_TIMEOUT_S", 2.0)
    with pytest.raises(InvalidRequest, match="it takes longer than 2 s"):
        await check_template("{{ 10 ** (10 ** 9) }}")
    assert not psutil.Process().children()


async def test_one_that_takes_all_memory_to_compile_leaves_it_to_those_who_render_it() -> None:
    """Such a computation fails in the process that compiles, and is left for later."""
    await check_template("{{ 'x' * 100000000000 }}")
    assert not psutil.Process().children()
