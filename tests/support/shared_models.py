"""Real model files: a small trained one in the checkout, and tokenizers of well-known models beside it."""

from __future__ import annotations

from pathlib import Path

import pytest

_ROOT = Path(__file__).resolve().parents[2]

#: A trained model of 260 thousand parameters, F32, without a chat template.
STORIES = _ROOT / "tests" / "data" / "stories260K.gguf"


def shared_model(name: str) -> Path:
    """The path of a file such as ``vocab/ggml-vocab-phi-3.gguf``; skips the test when it is not there."""
    path = _ROOT.parent / "shared" / "models" / name
    if not path.is_file():
        pytest.skip(f"needs {name}, which lies in shared/models beside the checkout")
    return path
