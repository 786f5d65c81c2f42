"""Modelfiles in the manner of well-known families make the prompts that Go's own templates make, in both languages."""

from __future__ import annotations

import pytest

from lmd.gotemplate.survey import is_go_template
from lmd.registry.modelfile import format_modelfile, parse_modelfile
from lmd.runner.go_chat import GoRenderer
from lmd.runner.render import Renderer
from tests.support.library_models import CASES, CHATS, FAMILIES, LANGUAGES, modelfile, prompt


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize(("family", "chat"), CASES)
def test_prompts_are_right_to_the_byte(family: str, chat: str, language: str) -> None:
    template = parse_modelfile(modelfile(family, language)).template
    assert template is not None
    assert is_go_template(template) == (language == "go")
    renderer = (
        GoRenderer(template, max_bytes=100_000)
        if language == "go"
        else Renderer(template, bos_token="", eos_token="", max_bytes=100_000)
    )
    assert renderer.render_chat(CHATS[chat]) == prompt(family, chat)


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("family", FAMILIES)
def test_they_are_written_as_they_were_read(family: str, language: str) -> None:
    parsed = parse_modelfile(modelfile(family, language))
    assert not parsed.warnings
    assert parse_modelfile(format_modelfile(parsed)) == parsed
