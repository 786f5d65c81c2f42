"""The store under kills, failing disks and power cuts: at every system call that changes something.

Kills and errors are injected with strace(1): "before the k-th of these calls, kill" or "fail the k-th". A power cut is
a loop-mounted ext4 that is told to forget everything that is not on the device (EXT4_IOC_SHUTDOWN without flushing its
log). The default run takes a sample of the points, the slow one takes all.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.store_scenario import BOOT, FAILED, check, prepare

pytestmark = pytest.mark.fault

CHANGES = (
    "write,pwrite64,fsync,fdatasync,rename,renameat,renameat2,link,linkat,unlink,unlinkat,ftruncate,fallocate,"
    "chmod,fchmod,fchmodat,mkdir,mkdirat"
)
SCENARIOS = ["pull", "copy_and_remove", "take_in", "rebuild"]
# Source: linux/fs/ext4/ext4.h, EXT4_IOC_SHUTDOWN = _IOR('X', 125, __u32), EXT4_GOING_FLAGS_NOLOGFLUSH = 2.
EXT4_IOC_SHUTDOWN = 0x8004587D
NOLOGFLUSH = 2


@dataclass(frozen=True)
class Outcome:
    """How a scenario ended, and what the store had acknowledged by then."""

    returncode: int
    said: list[str]
    stderr: str


def run(root: Path, scenario: str, *strace: str) -> Outcome:
    command = [sys.executable, "-X", "frozen_modules=on", "-m", "tests.support.store_scenario", str(root), scenario]
    if strace:
        command = ["strace", "-f", "-qqq", "-e", "signal=none", *strace, *command]
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=50)
    return Outcome(done.returncode, done.stdout.splitlines(), done.stderr)


@dataclass(frozen=True)
class Point:
    """The moment before the *when*-th call of *call*; strace counts each kind of call by itself."""

    call: str
    when: int


def injection(point: Point, fault: str) -> list[str]:
    # Filtering by seccomp is faster, but then signals are not injected.
    speed = ["--seccomp-bpf"] if fault.startswith("error=") else []
    # A full disk stays full; other faults come once.
    lasting = "+" if "ENOSPC" in fault else ""
    inject = f"inject={point.call}:{fault}:when={point.when}{lasting}"
    return [*speed, "-o", "/dev/null", "-e", f"trace={point.call}", "-e", inject]


def find_points(directory: Path, scenario: str, calls: str, sample: int | None) -> list[Point]:
    """List the calls of an undisturbed run in their order, or *sample* of them, spread evenly."""
    log = directory / "log"
    outcome = run(fresh(directory, 0), scenario, "-o", str(log), "-e", f"trace={calls}")
    assert outcome.returncode == 0, outcome.stderr
    seen: Counter[str] = Counter()
    found = []
    for name in re.findall(r"^\d+ +(\w+)\(", log.read_text(), re.MULTILINE):
        seen[name] += 1
        found.append(Point(name, seen[name]))
    step = max(1, len(found) // sample) if sample else 1
    return found[step // 2 :: step]


@pytest.fixture(scope="session")
def strace(tmp_path_factory: pytest.TempPathFactory) -> None:
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    target = tmp_path_factory.mktemp("strace")
    command = ["strace", "-f", "-qqq", *injection(Point("fsync", 1), "error=EIO"), "sync", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 1:
        pytest.skip(f"strace cannot inject faults here: {done.stderr.strip()[:200]}")


def fresh(directory: Path, number: int) -> Path:
    made = directory / f"{number:04}"
    made.mkdir()
    prepare(made / "store")
    return made / "store"


def kill_at(tmp_path: Path, scenario: str, sample: int | None) -> None:
    for number, point in enumerate(find_points(tmp_path, scenario, CHANGES, sample), 1):
        root = fresh(tmp_path, number)
        outcome = run(root, scenario, *injection(point, "signal=SIGKILL"))
        # strace ends by the signal that ended its child.
        assert outcome.returncode == -signal.SIGKILL, (point, outcome.stderr)
        check(root, outcome.said, BOOT)
        again = run(root, scenario)
        assert again.returncode == 0, f"killed at {point}, the next run fails: {again.stderr}"
        check(root, [*outcome.said, *again.said], BOOT, days_later=2)
        shutil.rmtree(root.parent)


@pytest.mark.usefixtures("strace")
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_kill_at_some_calls(tmp_path: Path, scenario: str) -> None:
    kill_at(tmp_path, scenario, sample=5)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("strace")
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_kill_at_every_call(tmp_path: Path, scenario: str) -> None:
    kill_at(tmp_path, scenario, sample=None)


def fail_at(tmp_path: Path, scenario: str, calls: str, error: str, sample: int | None) -> None:
    """Whatever fails: one of the store's own errors, nothing acknowledged is lost, and the next run succeeds."""
    failed = 0
    for number, point in enumerate(find_points(tmp_path, scenario, calls, sample), 1):
        root = fresh(tmp_path, number)
        outcome = run(root, scenario, *injection(point, f"error={error}"))
        assert outcome.returncode in (0, FAILED), outcome.stderr
        failed += outcome.returncode == FAILED
        if outcome.returncode == FAILED:
            assert outcome.said[-1] in ("failed StoreError", "failed DiskFull")
        check(root, outcome.said, BOOT)
        again = run(root, scenario)
        assert again.returncode == 0, again.stderr
        check(root, [*outcome.said, *again.said], BOOT, days_later=2)
        shutil.rmtree(root.parent)
    assert failed > 0


