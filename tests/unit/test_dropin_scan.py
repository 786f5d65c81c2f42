from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from lmd.daemon.dropin_scan import Entry, mark_of, scan


def put(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x")


def found(folder: Path) -> dict[str, Entry]:
    return {entry.key: entry for entry in scan(folder)}


def test_what_becomes_a_model_and_what_does_not(tmp_path: Path) -> None:
    put(
        tmp_path,
        "a.gguf",
        "B.GGUF",
        "c.modelfile",
        "d/Modelfile",
        "d/weights.gguf",
        "e/weights.gguf",
        "README.md",
        "f.gguf.part",
        ".g.gguf",
        ".h/Modelfile",
    )
    entries = found(tmp_path)
    assert {key: (entry.stem, entry.is_modelfile, entry.problem) for key, entry in entries.items()} == {
        "a.gguf": ("a", False, ""),
        "B.GGUF": ("B", False, ""),
        "c.modelfile": ("c", True, ""),
        "d/Modelfile": ("d", True, ""),
    }
    assert entries["d/Modelfile"].files == (tmp_path / "d" / "Modelfile",)


def test_modelfiles_come_before_the_files_they_may_use(tmp_path: Path) -> None:
    put(tmp_path, "a.gguf", "a.modelfile", "b/Modelfile")
    assert [entry.is_modelfile for entry in scan(tmp_path)] == [True, True, False]


def test_shards_are_one_model_once_all_are_there(tmp_path: Path) -> None:
    put(tmp_path, "m-00002-of-00003.gguf", "m-00001-of-00003.gguf")
    (entry,) = scan(tmp_path)
    assert entry.problem == "2 of 3 shards are there"
    put(tmp_path, "m-00003-of-00003.gguf")
    (whole,) = scan(tmp_path)
    assert (whole.key, whole.stem, whole.problem) == (entry.key, "m", "")
    assert [path.name for path in whole.files] == [f"m-0000{number}-of-00003.gguf" for number in (1, 2, 3)]


@pytest.mark.parametrize("name", ["m-00000-of-00001.gguf", "m-00003-of-00002.gguf", "m-00001-of-00000.gguf"])
def test_shards_with_impossible_numbers_are_refused(tmp_path: Path, name: str) -> None:
    put(tmp_path, name, "m-00001-of-00001.gguf", "m-00001-of-00002.gguf", "m-00002-of-00002.gguf")
    count = name[11:16]
    assert found(tmp_path)[f"m-of-{count}"].problem


def test_links_fifos_sockets_and_directories_are_refused_unopened(tmp_path: Path) -> None:
    put(tmp_path, "real.bin")
    (tmp_path / "link.gguf").symlink_to(tmp_path / "real.bin")
    (tmp_path / "dangling.modelfile").symlink_to(tmp_path / "nothing")
    os.mkfifo(tmp_path / "fifo.gguf")
    (tmp_path / "folder.gguf").mkdir()
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "Modelfile").symlink_to(tmp_path / "real.bin")
    (tmp_path / "linked").symlink_to(tmp_path / "sub")
    os.mkfifo(tmp_path / "s-00001-of-00001.gguf")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket.gguf"))
        problems = {key: entry.problem for key, entry in found(tmp_path).items()}
    assert problems == {
        "link.gguf": "it is a symbolic link, not a regular file",
        "dangling.modelfile": "it is a symbolic link, not a regular file",
        "fifo.gguf": "it is a FIFO, not a regular file",
        "folder.gguf": "it is a directory, not a regular file",
        "sub/Modelfile": "it is a symbolic link, not a regular file",
        "s-00001-of-00001.gguf": "it is a FIFO, not a regular file",
        "socket.gguf": "it is a special file, not a regular file",
    }


def test_a_mark_changes_with_content_and_replacement_but_not_with_links(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    assert mark_of(path) is None
    path.write_bytes(b"one")
    first = mark_of(path)
    os.link(path, tmp_path / "other")
    assert mark_of(path) == first
    os.utime(path, ns=(1, 1))
    second = mark_of(path)
    assert second != first
    replacement = tmp_path / "new"
    replacement.write_bytes(b"two")
    os.utime(replacement, ns=(1, 1))
    replacement.replace(path)
    assert mark_of(path) != second
