"""Keys and values in a type that the user chooses: by request, in a Modelfile, for the whole daemon."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.product import Product
from tests.support.tiny_models import make_tiny_llama

pytestmark = pytest.mark.e2e

FEW = ("-o", "num_predict=4", "-o", "temperature=0")


def create(product: Product, name: str, weights: Path, more: str = "") -> None:
    modelfile = weights.with_name(f"{name}.Modelfile")
    modelfile.write_text(f"FROM {weights}\n{more}")
    product.lm("create", name, "-f", str(modelfile))


def memory_of(product: Product, name: str) -> int:
    """Load a model anew, and return what it takes."""
    product.lm("run", name, "we had", *FEW)
    memory = next(int(runner["memory_bytes"]) for runner in product.json("ps") if runner["name"] == f"{name}:latest")
    product.lm("stop", name)
    return memory


@pytest.fixture
def wide(tmp_path: Path) -> Path:
    """A model whose heads have 32 numbers: as many as share a scale."""
    return make_tiny_llama(tmp_path / "wide.gguf", n_ctx=4096, n_embd=128, n_head=4)


def test_a_coarser_type_takes_less_memory(product: Product, wide: Path) -> None:
    product.start()
    create(product, "fine", wide, "PARAMETER kv_type q8_0\n")
    create(product, "coarse", wide, "PARAMETER kv_type q4_0\n")
    # 4 slots of 4096 tokens, 2 layers, keys and values of 128 numbers: 34 or 18 bytes for 32 of them.
    saved = 4 * 4096 * 2 * 2 * 128 * (34 - 18) / 32
    assert memory_of(product, "fine") - memory_of(product, "coarse") == pytest.approx(saved, rel=0.1)


def test_what_a_model_cannot_have_is_refused_by_name(product: Product, tmp_path: Path, wide: Path) -> None:
    product.start()
    create(product, "narrow", make_tiny_llama(tmp_path / "narrow.gguf"))
    create(product, "wide", wide)
    refused = product.lm("run", "narrow", "x", "-o", "kv_type=q8_0", code=2)
    assert "cannot be kept in q8_0: its heads have 16 numbers" in refused.stderr
    assert "`kv_type` must be one of f32, f16" in product.lm("run", "wide", "x", "-o", "kv_type=q9", code=2).stderr
    assert product.json("ps") == []


def test_the_daemons_default_is_for_the_models_that_can_have_it(product: Product, tmp_path: Path, wide: Path) -> None:
    product.start(LMD_RUNTIME_KV_TYPE="q8_0")
    create(product, "narrow", make_tiny_llama(tmp_path / "narrow.gguf"))
    create(product, "wide", wide)
    product.lm("run", "narrow", "we had", *FEW)
    coarse = memory_of(product, "wide")
    product.lm("run", "wide", "we had", "-o", "kv_type=f16", *FEW)
    exact = next(int(runner["memory_bytes"]) for runner in product.json("ps") if runner["name"] == "wide:latest")
    assert exact - coarse > 4 * 4096 * 2 * 2 * 128 * 0.8
