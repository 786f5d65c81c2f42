from __future__ import annotations

from pathlib import Path

import pytest

from lmd.daemon.runner_spec import adapter_names, draft_names, make_view
from lmd.registry.errors import BlobMissing


def test_a_view_has_adapters_in_their_order(tmp_path: Path) -> None:
    blobs = [tmp_path / name for name in ("m", "b", "a")]
    for blob in blobs:
        blob.write_text(blob.name)
    view = make_view(tmp_path / "views", blobs[:1], (), blobs[1:])
    assert [(view / name).read_text() for name in adapter_names(2)] == ["b", "a"]
    assert len(list(view.iterdir())) == 3


def test_a_view_has_the_model_and_its_draft_by_names_that_the_engine_understands(
    tmp_path: Path,
) -> None:
    blobs = [tmp_path / name for name in ("c", "a", "b")]
    for blob in blobs:
        blob.write_text(blob.name)
    view = make_view(tmp_path / "views", blobs[:1], blobs[1:])
    assert {path.name: path.read_text() for path in view.iterdir()} == {
        "model.gguf": "c",
        "draft-00001-of-00002.gguf": "a",
        "draft-00002-of-00002.gguf": "b",
    }
    assert draft_names(1) == ["draft.gguf"]
    assert draft_names(0) == []
    blobs[2].unlink()
    with pytest.raises(BlobMissing):
        make_view(tmp_path / "views", blobs[:1], blobs[1:])
    assert list((tmp_path / "views").iterdir()) == [view]


def test_a_view_links_to_the_weights_and_copies_nothing(tmp_path: Path) -> None:
    """Docker model runner #1015: each start copied the model into a bundle of its own."""
    blob = tmp_path / "blob"
    blob.write_bytes(bytes(1 << 20))
    view = make_view(tmp_path / "views", [blob])
    (link,) = view.iterdir()
    assert link.is_symlink()
    assert link.samefile(blob)
    assert sum(path.lstat().st_blocks for path in view.iterdir()) * 512 < 8192
