"""What the history says that a version changed."""

from __future__ import annotations

import pytest

from lmd.registry.create import create_model
from lmd.registry.differences import MAX_CHANGES, summarize
from lmd.registry.manifest import Manifest
from lmd.registry.modelfile import parse_modelfile
from tests.support.gguf_bytes import TinyModel
from tests.support.memory_store import MemoryStore


def _manifest(store: MemoryStore, more: str) -> Manifest:
    digest = store.add(TinyModel().to_bytes())
    tag = create_model(store, "m", parse_modelfile(f"FROM ./x.gguf\n{more}"), files={"./x.gguf": digest})
    return store.get_manifest(tag.manifest)


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        ("", "", ""),
        ("SYSTEM a\n", "SYSTEM a\n", ""),
        ("", "SYSTEM a\n", "system added"),
        ("SYSTEM a\n", "", "system removed"),
        ('SYSTEM """a\nb\nc"""\n', 'SYSTEM """a\nx\ny\nc"""\n', "system +2 -1"),
        ("", "TEMPLATE {{ x }}\n", "template added"),
        ("", "PARAMETER top_k 5\n", "top_k 5"),
        ("PARAMETER top_k 5\n", "", "top_k unset"),
        ("PARAMETER top_k 5\n", "PARAMETER top_k 6\n", "top_k 5 to 6"),
        ("PARAMETER stop a\n", "PARAMETER stop a\nPARAMETER stop b\n", 'stop "a" to "a" "b"'),
        ("", "PARAMETER stop " + "x" * 60 + "\n", 'stop "' + "x" * 22 + "…"),
        ("MESSAGE user a\n", "MESSAGE user b\n", "messages changed"),
        ("MESSAGE user a\n", "MESSAGE user a\nMESSAGE assistant b\n", "messages 1 to 2"),
        ("LICENSE MIT\n", "LICENSE BSD\n", "licenses changed"),
        ("", "REQUIRES 0.14.0\n", "requires changed"),
    ],
)
def test_a_change_in_words(before: str, after: str, told: str) -> None:
    store = MemoryStore()
    assert summarize(_manifest(store, before), _manifest(store, after)) == told


def test_many_changes_stay_one_line() -> None:
    store = MemoryStore()
    lines = ["SYSTEM a", "TEMPLATE {{ x }}", "PARAMETER top_k 1", "PARAMETER top_p 0.5", "LICENSE MIT"]
    exactly = summarize(_manifest(store, ""), _manifest(store, "\n".join(lines[:MAX_CHANGES]) + "\n"))
    assert exactly == "template added, system added, top_k 1, top_p 0.5"
    more = summarize(_manifest(store, ""), _manifest(store, "\n".join(lines) + "\n"))
    assert more == "template added, system added, top_k 1, 2 more"
