"""How `lm` ends: at once, once gRPC is there, and after everything was written."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap


def leave(code: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=50, check=False, env=env
    )


def test_nothing_that_would_wait_at_the_interpreters_end_is_waited_for() -> None:
    """gRPC's streams take a lock in `__del__` that a thread may hold which the interpreter's end has stopped; `lm` hung
    there once in 80 commands.
    """
    done = leave(
        """
        import sys, threading
        from lmd.cli.main import leave

        class Stream:
            def __init__(self):
                self.lock = threading.Lock()
                self.lock.acquire()
                self.itself = self

            def __del__(self):
                self.lock.acquire()

        import grpc
        sys.modules["kept"] = Stream()
        print("said")
        leave(3)
        """
    )
    assert (done.returncode, done.stdout) == (3, "said\n")


def test_what_nobody_reads_any_more_is_no_traceback() -> None:
    done = leave(
        """
        import os, grpc
        from lmd.cli.main import leave
        reader, writer = os.pipe()
        os.dup2(writer, 1)
        os.close(reader)
        os.close(writer)
        print("unread")
        leave(0)
        """
    )
    assert (done.returncode, done.stderr) == (1, "")
