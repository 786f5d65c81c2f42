"""Puts tiny models into a store, without a daemon."""

from __future__ import annotations

from pathlib import Path

from lmd.registry.create import create_model
from lmd.registry.modelfile import parse_modelfile
from lmd.registry.store import Store, TagRecord
from tests.support.tiny_models import make_tiny_llama


def tiny_file(folder: Path, seed: int = 1, *, chat_template: str | None = None) -> Path:
    """Return a GGUF file; different seeds have different bytes."""
    path = folder / f"tiny-{seed}{'-chat' if chat_template else ''}.gguf"
    return path if path.exists() else make_tiny_llama(path, seed=seed, chat_template=chat_template, name=f"tiny {seed}")


def add_model(store: Store, folder: Path, name: str, seed: int = 1, more: str = "") -> TagRecord:
    """Store a model made from `tiny_file` and the lines *more* of a Modelfile."""
    digest, _ = store.import_file(tiny_file(folder, seed))
    return create_model(store, name, parse_modelfile(f"FROM ./x.gguf\n{more}"), files={"./x.gguf": digest})
