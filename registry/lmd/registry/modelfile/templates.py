"""Which language a template is in."""

from __future__ import annotations

import re

# `{{ .System }}`, `{{- if .System }}`, `{{ $x := … }}`: none of them can begin a Jinja expression.
_GO_TEMPLATE = re.compile(r"\{\{-?\s*(?:\.[A-Za-z]|\$|(?:if|range|with|else if|template|define|block)\s+[.$(\"a-z])")


def is_go_template(text: str) -> bool:
    """Tell whether *text* is a template of the Go language, which Ollama's Modelfiles have and nobody here can read."""
    return _GO_TEMPLATE.search(text) is not None


def find_go(text: str) -> int | None:
    """Where in *text* a Go template shows; None when it is none."""
    found = _GO_TEMPLATE.search(text)
    return None if found is None else found.start()
