"""Which adapters fit which models, what a manifest says of them, and how a request names them."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from lmd.daemon.adapter_scales import AdapterFile, check_scales, scale_frames
from lmd.registry.create import create_model
from lmd.registry.errors import InvalidRequest
from lmd.registry.inspect import model_info
from lmd.registry.manifest import Manifest
from lmd.registry.modelfile import parse_modelfile
from tests.support.gguf_bytes import INT32, Tensor, TinyModel, adapter, array, gguf
from tests.support.memory_store import MemoryStore, MemoryTag

MODEL = TinyModel().to_bytes()
Q = "blk.0.attn_q.weight"
LORA = {"general.architecture": "llama", "general.type": "adapter", "adapter.type": "lora"}


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


def create(
    store: MemoryStore, text: str, *, base: MemoryTag | None = None, name: str = "mine", **files: bytes
) -> Manifest:
    digests = {f"./{path}.gguf": store.add(data) for path, data in files.items()}
    tag = create_model(store, name, parse_modelfile(text), files=digests, base=base)
    return store.get_manifest(tag.manifest)


def refusal(store: MemoryStore, data: bytes, model: bytes = MODEL) -> str:
    with pytest.raises(InvalidRequest) as caught:
        create(store, "FROM ./m.gguf\nADAPTER ./x.gguf 0.5", m=model, x=data)
    assert caught.value.metadata == {"field": "adapter"}
    assert caught.value.hint
    assert store.tags == {}
    return caught.value.message


def test_a_manifest_has_its_adapters_in_order_with_their_scales(store: MemoryStore) -> None:
    text = "FROM ./m.gguf\nADAPTER ./b.gguf 0.5\nADAPTER ./a.gguf"
    manifest = create(store, text, m=MODEL, a=adapter(), b=adapter(fill=1, rank=3))
    assert [(layer.filename, layer.scale) for layer in manifest.adapters] == [("b.gguf", 0.5), ("a.gguf", 1.0)]
    tag = store.get_tag("mine:latest")
    assert tag is not None
    facts = model_info(store, tag)
    again = create(store, facts.modelfile, name="again")
    assert again.digest == manifest.digest


def test_another_scale_is_another_model(store: MemoryStore) -> None:
    digests = {
        create(store, f"FROM ./m.gguf\nADAPTER ./x.gguf {scale}", m=MODEL, x=adapter()).digest
        for scale in ("0.5", "1", "1.0", "-1")
    }
    assert len(digests) == 3


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (MODEL, "ADAPTER `x.gguf` is of the kind `model`, not an adapter"),
        (gguf({**LORA, "adapter.type": "ia3"}, [Tensor("a.lora_a", (4, 4))]), "of the type `ia3`, and only `lora`"),
        (gguf({"general.architecture": "llama", "general.type": "adapter"}), "of the type ``"),
        (gguf(LORA, [Tensor("blk.0.attn_q.weight", (4, 4))]), "a tensor `blk.0.attn_q.weight`, which is no half"),
        (gguf(LORA), "it has no LoRA matrices"),
        (gguf(LORA, [Tensor(f"{Q}.lora_a", (32, 2), type_id=26)]), "`blk.0.attn_q.weight.lora_a` in the type I32"),
        (gguf(LORA, [Tensor("blk.0.attn_norm.weight", (4,))]), "it has no LoRA matrices"),
        (gguf(LORA, [Tensor(f"{Q}.lora_a", (32, 2))]), f"only one half of `{Q}`: B is missing"),
        (gguf(LORA, [Tensor(f"{Q}.lora_b", (2, 32))]), f"only one half of `{Q}`: A is missing"),
        (
            gguf(LORA, [Tensor(f"{Q}.lora_a", (32, 2)), Tensor(f"{Q}.lora_b", (3, 32))]),
            f"the halves of `{Q}` do not fit, A of 32 x 2 and B of 3 x 32",
        ),
        (
            adapter(extra={"adapter.alora.invocation_tokens": array(INT32, [5])}),
            "starts only after certain tokens (it is an aLoRA)",
        ),
    ],
)
def test_what_is_no_adapter_is_refused(store: MemoryStore, data: bytes, words: str) -> None:
    assert words in refusal(store, data)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (adapter({Q: (64, 64)}), f"ADAPTER `x.gguf` changes `{Q}` as one of 64 x 64, and the model's is of 32 x 32"),
        (adapter({Q: (32, 16)}), f"ADAPTER `x.gguf` changes `{Q}` as one of 32 x 16, and the model's is of 32 x 32"),
        (
            adapter({Q: (32, 32, 4)}),
            f"ADAPTER `x.gguf` changes `{Q}` as one of 32 x 32 x 4, and the model's is of 32 x 32",
        ),
        (
            adapter({"blk.7.attn_q.weight": (32, 32)}),
            "ADAPTER `x.gguf` changes `blk.7.attn_q.weight` of 32 x 32, and the model has no such matrix in its 1 "
            "block",
        ),
        (
            adapter({Q: (64, 48)}, architecture="qwen2"),
            f"ADAPTER `x.gguf` is for the architecture `qwen2` with a `{Q}` of 64 x 48, and the model is of `llama` "
            "with one of 32 x 32",
        ),
        (
            adapter({"blk.0.ssm_in.weight": (64, 48)}, architecture="mamba"),
            "ADAPTER `x.gguf` is for the architecture `mamba` with a `blk.0.ssm_in.weight` of 64 x 48, and the model "
            "is of `llama` with a width of 32",
        ),
    ],
)
def test_what_was_trained_for_another_model_is_refused_with_both_shapes(
    store: MemoryStore, data: bytes, message: str
) -> None:
    assert refusal(store, data) == message


def test_embeddings_are_adapted_by_the_rows_of_a(store: MemoryStore) -> None:
    # The vocabulary of 16 comes first, in A; the width of 32 in B.
    halves = [Tensor("token_embd.weight.lora_a", (2, 16)), Tensor("token_embd.weight.lora_b", (2, 32))]
    create(store, "FROM ./m.gguf\nADAPTER ./x.gguf", m=MODEL, x=gguf(LORA, halves))
    turned = [Tensor("token_embd.weight.lora_a", (2, 32)), Tensor("token_embd.weight.lora_b", (2, 16))]
    store.tags.clear()
    assert "`token_embd.weight` as one of 16 x 32, and the model's is of 32 x 16" in refusal(store, gguf(LORA, turned))


def test_experts_and_norms_do_not_get_in_the_way(store: MemoryStore) -> None:
    experts = "blk.0.ffn_up_exps.weight"
    model = TinyModel(tensors=[*TinyModel().tensors, Tensor(experts, (32, 64, 4))]).to_bytes()
    create(store, "FROM ./m.gguf\nADAPTER ./x.gguf", m=model, x=adapter({experts: (32, 64, 4)}))
    halves = [Tensor(f"{Q}.lora_a", (32, 2)), Tensor(f"{Q}.lora_b", (2, 32)), Tensor("output_norm.weight", (32,))]
    create(store, "FROM ./m.gguf\nADAPTER ./x.gguf", m=MODEL, x=gguf(LORA, halves))
    store.tags.clear()
    assert "32 x 64 x 2, and the model's is of 32 x 64 x 4" in refusal(store, adapter({experts: (32, 64, 2)}), model)


def adapters(*names: str) -> list[AdapterFile]:
    return [AdapterFile(name, Path(name), 1.0, 1) for name in names]


def test_a_request_names_adapters_by_file_or_number() -> None:
    found = scale_frames(adapters("pirate.gguf", "2", "poet.gguf"), {"poet": 0.5, "pirate.gguf": 0.0, "2": 2.0})
    assert [(each.adapter, each.scale) for each in found] == [(0, 0.0), (1, 2.0), (2, 0.5)]
    # A name wins over a number, and a number is for those that share a name.
    twins = adapters("x.gguf", "x.gguf")
    assert [each.adapter for each in scale_frames(twins, {"2": 1.0, "1": 0.5})] == [0, 1]


@pytest.mark.parametrize(
    ("names", "wanted", "message", "hint"),
    [
        ((), {"x": 1.0}, "the model has no adapters, so none called `x`", "ADAPTER"),
        (("a.gguf", "b.gguf"), {"c": 1.0}, "the model has no adapter called `c`", "it has `a`, `b`"),
        (("a.gguf",), {"0": 1.0}, "the model has no adapter called `0`", "it has `a`"),
        (("a.gguf",), {"2": 1.0}, "the model has no adapter called `2`", "it has `a`"),
        (("a.gguf",), {"\u0661": 1.0}, "the model has no adapter called `\\u0661`", "it has `a`"),
        (("x.gguf", "x.gguf"), {"x": 1.0}, "the model has 2 adapters called `x`", "1 or 2"),
        (("a.gguf",), {"a": 1.0, "1": 0.5}, "the adapter `1` is named twice", ""),
    ],
)
def test_a_name_that_is_none_is_refused(
    names: tuple[str, ...], wanted: dict[str, float], message: str, hint: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        scale_frames(adapters(*names), wanted)
    assert caught.value.message == message
    assert hint in (caught.value.hint or "")
    assert caught.value.metadata == {"field": "adapters"}


@pytest.mark.parametrize("scale", [math.nan, math.inf, -100.5, 101])
def test_scales_have_a_range(scale: float) -> None:
    check_scales({"a": -100.0, "b": 100.0, "c": 0.0})
    with pytest.raises(InvalidRequest, match="must be a number from -100 to 100"):
        check_scales({"a": scale})
