"""Saved KV on disk: what comes back is what was saved, or nothing."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import tempfile
import time
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmd.runner import kv_files
from lmd.runner.kv_files import KvFiles
from lmd.runner.kv_format import SavedPrefix

MADE_BY = bytes(range(16))
QUOTA = 1 << 20
#: The size of a file with a few tokens and the state that `save` makes.
FILE = 4096 + 5


class Directory:
    """A directory of saved prefixes, and what was complained about."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.complaints: list[str] = []
        self.files = self.opened()

    def opened(
        self,
        *,
        fingerprint: bytes = MADE_BY,
        quota_bytes: int = QUOTA,
        divisible: bool = True,
        slack_tokens: int = 0,
        keep_free_bytes: int = 0,
    ) -> KvFiles:
        self.files = KvFiles(
            self.path,
            quota_bytes,
            fingerprint,
            divisible=divisible,
            slack_tokens=slack_tokens,
            keep_free_bytes=keep_free_bytes,
            complain=self.complaints.append,
        )
        self.files.open()
        return self.files

    def save(
        self,
        tokens: list[int],
        state: bytes = b"state",
        scope: str = "uid:1",
        *,
        public: bool = False,
        used_at: float | None = None,
    ) -> SavedPrefix | None:
        return self.files.save(
            array("i", tokens),
            scope,
            public=public,
            used_at=time.time() if used_at is None else used_at,
            state_bytes=len(state),
            write_state=filler(state),
        )

    def names(self) -> list[str]:
        return sorted(path.name for path in self.path.iterdir())

    def only(self) -> Path:
        (name,) = self.names()
        return self.path / name


def filler(state: bytes) -> Callable[[memoryview], bool]:
    def fill(into: memoryview) -> bool:
        into[:] = state
        return True

    return fill


def state_of(files: KvFiles, saved: SavedPrefix) -> bytes | None:
    with files.read(saved) as state:
        return None if state is None else bytes(state)


@pytest.fixture
def directory(tmp_path: Path) -> Directory:
    return Directory(tmp_path / "kv")


# Round trips


def test_what_is_saved_comes_back_after_a_restart(directory: Directory) -> None:
    state = os.urandom(3 << 18)
    directory.save([1, 2, -3], state, "uid:7")
    (saved,) = directory.opened().saved
    assert (list(saved.tokens), saved.scope, saved.public) == ([1, 2, -3], "uid:7", False)
    assert state_of(directory.files, saved) == state
    assert directory.complaints == []


tokens = st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=3000)


@settings(max_examples=50)
@given(tokens, st.text(max_size=200).filter(lambda t: t.isprintable()), st.booleans(), st.binary(min_size=1))
def test_anything_that_can_be_saved_comes_back(prompt: list[int], scope: str, public: bool, state: bytes) -> None:
    with tempfile.TemporaryDirectory() as path:
        directory = Directory(Path(path))
        made = directory.save(prompt, state, scope, public=public)
        assert made is not None
        (saved,) = directory.opened().saved
        assert (list(saved.tokens), saved.scope, saved.public, saved.size_bytes) == (
            prompt,
            scope,
            public,
            made.size_bytes,
        )
        assert state_of(directory.files, saved) == state
        assert saved.path.stat().st_size == saved.size_bytes


def test_files_tell_nobody_anything(directory: Directory) -> None:
    old_mask = os.umask(0)
    try:
        directory.save([1], scope="uid:alice")
    finally:
        os.umask(old_mask)
    assert stat.S_IMODE(directory.path.stat().st_mode) == 0o700
    assert stat.S_IMODE(directory.only().stat().st_mode) == 0o600
    assert "alice" not in directory.only().name


def test_writing_to_a_state_that_was_read_changes_no_file(directory: Directory) -> None:
    saved = directory.save([1], b"abc")
    assert saved is not None
    with directory.files.read(saved) as state:
        assert state is not None
        state[:] = b"xyz"
    assert state_of(directory.files, saved) == b"abc"


# Damage


