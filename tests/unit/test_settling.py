from __future__ import annotations

import os
from pathlib import Path

import pytest

from lmd.daemon.settling import NotYet, Settling, Timing
from lmd.daemon.writers import has_writer

TIMING = Timing(settle_s=1.0, blind_settle_s=10.0, rescan_s=60.0)


class Scene:
    """A file, a clock, and what the system says about writers."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.now = 100.0
        self.writer: bool | None = False
        self.settling = Settling(TIMING, lambda: self.now, lambda path: self.writer)
        path.write_bytes(b"half")

    def wait_s(self) -> float:
        """How long the file has to wait still; 0 when it is ready."""
        try:
            self.settling.check([self.path])
        except NotYet as why:
            return why.wait_s
        return 0.0


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path / "x.gguf")


def test_a_file_is_ready_when_nobody_writes_and_it_is_at_rest(scene: Scene) -> None:
    assert scene.wait_s() == 1.0
    scene.now += 0.75
    assert scene.wait_s() == 0.25
    scene.now += 0.25
    assert scene.wait_s() == 0.0


def test_a_change_starts_the_wait_anew(scene: Scene) -> None:
    assert scene.wait_s() == 1.0
    scene.now += 0.9
    scene.path.write_bytes(b"half and more")
    assert scene.wait_s() == 1.0
    scene.now += 1.0
    assert scene.wait_s() == 0.0


def test_a_writer_that_pauses_for_an_hour_is_waited_for(scene: Scene) -> None:
    scene.writer = True
    for _ in range(60):
        assert scene.wait_s() > 0
        scene.now += 60.0
    scene.writer = False
    assert scene.wait_s() > 0, "it was closed just now"
    scene.now += 1.0
    assert scene.wait_s() == 0.0


def test_where_writers_cannot_be_seen_the_wait_is_longer(scene: Scene) -> None:
    scene.writer = None
    assert scene.wait_s() == 10.0
    scene.now += 10.0
    assert scene.wait_s() == 0.0


def test_a_file_that_is_gone_waits(scene: Scene) -> None:
    scene.path.unlink()
    assert scene.wait_s() > 0
    scene.settling.forget_missing()
    scene.path.write_bytes(b"back")
    assert scene.wait_s() == 1.0


def test_the_kernel_tells_of_writers(tmp_path: Path) -> None:
    path = tmp_path / "x"
    with path.open("wb"):
        writing = has_writer(path)
    if writing is None:
        pytest.skip("this file system has no leases")
    assert writing
    assert has_writer(path) is False
    with path.open("rb"):
        assert has_writer(path) is False


def test_looking_for_writers_follows_no_link_and_waits_for_no_fifo(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    assert has_writer(tmp_path / "fifo") is None
    (tmp_path / "link").symlink_to(tmp_path / "fifo")
    with pytest.raises(OSError, match="link"):
        has_writer(tmp_path / "link")
