"""A model with a draft, from its Modelfile to its answer."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.product import Product
from tests.support.tiny_models import make_tiny_llama

pytestmark = pytest.mark.e2e

ASK = ["the people", "-o", "num_predict=60", "-o", "temperature=0", "-o", "num_ctx=256", "-o", "ignore_eos=true"]


def test_a_draft_speeds_an_answer_up_and_leaves_it_as_it_is(product: Product, tmp_path: Path) -> None:
    make_tiny_llama(tmp_path / "model.gguf", n_idle=40)
    make_tiny_llama(tmp_path / "small.gguf")
    (tmp_path / "plain.modelfile").write_text("FROM ./model.gguf\n")
    (tmp_path / "fast.modelfile").write_text("FROM plain\nDRAFT ./small.gguf\n")
    product.start()
    for name in ("plain", "fast"):
        product.lm("create", name, "-f", str(tmp_path / f"{name}.modelfile"))
    plain, fast = (product.json("run", name, *ASK) for name in ("plain", "fast"))
    assert fast["response"] == plain["response"] != ""
    assert fast["accepted_tokens"] == fast["drafted_tokens"] > 20
    assert plain["drafted_tokens"] == 0

    shown = product.json("show", "fast")
    assert [file["role"] for file in shown["files"]] == ["weights", "draft"]
    (tmp_path / "again.modelfile").write_text(product.lm("show", "--modelfile", "fast").stdout)
    product.lm("create", "again", "-f", str(tmp_path / "again.modelfile"))
    assert product.json("show", "again")["digest"] == shown["digest"]

    needed = {runner["name"]: runner["memory_bytes"] for runner in product.json("ps")}
    assert needed["fast:latest"] > needed["plain:latest"]