@pytest.fixture(scope="module")
def whole_file(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    directory = Directory(tmp_path_factory.mktemp("kv"))
    directory.save(list(range(40)), bytes(range(1, 256)) * 8, "uid:1000")
    return directory.only().read_bytes()


def survives(data: bytes) -> bool:
    """Whether a file with these bytes is taken for good; one that is not has to be gone afterwards."""
    with tempfile.TemporaryDirectory() as path:
        directory = Directory(Path(path))
        (directory.path / "0123.kv").write_bytes(data)
        files = directory.opened()
        good = any(state_of(files, saved) is not None for saved in files.saved)
        assert directory.names() == (["0123.kv"] if good else [])
        assert bool(files.saved) == good
        return good


def test_the_unchanged_file_survives(whole_file: bytes) -> None:
    assert survives(whole_file)


@settings(max_examples=300)
@given(st.data())
def test_one_wrong_bit_anywhere_is_found(whole_file: bytes, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(whole_file) - 1))
    damaged = bytearray(whole_file)
    damaged[at] ^= 1 << data.draw(st.integers(0, 7))
    assert not survives(bytes(damaged))


@settings(max_examples=100)
@given(st.data())
def test_a_cut_or_grown_file_is_found(whole_file: bytes, data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, len(whole_file) - 1))
    more = data.draw(st.binary(max_size=64))
    if (damaged := whole_file[:cut] + more) != whole_file:
        assert not survives(damaged)
    assert not survives(whole_file + (more or b"\0"))


@settings(max_examples=200)
@given(st.data())
def test_overwritten_stretches_are_found(whole_file: bytes, data: st.DataObject) -> None:
    """Such as the zeros that a power cut leaves in pages that were never written."""
    at = data.draw(st.integers(0, len(whole_file) - 1))
    size = data.draw(st.integers(1, 8192))
    patch = data.draw(st.sampled_from([bytes(size), b"\xff" * size, whole_file[:size]]))
    damaged = whole_file[:at] + patch[: len(whole_file) - at]
    damaged += whole_file[len(damaged) :]
    if damaged != whole_file:
        assert not survives(damaged)


@given(st.binary(max_size=200))
def test_noise_is_no_file(noise: bytes) -> None:
    assert not survives(noise)


def test_damage_after_opening_is_found_and_told(directory: Directory) -> None:
    directory.save([1, 2], b"0123456789" * 1000)
    (saved,) = directory.opened().saved
    with saved.path.open("r+b") as file:
        file.seek(-5, os.SEEK_END)
        file.write(b"\0")
    assert state_of(directory.files, saved) is None
    assert directory.names() == []
    assert directory.files.saved == ()
    assert directory.complaints == ["a saved prefix of 2 tokens was damaged and is removed"]


def test_a_file_that_shrinks_after_opening_ends_nobody(directory: Directory) -> None:
    """A mapped page beyond the end of its file would kill the process."""
    directory.save([1, 2], bytes(1 << 16))
    (saved,) = directory.opened().saved
    os.truncate(saved.path, 5000)
    assert state_of(directory.files, saved) is None


def test_a_file_that_somebody_removed_is_no_error(directory: Directory) -> None:
    saved = directory.save([1])
    assert saved is not None
    saved.path.unlink()
    assert state_of(directory.files, saved) is None
    assert directory.files.saved == ()
    assert directory.complaints == []


def test_files_of_another_engine_or_context_go(directory: Directory) -> None:
    directory.save([1])
    assert directory.opened(fingerprint=bytes(16)).saved == ()
    assert directory.names() == []


def test_what_is_no_file_of_ours_is_left_alone_or_not_followed(directory: Directory, tmp_path: Path) -> None:
    directory.path.mkdir(exist_ok=True)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text("keep")
    (directory.path / "link.kv").symlink_to(elsewhere)
    os.mkfifo(directory.path / "pipe.kv")
    (directory.path / "README").write_text("keep")
    assert directory.opened().saved == ()
    assert directory.names() == ["README"]
    assert elsewhere.read_text() == "keep"


# Crashes and full disks


def test_what_a_killed_process_left_unfinished_goes(directory: Directory) -> None:
    program = """
import os, sys
from array import array
from pathlib import Path
from lmd.runner.kv_files import KvFiles

def die(into):
    into[:3] = b"abc"
    os.kill(os.getpid(), 9)

files = KvFiles(Path(sys.argv[1]), 1 << 20, bytes(range(16)), keep_free_bytes=0)
files.save(array("i", [1]), "s", public=False, used_at=1, state_bytes=1 << 16, write_state=die)
"""
    done = subprocess.run([sys.executable, "-c", program, str(directory.path)], check=False)
    assert done.returncode == -9
    assert [Path(name).suffix for name in directory.names()] == [".tmp"]
    assert directory.opened().saved == ()
    assert directory.names() == []