FAULTS = [("fsync", "EIO"), ("fdatasync", "EIO"), ("pwrite64", "ENOSPC"), ("rename,linkat,unlink", "EIO")]


@pytest.mark.usefixtures("strace")
@pytest.mark.parametrize(("calls", "error"), FAULTS)
def test_a_failing_disk_at_some_calls(tmp_path: Path, calls: str, error: str) -> None:
    fail_at(tmp_path, "pull", calls, error, sample=3)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("strace")
@pytest.mark.parametrize(("calls", "error"), FAULTS)
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_failing_disk_at_every_call(tmp_path: Path, scenario: str, calls: str, error: str) -> None:
    fail_at(tmp_path, scenario, calls, error, sample=None)


@contextmanager
def mounted(image: Path, mount: Path) -> Iterator[None]:
    mount.mkdir(exist_ok=True)
    subprocess.run(["mount", "-o", "loop", str(image), str(mount)], check=True, capture_output=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(mount)], check=True, capture_output=True)


def cut_power(mount: Path) -> None:
    fd = os.open(mount, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.ioctl(fd, EXT4_IOC_SHUTDOWN, struct.pack("I", NOLOGFLUSH))
    finally:
        os.close(fd)


@pytest.fixture(scope="session")
def disk_image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ext4 that can be mounted and cut off."""
    if os.geteuid() != 0:
        pytest.skip("loop mounts need root")
    if shutil.which("mkfs.ext4") is None:
        pytest.skip("mkfs.ext4 is not installed")
    directory = tmp_path_factory.mktemp("image")
    image = directory / "image"
    with image.open("wb") as file:
        file.truncate(24 << 20)
    subprocess.run(["mkfs.ext4", "-q", str(image)], check=True)
    try:
        with mounted(image, directory / "mount"):
            (directory / "mount" / "x").write_bytes(b"x")
            cut_power(directory / "mount")
        with mounted(image, directory / "mount"):
            assert not (directory / "mount" / "x").exists()
    except subprocess.CalledProcessError as error:
        pytest.skip(f"loop mounts are not permitted here: {error.stderr.decode().strip()}")
    except OSError as error:
        if error.errno not in (errno.ENOTTY, errno.EOPNOTSUPP, errno.EPERM):
            raise
        pytest.skip(f"this ext4 cannot be shut down: {error}")
    return image


def cut_power_at(tmp_path: Path, disk_image: Path, scenario: str, point: Point | None) -> Outcome:
    """Cut the power at *point* of the scenario, or right after its end; then check."""
    image, mount = tmp_path / "image", tmp_path / "mount"
    shutil.copyfile(disk_image, image)
    with mounted(image, mount):
        prepare(mount / "store")
    with mounted(image, mount):
        outcome = run(mount / "store", scenario, *(injection(point, "signal=SIGKILL") if point else ()))
        cut_power(mount)
    with mounted(image, mount):
        check(mount / "store", outcome.said, "the boot after the power cut")
        again = run(mount / "store", scenario.replace("put_without_sync", "pull"))
        assert again.returncode == 0, again.stderr
        check(mount / "store", [*outcome.said, *again.said], "yet another boot", days_later=2)
    return outcome


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_what_was_acknowledged_survives_a_power_cut(tmp_path: Path, disk_image: Path, scenario: str) -> None:
    outcome = cut_power_at(tmp_path, disk_image, scenario, None)
    assert outcome.returncode == 0, outcome.stderr
    assert outcome.said or scenario == "rebuild"


def test_the_power_cut_has_teeth(tmp_path: Path, disk_image: Path) -> None:
    """The negative control: without the sync of files, the same check finds a blob that is not what its name says."""
    with pytest.raises(AssertionError):
        cut_power_at(tmp_path, disk_image, "put_without_sync", None)


@pytest.mark.usefixtures("strace")
def test_power_cuts_at_some_calls(tmp_path: Path, disk_image: Path) -> None:
    for point in find_points(tmp_path, "pull", CHANGES, 5):
        cut_power_at(tmp_path, disk_image, "pull", point)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("strace")
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_power_cuts_at_every_call(tmp_path: Path, disk_image: Path, scenario: str) -> None:
    for point in find_points(tmp_path, scenario, CHANGES, None):
        cut_power_at(tmp_path, disk_image, scenario, point)
