"""Fixtures for tests that drive the installed commands."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.hub import HubServer
from tests.support.product import Product, installed
from tests.support.shared_models import STORIES
from tests.support.tiny_models import make_tiny_llama

CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="session")
def tiny_chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A runnable model with random weights and a chat template."""
    return make_tiny_llama(tmp_path_factory.mktemp("models") / "tiny-chat.gguf", chat_template=CHAT_TEMPLATE)


@pytest.fixture
def hub(tiny_chat: Path) -> Iterator[HubServer]:
    """A Hub with a trained model without a template, and a random one with a template."""
    with HubServer() as server:
        server.add_repo("test/stories", {STORIES.name: STORIES})
        server.add_repo("test/chat", {tiny_chat.name: tiny_chat})
        yield server


@pytest.fixture
def product(lmd_home: Path, hub: HubServer) -> Iterator[Product]:
    """An installation on a private home whose Hub is *hub*."""
    with installed(lmd_home, HF_ENDPOINT=hub.endpoint) as made:
        yield made
