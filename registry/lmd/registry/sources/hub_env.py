"""The environment that `huggingface_hub` needs before it is imported.

It reads its settings once, at import: whoever imports it first decides. So everything that must hold in this process
is set here, and `sources.hub` imports the package late and only after `prepare`.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path

_SETTINGS = {
    # Bytes come over plain HTTP: Xet's client cannot be hashed, limited or cancelled from here.
    "HF_HUB_DISABLE_XET": "1",
    # No usage pings; without this, calls also ask the endpoint for things nobody needs.
    "HF_HUB_DISABLE_TELEMETRY": "1",
    # A daemon must never pick up the token file of the user it happens to run as.
    "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_UPDATE_CHECK": "1",
}

_lock = threading.Lock()
_prepared = False


def prepare(state_dir: Path) -> None:
    """Set the environment; the small files of the package go below *state_dir*. Only the first call has an effect."""
    global _prepared
    with _lock:
        if _prepared:
            return
        os.environ.update(_SETTINGS, HF_HOME=str(state_dir / "hf"))
        _prepared = True
