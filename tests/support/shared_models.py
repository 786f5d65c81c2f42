"""Real files for development and CI that lie beside the checkout; tests that need them are skipped without."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

_ROOT = Path(__file__).resolve().parents[2]
# Read at import: while a test runs, the product's variables are out of its environment.
_FOLDER = Path(os.environ.get("LMD_SHARED_MODELS") or _ROOT.parent / "shared" / "models")


def shared_model(name: str) -> Path:
    """The path of a shared file such as ``vocab/ggml-vocab-phi-3.gguf``; skips the test when it is not there."""
    path = _FOLDER / name
    if not path.is_file():
        pytest.skip(f"needs {name}, which lies in shared/models beside the checkout (or in LMD_SHARED_MODELS)")
    return path
