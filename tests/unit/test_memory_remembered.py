from __future__ import annotations

import io

from lmd.registry.gguf import GgufHeader, read_header
from lmd.registry.memory.remembered import MAX_HEADERS, once_per_header
from tests.support.gguf_bytes import gguf


def header(name: str) -> GgufHeader:
    data = gguf({"general.architecture": "llama", "general.name": name})
    return read_header(io.BytesIO(data), len(data))


def test_each_header_is_computed_once_and_none_for_another() -> None:
    calls: list[str] = []

    @once_per_header
    def title(asked: GgufHeader) -> str:
        calls.append(asked.title)
        return asked.title

    one, same, other = header("one"), header("one"), header("other")
    assert [title(each) for each in (one, other, one, same, other)] == ["one", "other", "one", "one", "other"]
    # Equal headers of different files are computed each.
    assert calls == ["one", "other", "one"]


def test_the_memory_is_bounded_and_keeps_those_in_use() -> None:
    calls: list[str] = []

    @once_per_header
    def title(asked: GgufHeader) -> str:
        calls.append(asked.title)
        return asked.title

    kept = header("kept")
    title(kept)
    for number in range(2 * MAX_HEADERS):
        assert title(header(str(number))) == str(number)
        title(kept)
    assert calls.count("kept") == 1
