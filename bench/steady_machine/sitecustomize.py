"""Makes `lmd` believe that the machine has LM_BENCH_MACHINE_BYTES of memory and runs nothing but its runners.

Python imports this by its name when its folder is in PYTHONPATH. So what other programs do to the machine's memory
changes nothing in what is measured; what the daemon does with the figures is what it always does.
"""

import contextlib
import os
import sys

if (_machine := os.environ.get("LM_BENCH_MACHINE_BYTES")) and any(part.endswith("/lmd") for part in sys.orig_argv):
    import psutil

    _total = int(_machine)
    _read = psutil.virtual_memory

    def _virtual_memory():  # type: ignore[no-untyped-def]
        held = 0
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                memory = process.memory_info()
                # What is mapped from files is cache, and counts as free.
                held += memory.rss - memory.shared
        return _read()._replace(total=_total, available=max(0, _total - held))

    psutil.virtual_memory = _virtual_memory
