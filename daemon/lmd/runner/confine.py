"""What a child process gives up before it touches anything it was sent.

Called first thing in a runner and in its render child. Nothing here needs privileges.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import stat

# <linux/prctl.h>
_PR_SET_PDEATHSIG = 1
_PR_SET_NO_NEW_PRIVS = 38

_OOM_SCORE_STEP = 500
_OOM_SCORE_MAX = 1000


def tie_to_parent() -> None:
    """Have the kernel kill this process when its parent dies.

    The parent may be gone before the call; a caller notices that as end of file on its socket. The signal follows the
    *thread* that started this process, so the parent must start it from a thread that lives as long as it does.
    """
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def drop_rights() -> None:
    """Gain no rights from now on, leave no core dump, be the first to go when memory runs out, ignore Ctrl-C."""
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Not fatal: only Linux has the file, and a container may hide it.
    with contextlib.suppress(OSError, ValueError), open("/proc/self/oom_score_adj", "r+") as file:
        score = min(int(file.read()) + _OOM_SCORE_STEP, _OOM_SCORE_MAX)
        file.seek(0)
        file.write(str(score))


def never_block_on_stderr() -> None:
    """Let log lines get lost rather than stop the process when nobody reads the pipe behind stderr."""
    with contextlib.suppress(OSError):
        if stat.S_ISFIFO(os.fstat(2).st_mode):
            os.set_blocking(2, False)


def _prctl(option: int, argument: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, ctypes.c_ulong(argument), ctypes.c_ulong(0), ctypes.c_ulong(0), ctypes.c_ulong(0)) != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"prctl({option}): {os.strerror(error)}")
