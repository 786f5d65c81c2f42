from __future__ import annotations

import io
from collections.abc import Mapping

import pytest

from lmd.registry.gguf import GgufHeader, read_header
from lmd.registry.memory import MemoryEstimate, estimate, kv_type_problem
from tests.support.gguf_bytes import BOOL, INT32, Tensor, TinyModel, Value, array, gguf
from tests.support.shared_models import STORIES

MIB = 1024**2


def header(metadata: Mapping[str, Value], *tensors: Tensor) -> GgufHeader:
    data = gguf(metadata, tensors)
    return read_header(io.BytesIO(data), len(data))


def llama(**over: Value) -> GgufHeader:
    """Llama 3 8B's shape, without its weights."""
    metadata: dict[str, Value] = {
        "general.architecture": "llama",
        "llama.block_count": 32,
        "llama.embedding_length": 4096,
        "llama.feed_forward_length": 14336,
        "llama.attention.head_count": 32,
        "llama.attention.head_count_kv": 8,
        "llama.vocab_size": 128256,
    }
    return header(metadata | {f"llama.{key}": value for key, value in over.items()})


def test_keys_and_values_of_llama_3() -> None:
    """1 GiB for 8192 tokens, as the engine prints for this model."""
    assert estimate(llama(), num_ctx=8192, slots=1).kv_bytes == 1024 * MIB


def test_slots_multiply_the_context() -> None:
    four, one = estimate(llama(), num_ctx=2048, slots=4), estimate(llama(), num_ctx=8192, slots=1)
    assert (four.kv_bytes, four.layers) == (one.kv_bytes, one.layers)


def test_a_model_gets_no_more_context_than_it_was_trained_for() -> None:
    trained = llama(context_length=4096)
    assert estimate(trained, num_ctx=1 << 20, slots=2) == estimate(trained, num_ctx=4096, slots=2)


