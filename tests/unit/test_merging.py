"""Shards that a Modelfile names become one file."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path

import gguf
import pytest

from lmd.registry.create import create_model
from lmd.registry.digest import Digest
from lmd.registry.errors import DiskFull, GgufInvalid, PullCancelled
from lmd.registry.manifest import FileLayer
from lmd.registry.merging import merge, shard_sets
from lmd.registry.model_store import read_blob_header
from lmd.registry.modelfile import parse_modelfile
from lmd.registry.store import Store
from lmd.registry.store.reservations import Space
from tests.support.gguf_bytes import Tensor, Value
from tests.support.gguf_bytes import gguf as gguf_bytes
from tests.support.memory_store import MemoryStore
from tests.support.tiny_models import make_tiny_llama, split_model


def given(store: MemoryStore | Store, shards: list[Path]) -> tuple[list[FileLayer], set[Digest]]:
    layers = [FileLayer(stored(store, path), path.stat().st_size, path.name) for path in shards]
    return layers, {layer.digest for layer in layers}


def stored(store: MemoryStore | Store, path: Path) -> Digest:
    return store.add(path.read_bytes()) if isinstance(store, MemoryStore) else store.import_file(path)[0]


def create(store: MemoryStore, text: str, files: Mapping[str, bytes]) -> Digest:
    digests = {path: store.add(data) for path, data in files.items()}
    return create_model(store, "m", parse_modelfile(text), files=digests).manifest


@pytest.fixture
def shards(tmp_path: Path) -> list[Path]:
    return split_model(make_tiny_llama(tmp_path / "whole.gguf"), 3)


def test_the_merged_file_is_the_model_that_was_split(shards: list[Path], tmp_path: Path) -> None:
    """Against the reader of the `gguf` package: the same tensors in order, the same metadata without ``split.*``."""
    store = MemoryStore()
    layers, digests = given(store, shards)
    (found,) = shard_sets(store, layers[::-1], digests)
    with store.lease("a test") as lease:
        layer = merge(store, found, lease)
        assert lease.held == {layer.digest}
    assert (layer.filename, layer.size_bytes) == ("whole.gguf", len(store.blobs[layer.digest]))
    path = tmp_path / "merged.gguf"
    path.write_bytes(store.blobs[layer.digest])
    merged, whole = gguf.GGUFReader(path), gguf.GGUFReader(tmp_path / "whole.gguf")
    assert [(t.name, t.tensor_type, list(t.shape), t.data.tobytes()) for t in merged.tensors] == [
        (t.name, t.tensor_type, list(t.shape), t.data.tobytes()) for t in whole.tensors
    ]
    assert _metadata(merged) == _metadata(whole)


def _metadata(reader: gguf.GGUFReader) -> dict[str, object]:
    return {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}


def test_the_same_shards_give_the_same_model_however_they_are_named(shards: list[Path]) -> None:
    store = MemoryStore()
    files = {f"./{path.name}": path.read_bytes() for path in shards}
    text = "\n".join(f"FROM {name}" for name in files)
    backwards = "\n".join(f"FROM {name}" for name in reversed(files))
    folder = {f"./x/{path.name}": path.read_bytes() for path in shards}
    assert create(store, text, files) == create(store, backwards, files) == create(store, "FROM ./x", folder)
    store.facts.clear()
    assert create(store, text, files) == store.tags["m:latest"].manifest, "not because it was remembered"


def test_what_was_merged_before_is_not_written_again(shards: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    store = MemoryStore()
    files = {f"./{path.name}": path.read_bytes() for path in shards}
    text = "\n".join(f"FROM {name}" for name in files)
    first = create(store, text, files)
    with monkeypatch.context() as patch:
        patch.setattr(store, "compose", lambda *args, **kwargs: pytest.fail("written again"))
        assert create(store, text, files) == first
    merged = store.get_manifest(first).weights[0].digest
    del store.blobs[merged]
    assert create(store, text, files) == first
    assert merged in store.blobs, "it was removed meanwhile, so it is made again"


def test_a_single_file_is_not_touched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    store = MemoryStore()
    monkeypatch.setattr(store, "compose", lambda *args, **kwargs: pytest.fail("nothing is to be merged"))
    data = make_tiny_llama(tmp_path / "one.gguf").read_bytes()
    manifest = store.get_manifest(create(store, "FROM ./one.gguf", {"./one.gguf": data}))
    assert manifest.weights[0].digest == Digest.of(data)


def test_shards_that_the_store_has_stay_as_they_are(shards: list[Path]) -> None:
    """Their digests are those of the place they were pulled from, and may be shared with other models."""
    store = MemoryStore()
    layers, digests = given(store, shards)
    assert shard_sets(store, layers, set()) == []
    assert shard_sets(store, layers, set(list(digests)[:2])) == []
    text = "\n".join(f"FROM {layer.digest}" for layer in layers)
    assert len(store.get_manifest(create(store, text, {})).weights) == 3


@pytest.mark.parametrize("alignment", [32, 64])
def test_tensors_are_aligned_as_the_first_shard_says(alignment: int) -> None:
    store = MemoryStore()
    files = {}
    for number in range(2):
        extra: dict[str, Value] = {"split.no": number, "split.count": 2, "general.alignment": alignment}
        if number == 0:
            extra = {"general.architecture": "llama", **extra, "last": "kept"}
        tensors = [Tensor(f"t{number}{letter}", (5,)) for letter in "ab"]
        files[f"./{number}.gguf"] = gguf_bytes(extra, tensors, alignment=alignment, fill=number + 1)
    manifest = store.get_manifest(create(store, "FROM ./0.gguf\nFROM ./1.gguf", files))
    (layer,) = manifest.weights
    header = read_blob_header(store, layer.digest)
    assert header.alignment == alignment
    assert list(header.metadata) == ["general.architecture", "general.alignment", "last"]
    data = store.blobs[layer.digest]
    assert len(data) == layer.size_bytes == header.data_offset + 4 * alignment
    for tensor in header.tensors:
        start = header.data_offset + tensor.offset
        assert start % alignment == 0
        assert data[start : start + 20] == bytes([int(tensor.name[1]) + 1]) * 20


def test_a_merge_that_is_given_up_leaves_nothing(shards: list[Path], tmp_path: Path) -> None:
    with Store.open(tmp_path / "store") as store:
        layers, digests = given(store, shards)
        (found,) = shard_sets(store, layers, digests)
        before = sorted((tmp_path / "store").rglob("*"))
        cancelled = threading.Event()
        seen: list[tuple[int, int]] = []

        def on_progress(done_bytes: int, total_bytes: int) -> None:
            seen.append((done_bytes, total_bytes))
            cancelled.set()

        with store.lease("a test") as lease, pytest.raises(PullCancelled):
            merge(store, found, lease, on_progress=on_progress, cancelled=cancelled)
        assert len(seen) == 1
        assert 0 < seen[0][0] < seen[0][1]
        assert sorted((tmp_path / "store").rglob("*")) == before


def test_a_merge_needs_its_room_before_the_first_byte(
    shards: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Store.open(tmp_path / "store") as store:
        layers, digests = given(store, shards)
        (found,) = shard_sets(store, layers, digests)
        full = Space(free_bytes=found.size_bytes // 2, total_bytes=1 << 20)
        monkeypatch.setattr(store._reservations, "_space", lambda: full)
        with store.lease("a test") as lease, pytest.raises(DiskFull, match=r"merging whole\.gguf"):
            merge(store, found, lease, on_progress=lambda done, total: pytest.fail("it began"))


def test_a_shard_that_shrinks_meanwhile(shards: list[Path]) -> None:
    store = MemoryStore()
    layers, digests = given(store, shards)
    (found,) = shard_sets(store, layers, digests)
    last = layers[-1].digest
    store.blobs[last] = store.blobs[last][:-40]
    with store.lease("a test") as lease, pytest.raises(GgufInvalid, match="file 3 of 3 ends too early"):
        merge(store, found, lease)