def test_a_state_that_the_engine_does_not_give_leaves_nothing(directory: Directory) -> None:
    kept = directory.save([1], b"old", used_at=1)
    made = directory.files.save(
        array("i", [1, 2]), "uid:1", public=False, used_at=2, state_bytes=5, write_state=lambda into: False
    )
    assert made is None
    assert directory.files.saved == (kept,)
    assert len(directory.names()) == 1


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    mount = tmp_path / "disk"
    mount.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(mount)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"mounting is not permitted here: {done.stderr.strip()}")
    try:
        yield mount
    finally:
        subprocess.run(["umount", str(mount)], check=True)


def test_a_full_disk_is_told_once_and_leaves_nothing_unfinished(small_disk: Path) -> None:
    directory = Directory(small_disk / "kv")
    directory.opened(quota_bytes=1 << 30)
    assert directory.save([1], bytes(1 << 19))
    assert directory.save([2], bytes(1 << 20)) is None
    assert directory.save([3], bytes(1 << 20)) is None
    assert len(directory.names()) == 1
    assert len(directory.complaints) == 1
    assert "No space left on device" in directory.complaints[0]
    assert directory.save([4], bytes(1 << 16)) is not None


def test_a_read_only_disk_is_told_once_and_what_is_there_can_be_used(small_disk: Path) -> None:
    directory = Directory(small_disk / "kv")
    directory.save([1, 2], b"state")
    (directory.path / "garbage.kv").write_bytes(b"garbage")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    (saved,) = directory.opened().saved
    assert state_of(directory.files, saved) == b"state"
    assert directory.save([3]) is None
    assert directory.save([1, 2, 3]) is None
    assert state_of(directory.files, saved) == b"state"
    assert len(directory.complaints) == 1
    assert "Read-only file system" in directory.complaints[0]


def test_room_for_others_stays_free(directory: Directory) -> None:
    free_bytes = os.statvfs(directory.path.parent)
    directory.opened(keep_free_bytes=free_bytes.f_blocks * free_bytes.f_frsize)
    assert directory.save([1]) is None
    assert len(directory.complaints) == 1


