"""Tells whether a file is still being written."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
from pathlib import Path


def has_writer(path: Path) -> bool | None:
    """Return whether some process has the regular file *path* open for writing; None when the system does not say.

    The kernel grants a read lease only on files that nobody has open for writing (fcntl(2), F_SETLEASE). The lease is
    given back at once. It is asked for with SIGURG, which does nothing by default, because a writer that opens the
    file within that moment makes the kernel send a signal, and SIGIO, its choice, ends the process. Leases need to be
    the file's owner or CAP_LEASE, and a file system that has them: elsewhere the answer is None.

    Raises: OSError when the file cannot be opened.
    """
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    except OSError as error:
        return True if error.errno == errno.EAGAIN else None
    finally:
        os.close(fd)
    return False
