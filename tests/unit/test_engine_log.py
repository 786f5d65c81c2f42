"""The engine calls its log for as long as the process lives, whoever has set it.

llama.cpp has one log callback for the process. It went with the object that had set it, and the next load anywhere in
the process jumped to freed memory.
"""

from __future__ import annotations

import subprocess
import sys
import textwrap

from tests.support.shared_models import STORIES

SCRIPT = """
    import gc
    import sys

    from lmd.runner.log import EngineLog
    from lmd.runner.native import load_bindings

    llama = load_bindings()
    log = EngineLog(llama)
    del log
    gc.collect()
    # What was freed is given to others.
    others = [llama.llama_log_callback(lambda level, text, data: sys.exit("another's callback")) for _ in range(50)]
    del others
    gc.collect()
    params = llama.llama_model_default_params()
    params.vocab_only = True
    assert llama.llama_model_load_from_file(sys.argv[1].encode(), params)
    print("loaded")
"""


def test_a_log_outlives_the_object_that_has_set_it() -> None:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SCRIPT), str(STORIES)], capture_output=True, text=True, timeout=50
    )
    assert (done.returncode, done.stdout) == (0, "loaded\n"), done.stderr[-500:]