def test_a_directory_that_cannot_be_made_or_read_is_as_good_as_empty(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    directory = Directory(tmp_path / "file" / "kv")
    assert directory.files.saved == ()
    assert directory.save([1]) is None
    assert len(directory.complaints) == 1
    assert not directory.opened(quota_bytes=0).saved


# Quota


def test_the_least_recently_used_make_room(directory: Directory) -> None:
    directory.opened(quota_bytes=3 * FILE)
    old, new = directory.save([1], used_at=100), directory.save([2], used_at=300)
    middle = directory.save([3], used_at=200)
    added = directory.save([4], used_at=400)
    assert set(directory.files.saved) == {new, middle, added}
    assert old is not None
    assert not old.path.exists()
    assert {saved.used_at for saved in directory.opened(quota_bytes=3 * FILE).saved} == {200, 300, 400}


def test_what_was_used_later_does_not_give_way(directory: Directory) -> None:
    directory.opened(quota_bytes=2 * FILE)
    directory.save([1], used_at=100)
    directory.save([2], used_at=300)
    assert directory.save([3], used_at=50) is None
    assert directory.save([4], bytes(FILE), used_at=200) is None  # the one older does not make enough room
    assert sorted(list(saved.tokens) for saved in directory.files.saved) == [[1], [2]]


def test_reading_counts_as_use(directory: Directory) -> None:
    directory.save([1], used_at=100)
    directory.save([2], used_at=200)
    files = directory.opened()
    first = next(saved for saved in files.saved if list(saved.tokens) == [1])
    state_of(files, first)
    assert first.used_at > 200
    (survivor,) = directory.opened(quota_bytes=FILE).saved
    assert list(survivor.tokens) == [1]


def test_a_smaller_quota_takes_effect_at_the_next_start(directory: Directory) -> None:
    for number in range(5):
        directory.save([number], used_at=100 + number)
    files = directory.opened(quota_bytes=2 * FILE)
    assert sorted(saved.used_at for saved in files.saved) == [103, 104]
    assert len(directory.names()) == 2


def test_more_than_the_quota_is_not_saved(directory: Directory) -> None:
    directory.opened(quota_bytes=FILE)
    directory.save([1])
    assert directory.save([2], bytes(FILE)) is None
    assert len(directory.names()) == 1


def test_the_number_of_files_is_bounded(directory: Directory, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(5):
        directory.save([number], used_at=100 + number)
    monkeypatch.setattr(kv_files, "MAX_FILES", 3)
    files = directory.opened()
    assert sorted(saved.used_at for saved in files.saved) == [102, 103, 104]
    directory.save([9], used_at=200)
    assert len(directory.names()) == 3


def test_a_time_in_the_future_does_not_last(directory: Directory) -> None:
    directory.save([1], used_at=time.time() + 1e6)
    directory.opened(quota_bytes=FILE)
    assert directory.save([2], used_at=time.time() + 1) is not None
    assert [list(saved.tokens) for saved in directory.files.saved] == [[2]]


# What covers what


def test_a_longer_prefix_takes_the_place_of_its_beginning(directory: Directory) -> None:
    directory.save([1, 2])
    directory.save([1, 2, 3])
    assert [list(saved.tokens) for saved in directory.files.saved] == [[1, 2, 3]]
    assert len(directory.names()) == 1


def test_what_is_covered_is_only_touched(directory: Directory) -> None:
    longer = directory.save([1, 2, 3], used_at=100)
    assert directory.save([1, 2], used_at=200) is longer
    assert directory.save([1, 2, 3], used_at=150) is longer
    (saved,) = directory.opened().saved
    assert saved.used_at == 200


def test_a_few_tokens_more_are_not_worth_a_file(directory: Directory) -> None:
    """The same question gets an answer that differs in its last words, and a large file would be written twice."""
    directory.opened(slack_tokens=2)
    first = directory.save([1, 2, 3, 4, 5])
    assert directory.save([1, 2, 3, 4, 6, 7]) is first
    assert directory.save([1, 2, 3, 4, 5, 6, 7]) is first
    assert directory.save([1, 2, 3]) is first
    longer = directory.save([1, 2, 3, 4, 6, 7, 8])
    assert list(directory.files.saved) == [longer]
    other = directory.save([1, 2, 9, 9, 9])
    assert list(directory.files.saved) == [longer, other]


def test_a_state_that_cannot_be_divided_covers_only_itself(directory: Directory) -> None:
    directory.opened(divisible=False)
    directory.save([1, 2])
    directory.save([1, 2, 3])
    assert len(directory.files.saved) == 2
    directory.save([1, 2, 3])
    assert len(directory.names()) == 2


def test_scopes_do_not_cover_each_other_but_the_public_covers_all(directory: Directory) -> None:
    directory.save([1, 2], scope="a")
    directory.save([1, 2], scope="b")
    assert len(directory.files.saved) == 2
    shared = directory.save([1, 2], scope="a", public=True)
    assert shared is not None
    assert [saved.path for saved in directory.files.saved] == [shared.path]
    assert directory.save([1], scope="c") is shared
    directory.save([1, 2, 3], scope="c")
    assert len(directory.files.saved) == 2


# Finding


def test_find_gives_the_longest_of_ones_own(directory: Directory) -> None:
    files = directory.files
    directory.save([1, 2, 3, 4], scope="a")
    directory.save([1, 2, 9], scope="b")
    directory.save([1, 8], public=True)
    prompt = array("i", [1, 2, 3, 4, 5])

    def found(scope: str, beyond: int = 0, prompt: array[int] = prompt) -> tuple[list[int], int] | None:
        match = files.find(prompt, scope, beyond=beyond)
        return None if match is None else (list(match[0].tokens), match[1])

    assert found("a") == ([1, 2, 3, 4], 4)
    assert found("b") == ([1, 2, 9], 2)
    assert found("c") == ([1, 8], 1)
    assert found("a", beyond=4) is None
    assert found("a", prompt=array("i", [1, 2, 3, 4])) == ([1, 2, 3, 4], 3)  # its last token has to be decoded
    assert found("a", prompt=array("i", [7])) is None


def test_find_takes_only_whole_states_that_cannot_be_divided(directory: Directory) -> None:
    files = directory.opened(divisible=False)
    directory.save([1, 2])
    directory.save([1, 2, 3, 4])
    match = files.find(array("i", [1, 2, 3, 9]), "uid:1")
    assert match is not None
    assert (list(match[0].tokens), match[1]) == ([1, 2], 2)
    assert files.find(array("i", [1, 2]), "uid:1") is None
