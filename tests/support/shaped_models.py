"""Models of real shapes and no weights: the engine loads them and allocates what it would for the real ones.

A file is a whole header and a hole: it takes as much disk as its header has bytes, whatever the model's size. All
weights are zero, so such a model loads and says nothing sensible. Every kind of memory that the engine has is here:
plain attention, grouped heads, sliding windows, experts, a shared latent (MLA), recurrent state, both in one model, and
models that only embed.

Run it for a file to look at: `python -m tests.support.shaped_models gemma3 OUT.gguf`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from tests.support.gguf_bytes import INT32, Tensor, Value, array, gguf

F32, F16, Q8_0, Q4_K = 0, 1, 8, 12
_ALIGNMENT = 32
_SPECIALS = ("<unk>", "<s>", "</s>")


@dataclass(frozen=True)
class Shape:
    """A model's metadata without its architecture's prefix, and its tensors."""

    architecture: str
    metadata: dict[str, Value]
    tensors: list[Tensor]
    vocab_size: int = 32_000
    wordpiece: bool = False

    def write(self, path: Path) -> Path:
        """Write the file, with a hole for the weights."""
        header = gguf(self._metadata(), self.tensors)
        # `gguf` ends with some of the weights: what counts is where they begin and how long they are.
        size_bytes = sum(-(-tensor.size_bytes // _ALIGNMENT) * _ALIGNMENT for tensor in self.tensors)
        begin = len(header) - min(size_bytes, 2**24)
        with path.open("wb") as file:
            file.write(header[:begin])
            file.truncate(begin + size_bytes)
        return path

    def _metadata(self) -> dict[str, Value]:
        prefixed = {f"{self.architecture}.{key}": value for key, value in self.metadata.items()}
        return {"general.architecture": self.architecture, **prefixed, **self._vocabulary()}

    def _vocabulary(self) -> dict[str, Value]:
        specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"] if self.wordpiece else list(_SPECIALS)
        raw = [] if self.wordpiece else [f"<0x{byte:02X}>" for byte in range(256)]
        fillers = [f"w{number}" for number in range(self.vocab_size - len(specials) - len(raw))]
        kinds = [3] * len(specials) + [6] * len(raw) + [1] * len(fillers)
        tokens: dict[str, Value] = {
            "tokenizer.ggml.model": "bert" if self.wordpiece else "llama",
            "tokenizer.ggml.tokens": [*specials, *raw, *fillers],
            "tokenizer.ggml.token_type": array(INT32, kinds),
            "tokenizer.ggml.bos_token_id": 2 if self.wordpiece else 1,
            "tokenizer.ggml.eos_token_id": 3 if self.wordpiece else 2,
            **({"tokenizer.ggml.token_type_count": 2} if self.wordpiece else {}),
        }
        if not self.wordpiece:
            tokens["tokenizer.ggml.scores"] = [0.0] * self.vocab_size
        return tokens


def _weight(name: str, *shape: int, kind: int = F16) -> Tensor:
    return Tensor(f"{name}.weight", shape, F32 if len(shape) == 1 else kind)


def _bias(name: str, *shape: int) -> Tensor:
    return Tensor(f"{name}.bias", shape, F32)


@dataclass(frozen=True)
class Dims:
    """The numbers that most families share; *head* is the length of a key and of a value."""

    layers: int = 4
    width: int = 1024
    heads: int = 16
    kv_heads: int = 4
    head: int = 64
    inner: int = 2816
    vocab: int = 32_000
    train_ctx: int = 32_768
    kind: int = F16

    def metadata(self, **more: Value) -> dict[str, Value]:
        """The keys that every architecture wants; *more* has `__` for dots."""
        return {
            "context_length": self.train_ctx,
            "embedding_length": self.width,
            "block_count": self.layers,
            "feed_forward_length": self.inner,
            "attention.head_count": self.heads,
            "attention.head_count_kv": self.kv_heads,
            "attention.key_length": self.head,
            "attention.value_length": self.head,
            "rope.dimension_count": self.head,
            "attention.layer_norm_rms_epsilon": 1e-5,
            **{key.replace("__", "."): value for key, value in more.items()},
        }

    def ends(self, *, tied: bool = False) -> list[Tensor]:
        """The embedding, the last norm and the head."""
        found = [_weight("token_embd", self.width, self.vocab, kind=self.kind), _weight("output_norm", self.width)]
        return found if tied else [*found, _weight("output", self.width, self.vocab, kind=self.kind)]

    def attention(self, layer: int, *, norms: bool = False, biases: bool = False) -> list[Tensor]:
        """Queries, keys, values and what they become."""
        p, q, kv = f"blk.{layer}.attn_", self.heads * self.head, self.kv_heads * self.head
        found = [
            _weight(p + "norm", self.width),
            _weight(p + "q", self.width, q, kind=self.kind),
            _weight(p + "k", self.width, kv, kind=self.kind),
            _weight(p + "v", self.width, kv, kind=self.kind),
            _weight(p + "output", q, self.width, kind=self.kind),
        ]
        if norms:
            found += [_weight(p + "q_norm", self.head), _weight(p + "k_norm", self.head)]
        if biases:
            found += [_bias(p + "q", q), _bias(p + "k", kv), _bias(p + "v", kv)]
        return found

    def feed_forward(self, layer: int, *, gate: bool = True, inner: int = 0, suffix: str = "") -> list[Tensor]:
        """A dense one."""
        p, inner = f"blk.{layer}.ffn_", inner or self.inner
        found = [
            _weight(f"{p}up{suffix}", self.width, inner, kind=self.kind),
            _weight(f"{p}down{suffix}", inner, self.width, kind=self.kind),
        ]
        if gate:
            found.append(_weight(f"{p}gate{suffix}", self.width, inner, kind=self.kind))
        return found if suffix else [*found, _weight(p + "norm", self.width)]

    def experts(self, layer: int, *, count: int, inner: int, norm: str = "ffn_norm") -> list[Tensor]:
        """A mixture of experts."""
        p = f"blk.{layer}."
        return [
            _weight(p + norm, self.width),
            _weight(p + "ffn_gate_inp", self.width, count, kind=F32),
            _weight(p + "ffn_up_exps", self.width, inner, count, kind=self.kind),
            _weight(p + "ffn_gate_exps", self.width, inner, count, kind=self.kind),
            _weight(p + "ffn_down_exps", inner, self.width, count, kind=self.kind),
        ]


def llama(dims: Dims = Dims(kv_heads=16), *, tied: bool = False, **more: Value) -> Shape:
    """A dense one with as many heads for keys as for queries, unless *dims* says otherwise."""
    tensors = dims.ends(tied=tied)
    for layer in range(dims.layers):
        tensors += dims.attention(layer) + dims.feed_forward(layer)
    return Shape("llama", dims.metadata(**more), tensors, dims.vocab)


def qwen3(dims: Dims = Dims(vocab=150_000), **more: Value) -> Shape:
    """Grouped heads with norms, tied, a large vocabulary."""
    tensors = dims.ends(tied=True)
    for layer in range(dims.layers):
        tensors += dims.attention(layer, norms=True) + dims.feed_forward(layer)
    return Shape("qwen3", dims.metadata(**more), tensors, dims.vocab)


def qwen2(dims: Dims = Dims(kv_heads=2)) -> Shape:
    """Grouped heads with biases."""
    tensors = dims.ends()
    for layer in range(dims.layers):
        tensors += dims.attention(layer, biases=True) + dims.feed_forward(layer)
    return Shape("qwen2", dims.metadata(), tensors, dims.vocab)


def gemma2(dims: Dims = Dims(heads=8, head=128), *, window: int = 1024) -> Shape:
    """Every other layer has a window."""
    return _gemma("gemma2", dims, window, norms=False)


def gemma3(dims: Dims = Dims(layers=13, heads=4, kv_heads=1, head=256, vocab=120_000), *, window: int = 512) -> Shape:
    """Five of six layers have a window."""
    return _gemma("gemma3", dims, window, norms=True)


def _gemma(architecture: str, dims: Dims, window: int, *, norms: bool) -> Shape:
    tensors = dims.ends(tied=True)
    for layer in range(dims.layers):
        tensors += dims.attention(layer, norms=norms) + dims.feed_forward(layer)
        tensors += [_weight(f"blk.{layer}.{name}", dims.width) for name in ("post_attention_norm", "post_ffw_norm")]
    return Shape(architecture, dims.metadata(attention__sliding_window=window), tensors, dims.vocab)


def gpt_oss(dims: Dims = Dims(heads=16, kv_heads=2, head=64), *, window: int = 128, experts: int = 8) -> Shape:
    """Experts, and every other layer has a window."""
    inner = 1024
    tensors = dims.ends()
    for layer in range(dims.layers):
        p, kv = f"blk.{layer}.", dims.kv_heads * dims.head
        tensors += dims.attention(layer, biases=True) + dims.experts(layer, count=experts, inner=inner)
        # The norm before the experts has another name here.
        tensors = [tensor for tensor in tensors if tensor.name != f"{p}ffn_norm.weight"]
        tensors += [_weight(p + "post_attention_norm", dims.width), _weight(p + "attn_sinks", dims.heads)]
        tensors += [_bias(p + "attn_output", dims.width), _bias(p + "ffn_gate_inp", experts)]
        tensors += [_bias(p + "ffn_gate_exps", inner, experts), _bias(p + "ffn_up_exps", inner, experts)]
        tensors += [_bias(p + "ffn_down_exps", dims.width, experts)]
        assert kv
    more: dict[str, Value] = {
        "expert_count": experts,
        "expert_used_count": 4,
        "expert_feed_forward_length": inner,
        "attention__sliding_window": window,
    }
    return Shape("gpt-oss", dims.metadata(**more), tensors, dims.vocab)


def mixtral(dims: Dims = Dims(inner=1792), *, experts: int = 8, used: int = 2) -> Shape:
    """A llama with experts."""
    tensors = dims.ends()
    for layer in range(dims.layers):
        tensors += dims.attention(layer) + dims.experts(layer, count=experts, inner=dims.inner)
    return Shape("llama", dims.metadata(expert_count=experts, expert_used_count=used), tensors, dims.vocab)


def qwen3moe(dims: Dims = Dims(head=128, heads=8), *, experts: int = 64, used: int = 8) -> Shape:
    """Many small experts."""
    tensors, inner = dims.ends(), 256
    for layer in range(dims.layers):
        tensors += dims.attention(layer, norms=True) + dims.experts(layer, count=experts, inner=inner)
    more: dict[str, Value] = {"expert_count": experts, "expert_used_count": used, "expert_feed_forward_length": inner}
    return Shape("qwen3moe", dims.metadata(**more), tensors, dims.vocab)


def deepseek2(dims: Dims = Dims(heads=16, kv_heads=1, head=192), *, experts: int = 16) -> Shape:
    """A latent that all heads share (MLA), experts after one dense layer."""
    latent, rope, nope, value, inner, query = 256, 64, 128, 128, 512, 384
    tensors = dims.ends()
    for layer in range(dims.layers):
        p = f"blk.{layer}.attn_"
        tensors += [
            _weight(p + "norm", dims.width),
            _weight(p + "q_a_norm", query),
            _weight(p + "q_a", dims.width, query),
            _weight(p + "q_b", query, dims.heads * (rope + nope)),
            _weight(p + "kv_a_norm", latent),
            _weight(p + "kv_a_mqa", dims.width, latent + rope),
            _weight(p + "k_b", nope, latent, dims.heads),
            _weight(p + "v_b", latent, value, dims.heads),
            _weight(p + "output", dims.heads * value, dims.width),
        ]
        if layer == 0:
            tensors += dims.feed_forward(layer)
        else:
            tensors += dims.experts(layer, count=experts, inner=inner)
            tensors += dims.feed_forward(layer, inner=inner, suffix="_shexp")
    more: dict[str, Value] = {
        "attention.key_length": latent + rope,
        "attention.value_length": latent,
        "attention.key_length_mla": rope + nope,
        "attention.value_length_mla": value,
        "attention.q_lora_rank": query,
        "attention.kv_lora_rank": latent,
        "rope.dimension_count": rope,
        "leading_dense_block_count": 1,
        "expert_count": experts,
        "expert_used_count": 4,
        "expert_shared_count": 1,
        "expert_feed_forward_length": inner,
        "expert_weights_scale": 1.0,
    }
    return Shape("deepseek2", dims.metadata(**more), tensors, dims.vocab)


def bert(dims: Dims = Dims(layers=6, width=768, heads=12, kv_heads=12, inner=3072, train_ctx=2048)) -> Shape:
    """An encoder: it keeps nothing and embeds."""

    def norm(name: str) -> list[Tensor]:
        return [_weight(name, dims.width), _bias(name, dims.width)]

    tensors = [
        _weight("token_embd", dims.width, dims.vocab),
        _weight("token_types", dims.width, 2),
        _weight("position_embd", dims.width, dims.train_ctx, kind=F32),
        *norm("token_embd_norm"),
    ]
    for layer in range(dims.layers):
        p = f"blk.{layer}."
        for matrix in ("attn_q", "attn_k", "attn_v", "attn_output"):
            tensors += [_weight(p + matrix, dims.width, dims.width), _bias(p + matrix, dims.width)]
        tensors += [_weight(p + "ffn_up", dims.width, dims.inner), _bias(p + "ffn_up", dims.inner)]
        tensors += [_weight(p + "ffn_down", dims.inner, dims.width), _bias(p + "ffn_down", dims.width)]
        tensors += norm(p + "attn_output_norm") + norm(p + "layer_output_norm")
    metadata: dict[str, Value] = {
        "context_length": dims.train_ctx,
        "embedding_length": dims.width,
        "block_count": dims.layers,
        "feed_forward_length": dims.inner,
        "attention.head_count": dims.heads,
        "attention.layer_norm_epsilon": 1e-12,
        "attention.causal": False,
        "pooling_type": 1,
    }
    return Shape("bert", metadata, tensors, dims.vocab, wordpiece=True)


def qwen3_embedding(dims: Dims = Dims(vocab=60_000)) -> Shape:
    """A decoder that was made for embedding."""
    return qwen3(dims, pooling_type=3)


def mamba(dims: Dims = Dims(layers=6)) -> Shape:
    """Recurrent state and no attention."""
    inner, state, rank, conv = 2 * dims.width, 16, dims.width // 16, 4
    tensors = dims.ends(tied=True)
    for layer in range(dims.layers):
        p = f"blk.{layer}."
        tensors += [
            _weight(p + "attn_norm", dims.width),
            _weight(p + "ssm_in", dims.width, 2 * inner),
            _weight(p + "ssm_conv1d", conv, inner, kind=F32),
            _bias(p + "ssm_conv1d", inner),
            _weight(p + "ssm_x", inner, rank + 2 * state),
            _weight(p + "ssm_dt", rank, inner),
            _bias(p + "ssm_dt", inner),
            Tensor(p + "ssm_a", (state, inner), F32),
            Tensor(p + "ssm_d", (inner,), F32),
            _weight(p + "ssm_out", inner, dims.width),
        ]
    metadata: dict[str, Value] = {
        "context_length": dims.train_ctx,
        "embedding_length": dims.width,
        "block_count": dims.layers,
        "feed_forward_length": 0,
        "attention.head_count": 0,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "ssm.conv_kernel": conv,
        "ssm.inner_size": inner,
        "ssm.state_size": state,
        "ssm.time_step_rank": rank,
    }
    return Shape("mamba", metadata, tensors, dims.vocab)


def _mamba2(layer: int, width: int, inner: int, state: int, heads: int, groups: int, conv: int) -> list[Tensor]:
    p, channels = f"blk.{layer}.ssm_", inner + 2 * groups * state
    return [
        _weight(p + "in", width, inner + channels + heads),
        _weight(p + "conv1d", conv, channels, kind=F32),
        _bias(p + "conv1d", channels),
        _bias(p + "dt", heads),
        Tensor(p + "a", (1, heads), F32),
        Tensor(p + "d", (1, heads), F32),
        _weight(p + "norm", inner // groups, groups, kind=F32),
        _weight(p + "out", inner, width),
    ]


def falcon_h1(dims: Dims = Dims()) -> Shape:
    """Attention and recurrent state in every layer."""
    inner, state, heads, groups, conv = dims.width * 3 // 2, 128, 24, 1, 4
    tensors = dims.ends()
    for layer in range(dims.layers):
        tensors += _mamba2(layer, dims.width, inner, state, heads, groups, conv)
        tensors += dims.attention(layer)
        # This one norm has a name without an ending.
        renamed = {f"blk.{layer}.ffn_norm.weight": f"blk.{layer}.ffn_norm"}
        tensors += [replace(part, name=renamed.get(str(part.name), part.name)) for part in dims.feed_forward(layer)]
    return Shape("falcon-h1", dims.metadata(**_ssm(inner, state, heads, groups, conv)), tensors, dims.vocab)


def _ssm(inner: int, state: int, heads: int, groups: int, conv: int) -> dict[str, Value]:
    return {
        "ssm.conv_kernel": conv,
        "ssm.inner_size": inner,
        "ssm.state_size": state,
        "ssm.time_step_rank": heads,
        "ssm.group_count": groups,
    }


def granite_hybrid(dims: Dims = Dims(layers=8)) -> Shape:
    """Attention in every fourth layer, recurrent state in the others."""
    inner, state, heads, groups, conv = 2 * dims.width, 128, 32, 1, 4
    tensors = dims.ends(tied=True)
    counts = [dims.kv_heads if layer % 4 == 3 else 0 for layer in range(dims.layers)]
    for layer, count in enumerate(counts):
        if count:
            tensors += dims.attention(layer)
        else:
            tensors += [_weight(f"blk.{layer}.attn_norm", dims.width)]
            tensors += _mamba2(layer, dims.width, inner, state, heads, groups, conv)
        tensors += dims.feed_forward(layer)
    more = {**_ssm(inner, state, heads, groups, conv), "attention.head_count_kv": array(INT32, counts)}
    return Shape("granitehybrid", dims.metadata(**more), tensors, dims.vocab)


def lfm2(dims: Dims = Dims(layers=8)) -> Shape:
    """Attention in every fourth layer, short convolutions in the others."""
    tensors = [tensor for tensor in dims.ends(tied=True) if tensor.name != "output_norm.weight"]
    tensors.append(_weight("token_embd_norm", dims.width))
    counts = [dims.kv_heads if layer % 4 == 3 else 0 for layer in range(dims.layers)]
    for layer, count in enumerate(counts):
        p = f"blk.{layer}."
        if count:
            tensors += dims.attention(layer, norms=True)
        else:
            tensors += [
                _weight(p + "attn_norm", dims.width),
                _weight(p + "shortconv.conv", 3, dims.width, kind=F32),
                _weight(p + "shortconv.in_proj", dims.width, 3 * dims.width),
                _weight(p + "shortconv.out_proj", dims.width, dims.width),
            ]
        tensors += dims.feed_forward(layer)
    more: dict[str, Value] = {"shortconv.l_cache": 3, "attention.head_count_kv": array(INT32, counts)}
    return Shape("lfm2", dims.metadata(**more), tensors, dims.vocab)


def qwen3next(dims: Dims = Dims(layers=8, heads=8, kv_heads=2, head=128), *, experts: int = 32) -> Shape:
    """Gated delta rule in three of four layers, attention in the fourth, experts in all."""
    keys, values, head, conv, inner = 8, 16, 128, 4, 256
    key_width, value_width = keys * head, values * head
    tensors = dims.ends()
    for layer in range(dims.layers):
        p = f"blk.{layer}."
        tensors.append(_weight(p + "attn_norm", dims.width))
        if layer % 4 == 3:
            q, kv = dims.heads * dims.head, dims.kv_heads * dims.head
            tensors += [
                # Queries and a gate for each.
                _weight(p + "attn_q", dims.width, 2 * q),
                _weight(p + "attn_k", dims.width, kv),
                _weight(p + "attn_v", dims.width, kv),
                _weight(p + "attn_output", q, dims.width),
                _weight(p + "attn_q_norm", dims.head),
                _weight(p + "attn_k_norm", dims.head),
            ]
        else:
            tensors += [
                _weight(p + "attn_qkv", dims.width, 2 * key_width + value_width),
                _weight(p + "attn_gate", dims.width, value_width),
                _weight(p + "ssm_conv1d", conv, 2 * key_width + value_width, kind=F32),
                _bias(p + "ssm_dt", values),
                Tensor(p + "ssm_a", (values,), F32),
                _weight(p + "ssm_ba", dims.width, 2 * values),
                _weight(p + "ssm_norm", head),
                _weight(p + "ssm_out", value_width, dims.width),
            ]
        tensors += dims.experts(layer, count=experts, inner=inner, norm="post_attention_norm")
        tensors += dims.feed_forward(layer, inner=inner, suffix="_shexp")
        tensors.append(_weight(p + "ffn_gate_inp_shexp", dims.width))
    more: dict[str, Value] = {
        **_ssm(value_width, head, values, keys, conv),
        "full_attention_interval": 4,
        "expert_count": experts,
        "expert_used_count": 4,
        "expert_feed_forward_length": inner,
        "expert_shared_feed_forward_length": inner,
    }
    return Shape("qwen3next", dims.metadata(**more), tensors, dims.vocab)


SHAPES: dict[str, Callable[[], Shape]] = {
    "llama": llama,
    "llama-tied": lambda: llama(Dims(), tied=True),
    "llama-q4": lambda: llama(Dims(kind=Q4_K)),
    "llama-f32": lambda: llama(Dims(kind=F32)),
    "qwen2": qwen2,
    "qwen3": qwen3,
    "gemma2": gemma2,
    "gemma3": gemma3,
    "gpt-oss": gpt_oss,
    "mixtral": mixtral,
    "qwen3moe": qwen3moe,
    "deepseek2": deepseek2,
    "bert": bert,
    "qwen3-embedding": qwen3_embedding,
    "mamba": mamba,
    "falcon-h1": falcon_h1,
    "granite-hybrid": granite_hybrid,
    "lfm2": lfm2,
    "qwen3next": qwen3next,
}


def main() -> None:
    """Write one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=sorted(SHAPES))
    parser.add_argument("path", type=Path)
    options = parser.parse_args()
    SHAPES[options.shape]().write(options.path)


if __name__ == "__main__":
    main()