@pytest.mark.parametrize(
    ("kv_type", "block_bytes"), [("f32", 128), ("bf16", 64), ("q8_0", 34), ("q5_1", 24), ("q4_0", 18)]
)
def test_types_of_keys_and_values(kv_type: str, block_bytes: int) -> None:
    found = estimate(llama(), num_ctx=1024, slots=1, kv_type=kv_type)
    assert found.kv_bytes == 32 * 1024 * 2 * (8 * 128 // 32) * block_bytes


def test_a_type_must_fit_the_heads() -> None:
    assert kv_type_problem(llama(), "q8_0") == ""
    narrow = llama(**{"attention.key_length": 80, "attention.value_length": 80})
    assert kv_type_problem(narrow, "f16") == ""
    assert "80 numbers" in kv_type_problem(narrow, "q8_0")
    grok = shaped("grok")
    assert "flash attention" in kv_type_problem(grok, "q4_0")


def test_the_context_is_rounded_up_to_256_cells() -> None:
    assert estimate(llama(), num_ctx=1, slots=1).kv_bytes == estimate(llama(), num_ctx=256, slots=1).kv_bytes
    assert estimate(llama(), num_ctx=257, slots=1).kv_bytes == 2 * estimate(llama(), num_ctx=1, slots=1).kv_bytes


def test_explicit_head_sizes_win() -> None:
    sized = llama(**{"attention.key_length": 256, "attention.value_length": 128})
    assert estimate(sized, num_ctx=256, slots=1).kv_bytes == 32 * 8 * (256 + 128) * 2 * 256


def test_heads_for_each_layer() -> None:
    varied = llama(**{"attention.head_count_kv": array(INT32, [8, 0, 4] + [2] * 29)})
    assert estimate(varied, num_ctx=256, slots=1).kv_bytes == (8 + 4 + 2 * 29) * 256 * 2 * 256


def test_an_array_that_is_too_short_counts_as_its_largest() -> None:
    short = llama(**{"attention.head_count_kv": array(INT32, [8, 4])})
    assert estimate(short, num_ctx=256, slots=1).kv_bytes == (4 + 8 * 31) * 256 * 2 * 256


def test_without_a_count_all_heads_have_keys() -> None:
    bare = header(
        {"general.architecture": "x", "x.block_count": 2, "x.embedding_length": 64, "x.attention.head_count": 4}
    )
    assert estimate(bare, num_ctx=256, slots=1).kv_bytes == 2 * 4 * 32 * 2 * 256


def shaped(architecture: str, layers: int = 12, **more: Value) -> GgufHeader:
    """A model whose layers with attention keep 2 * 64 numbers for each token."""
    metadata: dict[str, Value] = {
        "block_count": layers,
        "embedding_length": 256,
        "attention.head_count": 4,
        "attention.head_count_kv": 1,
        **more,
    }
    prefixed = {f"{architecture}.{key}": value for key, value in metadata.items()}
    return header({"general.architecture": architecture, **prefixed})


ROW_BYTES = 2 * 64 * 2


def kept_by_layer(found: MemoryEstimate) -> list[int]:
    return [layer.kv_bytes for layer in found.layers]


def test_hybrids_have_attention_in_every_nth_layer() -> None:
    hybrid = shaped("qwen3next", 8, **{"ssm.inner_size": 512, "ssm.state_size": 32, "ssm.conv_kernel": 4})
    state = (3 * 512 + 512 * 32) * 4
    kept = kept_by_layer(estimate(hybrid, num_ctx=1024, slots=3))
    assert kept == [state * 3, state * 3, state * 3, 3 * 1024 * ROW_BYTES] * 2


def test_layers_with_a_window_keep_the_window_and_a_step_for_each_slot() -> None:
    """Three slots with windows of 100 tokens and a step of 512 make 812, rounded up to 1024; the context has 12,288."""
    kept = kept_by_layer(estimate(shaped("gemma3", 6, **{"attention.sliding_window": 100}), num_ctx=4096, slots=3))
    assert kept == [1024 * ROW_BYTES] * 5 + [12_288 * ROW_BYTES]


def test_a_window_never_keeps_more_than_the_context() -> None:
    found = estimate(shaped("gemma3", 6, **{"attention.sliding_window": 4096}), num_ctx=256, slots=2)
    assert kept_by_layer(found) == [512 * ROW_BYTES] * 6


@pytest.mark.parametrize(
    ("architecture", "more", "pattern"),
    [
        ("gemma2", {}, "wsws"),
        ("gpt-oss", {"attention.sliding_window": 128}, "wsws"),
        ("cohere2", {"attention.sliding_window": 128}, "wwws"),
        ("smallthinker", {"attention.sliding_window": 128}, "swww"),
        ("gemma3", {"attention.sliding_window": 128, "attention.sliding_window_pattern": 2}, "wsws"),
        (
            "gemma4",
            {"attention.sliding_window": 128, "attention.sliding_window_pattern": array(BOOL, [1, 0, 0, 1])},
            "wssw",
        ),
        # Stated, and not used by the engine.
        ("phi3", {"attention.sliding_window": 128}, "ssss"),
        ("qwen2", {"attention.sliding_window": 128}, "ssss"),
        ("gemma3", {}, "ssss"),
    ],
)
def test_which_layers_have_a_window(architecture: str, more: dict[str, Value], pattern: str) -> None:
    """`w` is a layer with a window, `s` one that sees everything."""
    found = kept_by_layer(estimate(shaped(architecture, 4, **more), num_ctx=65_536, slots=1))
    assert "".join("w" if kept < 65_536 * ROW_BYTES else "s" for kept in found) == pattern


def test_layers_that_look_at_keys_of_others_keep_none() -> None:
    found = kept_by_layer(estimate(shaped("gemma4", 4, **{"attention.shared_kv_layers": 3}), num_ctx=256, slots=1))
    assert found == [256 * ROW_BYTES, 0, 0, 0]


def test_a_latent_that_all_heads_share_has_no_values_of_its_own() -> None:
    latent = {"attention.key_length": 576, "attention.key_length_mla": 192, "attention.value_length_mla": 128}
    found = estimate(shaped("deepseek2", 2, **latent), num_ctx=256, slots=1)
    assert found.kv_bytes == 2 * 576 * 2 * 256


def test_layers_that_predict_further_tokens_are_not_loaded() -> None:
    shape: dict[str, Value] = {"general.architecture": "glm4moe", "glm4moe.block_count": 2}
    shape |= {"glm4moe.nextn_predict_layers": 1, "glm4moe.attention.head_count": 1, "glm4moe.embedding_length": 64}
    two = header(shape, Tensor("blk.0.attn_q.weight", (64, 64)), Tensor("blk.1.attn_q.weight", (64, 64)))
    found = estimate(two, num_ctx=256, slots=1)
    assert found.weights_bytes == 64 * 64 * 4
    assert [layer.weights_bytes for layer in found.layers] == [64 * 64 * 4, 0]
    assert kept_by_layer(found) == [2 * 64 * 2 * 256, 0]


def test_a_draft_has_one_sequence_and_no_windows() -> None:
    found = estimate(shaped("gemma3", 6, **{"attention.sliding_window": 100}), num_ctx=4096, slots=4, drafts=True)
    assert kept_by_layer(found) == [4096 * ROW_BYTES] * 6


def test_recurrent_state_belongs_to_the_slot_not_the_context() -> None:
    mamba = header(
        {
            "general.architecture": "mamba",
            "mamba.block_count": 24,
            "mamba.embedding_length": 768,
            "mamba.attention.head_count_kv": 0,
            "mamba.ssm.conv_kernel": 4,
            "mamba.ssm.inner_size": 1536,
            "mamba.ssm.state_size": 16,
        }
    )
    state = 24 * (3 * 1536 + 1536 * 16) * 4
    assert estimate(mamba, num_ctx=256, slots=1).kv_bytes == state
    assert estimate(mamba, num_ctx=65536, slots=3).kv_bytes == 3 * state


def test_rwkv_state() -> None:
    rwkv = header(
        {
            "general.architecture": "rwkv7",
            "rwkv7.block_count": 12,
            "rwkv7.embedding_length": 768,
            "rwkv7.attention.head_count": 0,
            "rwkv7.wkv.head_size": 64,
            "rwkv7.token_shift_count": 2,
        }
    )
    assert estimate(rwkv, num_ctx=4096, slots=2).kv_bytes == 2 * 12 * 768 * (2 + 64) * 4


def test_weights_are_exact_over_all_shards() -> None:
    one = header({"general.architecture": "llama"}, Tensor("a", (64, 4)))
    two = header({"split.no": 1}, Tensor("b", (32, 2), 8))
    assert estimate([one, two], num_ctx=256, slots=1).weights_bytes == 64 * 4 * 4 + 2 * 34


def test_the_scratch_memory_grows_with_a_step_and_no_further() -> None:
    small, usual = (estimate(llama(), num_ctx=8192, slots=1, num_batch=size).compute_bytes for size in (64, 512))
    assert small < usual
    # No step is larger than the context.
    assert (
        estimate(llama(), num_ctx=256, slots=1, num_batch=4096).compute_bytes
        == estimate(llama(), num_ctx=256, slots=1, num_batch=256).compute_bytes
    )


def test_the_total_is_the_sum() -> None:
    assert MemoryEstimate(1, 2, 4).total_bytes == 7


@pytest.mark.parametrize("block_count", [0, 2**31 - 1])
def test_absurd_headers_are_estimated_all_the_same(block_count: int) -> None:
    got = estimate(llama(block_count=block_count), num_ctx=4096, slots=4)
    assert got.total_bytes >= 0


def test_a_header_without_anything() -> None:
    assert estimate(header({}), num_ctx=4096, slots=1).kv_bytes == 0


def test_a_real_model() -> None:
    path = STORIES
    with path.open("rb") as file:
        found = estimate(read_header(file, path.stat().st_size), num_ctx=512, slots=1)
    assert found.weights_bytes == 292800 * 4
    assert found.kv_bytes == 5 * 4 * (8 + 8) * 2 * 512


def test_a_tiny_model() -> None:
    data = TinyModel().to_bytes()
    found = estimate(read_header(io.BytesIO(data), len(data)), num_ctx=256, slots=2)
    assert found.kv_bytes == 2 * 16 * 2 * 512


def test_encoder_keeps_nothing_and_reads_texts_whole() -> None:
    """With 100,000 words and texts of 1,000 tokens, the engine keeps 4 bytes for each word and token."""

    def encoder(vocab_size: int) -> GgufHeader:
        shape = {"block_count": 2, "embedding_length": 64, "attention.head_count": 4, "vocab_size": vocab_size}
        return header({"general.architecture": "bert", **{f"bert.{key}": value for key, value in shape.items()}})

    few, many = (estimate(encoder(size), num_ctx=1000, slots=4) for size in (0, 100_000))
    assert few.kv_bytes == many.kv_bytes == 0
    assert many.compute_bytes - few.compute_bytes == pytest.approx(4 * 1000 * 100_000, rel=0.01)
    assert estimate(encoder(0), num_ctx=1000, slots=1) == few


def test_decoder_made_for_embedding_keeps_one_text() -> None:
    one = estimate(llama(), num_ctx=1024, slots=1)
    assert estimate(llama(pooling_type=3), num_ctx=1024, slots=8).kv_bytes == one.kv_bytes
    causal = estimate(llama(pooling_type=3), num_ctx=1024, slots=8).compute_bytes
    assert (
        estimate(llama(**{"pooling_type": 3, "attention.causal": False}), num_ctx=1024, slots=8).compute_bytes > causal
    )


def test_weights_by_where_they_go() -> None:
    """Each tensor of the file counts once: with its layer, before the first one, or after the last one."""
    with STORIES.open("rb") as file:
        parsed = read_header(file, STORIES.stat().st_size)
    found = estimate(parsed, num_ctx=512, slots=1)
    embedding, norm = 512 * 64 * 4, 64 * 4
    # The head is a tensor of its own in this file.
    assert (found.input_bytes, found.output_bytes) == (embedding, embedding + norm)
    assert len(found.layers) == 5
    assert sum(layer.weights_bytes for layer in found.layers) == found.weights_bytes - 2 * embedding - norm
    assert sum(layer.kv_bytes for layer in found.layers) == found.kv_bytes
    assert found.active_bytes == found.weights_bytes - embedding


def test_a_tied_head_is_a_copy_on_an_accelerator() -> None:
    shape: dict[str, Value] = {"general.architecture": "llama", "llama.block_count": 1, "llama.embedding_length": 32}
    tied = header(shape, Tensor("token_embd.weight", (32, 100)), Tensor("output_norm.weight", (32,)))
    found = estimate(tied, num_ctx=256, slots=1)
    assert (found.weights_bytes, found.input_bytes) == (3200 * 4 + 128, 3200 * 4)
    assert found.output_bytes == found.active_bytes == 3200 * 4 + 128


def test_a_token_reads_the_experts_that_it_uses() -> None:
    shape: dict[str, Value] = {"general.architecture": "qwen3moe", "qwen3moe.block_count": 1}
    experts = {"qwen3moe.expert_count": 8, "qwen3moe.expert_used_count": 2}
    tensors = (Tensor("blk.0.ffn_up_exps.weight", (32, 4, 8)), Tensor("blk.0.attn_q.weight", (32, 32)))
    found = estimate(header(shape | experts, *tensors), num_ctx=256, slots=1)
    assert found.layers[0].weights_bytes == (32 * 4 * 8 + 32 * 32) * 4
    assert found.active_bytes == (32 * 4 * 2 + 32 * 32) * 4
