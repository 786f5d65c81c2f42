"""Which language a template is in, and whether it compiles, where that can be told without running it."""

from __future__ import annotations

from lmd.gotemplate.errors import TemplateSyntax
from lmd.gotemplate.parser import parse
from lmd.gotemplate.survey import is_go_template

__all__ = ["is_go_template", "why_not"]


def why_not(text: str) -> TemplateSyntax | None:
    """Return why a Go template does not compile; None when it does, or is Jinja, which only a runner compiles."""
    if not is_go_template(text):
        return None
    try:
        parse(text)
    except TemplateSyntax as error:
        return error
    return None
