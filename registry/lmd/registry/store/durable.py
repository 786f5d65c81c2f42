"""File operations that say when their effect survives a power cut, and errors that say what the disk did.

A name is durable when its directory has been synced, bytes when their file has been. After a failed sync the kernel may
have dropped the dirty pages and report success next time, so nothing here retries one: the caller throws the part away.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lmd.registry.errors import DiskFull, StoreError

Buffer = bytes | bytearray | memoryview

NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT})


@contextmanager
def disk_errors(operation: str, where: Path, *, needed_bytes: int = 0) -> Iterator[None]:
    """Turn an OSError of the block into DiskFull or StoreError."""
    try:
        yield
    except OSError as error:
        if error.errno in NO_ROOM:
            raise DiskFull(needed_bytes=needed_bytes, free_bytes=free_bytes(where), where=str(where)) from error
        raise StoreError(f"{operation} failed in {where}: {error.strerror}", operation=operation) from error


def free_bytes(path: Path) -> int:
    """Count the bytes that this process may still write to the file system of *path*; 0 when nobody can tell."""
    try:
        status = os.statvfs(path)
    except OSError:
        return 0
    return status.f_bavail * status.f_frsize


def fsync_dir(path: Path) -> None:
    """Make the names in directory *path* durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def pwrite_all(fd: int, data: Buffer, offset: int) -> int:
    """Write all of *data* at *offset*, however many calls that takes; return its length in bytes."""
    view = memoryview(data).cast("B")
    done = 0
    while done < len(view):
        done += os.pwrite(fd, view[done:], offset + done)
    return done


def write_new(path: Path, data: Buffer) -> None:
    """Write *data* to a new private file at *path* and sync it; its name is not durable yet.

    On failure nothing stays at *path*.
    """
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        try:
            pwrite_all(fd, data, 0)
            os.fsync(fd)
        finally:
            os.close(fd)
    except BaseException:
        with suppress(OSError):
            path.unlink()
        raise


def replace_file(path: Path, data: Buffer, temporary: Path) -> None:
    """Replace *path* by *data*, atomically and durably; *temporary* is a free name on the same file system."""
    with suppress(FileNotFoundError):
        temporary.unlink()
    write_new(temporary, data)
    try:
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    fsync_dir(path.parent)
