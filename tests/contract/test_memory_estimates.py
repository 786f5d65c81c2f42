"""What a header says a model will take is what the engine takes; `bench.memory_estimates` has more of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from lmd.registry.memory import kv_type_problem
from tests.support.loaded_memory import LoadFailed, measure
from tests.support.memory_estimates import compare, read
from tests.support.shaped_models import SHAPES, Dims, llama


@pytest.mark.parametrize(
    ("name", "kv_type", "num_ctx"),
    [
        ("llama-tied", "f16", 1024),
        ("llama-q4", "q8_0", 1024),
        ("llama-f32", "f16", 512),
        ("gemma3", "q4_0", 4096),
        ("gpt-oss", "f16", 4096),
        ("qwen3moe", "f16", 1024),
        ("deepseek2", "q8_0", 1024),
        ("mamba", "f16", 1024),
        ("granite-hybrid", "q5_1", 1024),
        ("falcon-h1", "bf16", 512),
        ("bert", "f16", 512),
        ("qwen3-embedding", "f16", 1024),
    ],
)
def test_estimates_are_within_the_bars(tmp_path: Path, name: str, kv_type: str, num_ctx: int) -> None:
    row = compare(name, SHAPES[name]().write(tmp_path / "model.gguf"), num_ctx=num_ctx, kv_type=kv_type, slots=3)
    assert row.ok, row


def test_what_the_header_refuses_the_engine_refuses(tmp_path: Path) -> None:
    path = llama(Dims(layers=1, heads=4, kv_heads=4, head=80, width=320, inner=256)).write(tmp_path / "model.gguf")
    assert "80 numbers" in kv_type_problem(read(path), "q8_0")
    with pytest.raises(LoadFailed, match="does not divide n_embd_head_k=80"):
        measure(path, num_ctx=256, kv_type="q8_0")
    # The engine prints MiB with two decimals.
    assert measure(path, num_ctx=256, kv_type="f16").kv_bytes == pytest.approx(2 * 4 * 80 * 2 * 256, abs=5243)


def test_weights_that_are_rearranged_count_once_and_the_rest_is_mapped(tmp_path: Path) -> None:
    path = SHAPES["llama-q4"]().write(tmp_path / "model.gguf")
    weights_bytes = read(path).weights_bytes
    mapped, read_in = (measure(path, num_ctx=256, use_mmap=use_mmap) for use_mmap in (True, False))
    assert mapped.weights_bytes == pytest.approx(weights_bytes, rel=0.01)
    assert read_in.weights_bytes == pytest.approx(weights_bytes, rel=0.01)
    assert read_in.mapped_bytes == 0
    assert 0 < mapped.mapped_bytes <= mapped.weights_bytes
