"""Tiny models made on the spot, so that a checkout alone can test what a real model would.

Two kinds, both F32 and byte for byte the same for the same arguments:

- `make_tiny_llama`: random weights. Greedy output is deterministic, depends on the whole prompt, never ends by itself.
- `make_scripted_llama`: a model whose every token is decided by the token before it, so that a test can say which
  tokens come out: words, single bytes of a character, the end token.

`make_tiny_gemma` (sliding window) and `make_tiny_mamba` (recurrent state) have the memories that cannot be cut at will.
`make_tiny_bert` cannot generate: it embeds, or with a classifier it ranks.

Run it to get a file to play with: `python -m tests.support.tiny_models OUT.gguf`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]

WORDS = (
    "the of and to in a is that it was for on are as with his they at be this from have or by one had not but what all "
    "were when we there can an your which their if do will each about how up out them then she many some so these "
    "would other into has more her two like him see time could no make than first been its who now people my made "
    "over did down only way find use may water long little very after words called just where most know get through "
    "back much go good new write our me man too any day same right look think also around another came come work "
    "three word must because does part even place well such here take why things help put years different away again "
    "off went old number great tell men say small every found still between name should home big give air line set own "
    "under read last never us left end along while might next sound below saw something thought both few those always "
    "four five six looked show large often together asked house world going want"
).split()

CHATML = (
    "{%- for message in messages %}"
    "{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{%- endif %}"
)
"""A chat template for models made with `chat_template=CHATML`."""

BOS, EOS = 1, 2
_SPECIALS = ("<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>")
_BYTE_0 = len(_SPECIALS)
_WORDPIECE_SPECIALS = 5


@dataclass(frozen=True, slots=True)
class Vocab:
    """A sentencepiece-like vocabulary: specials, 256 byte tokens, characters, words with all their beginnings."""

    pieces: tuple[str, ...]
    #: How many of the last pieces are special tokens.
    more_specials: int = 0

    def id_of(self, piece: str | int) -> int:
        """Return the id of a piece (`" the"` and `"▁the"` are the same) or of a raw byte."""
        if isinstance(piece, int):
            return _BYTE_0 + piece
        return self.pieces.index(piece.replace(" ", "▁"))


def tiny_vocab(*, texts: Sequence[str] = (), specials: Sequence[str] = ()) -> Vocab:
    """Return the vocabulary all tiny models share, with more *texts* and *specials* at the end."""
    ordered: dict[str, None] = dict.fromkeys(_SPECIALS)
    ordered.update(dict.fromkeys(f"<0x{byte:02X}>" for byte in range(256)))
    ordered.update(dict.fromkeys("▁abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,!?:;'\"()-"))
    for word in WORDS:
        ordered.update(dict.fromkeys("▁" + word[:length] for length in range(1, len(word) + 1)))
    more = [text.replace(" ", "▁") for text in texts] + list(specials)
    return Vocab((*ordered, *more), len(specials))


def make_tiny_llama(
    path: Path,
    *,
    seed: int = 1,
    n_layer: int = 2,
    n_embd: int = 64,
    n_head: int = 4,
    n_ff: int = 128,
    n_ctx: int = 256,
    chat_template: str | None = None,
    byte_output: bool = False,
    name: str = "tiny",
    add_bos: bool = True,
    n_idle: int = 0,
    pooling: gguf.PoolingType | None = None,
    causal: bool = True,
    rerank_template: str | None = None,
    specials: Sequence[str] = (),
    space_prefix: bool = True,
) -> Path:
    """Write a llama of random weights to *path*, with *specials* as more special tokens.

    Without *space_prefix* the tokenizer puts no space before texts, as those of newer models do not.

    With *pooling* it is a model made for embedding; with `RANK` it has a classifier of one score.

    *n_idle* more layers add nothing to what it says, only to what it costs: without them it is its own perfect draft.

    *byte_output* makes it say single bytes instead of words: mostly invalid UTF-8.
    """
    vocab = tiny_vocab(specials=specials)
    random = np.random.default_rng(seed)
    tensors = _llama_tensors(random, len(vocab.pieces), n_layer, n_embd, n_ff)
    _silence(tensors["output.weight"], vocab, byte_output=byte_output)
    for part in [part for part in tensors if part.startswith("blk.0.")]:
        for layer in range(n_layer, n_layer + n_idle):
            tensors[part.replace("blk.0.", f"blk.{layer}.")] = np.zeros_like(tensors[part])
    writer = gguf.GGUFWriter(path, "llama")
    _describe(writer, name, n_ctx=n_ctx, n_embd=n_embd, n_layer=n_layer + n_idle, n_ff=n_ff, n_head=n_head)
    writer.add_rope_dimension_count(n_embd // n_head)
    _add_vocab(writer, vocab, chat_template, add_bos=add_bos, space_prefix=space_prefix)
    if pooling is not None:
        writer.add_pooling_type(pooling)
    if not causal:
        writer.add_causal_attention(False)
    if rerank_template is not None:
        writer.add_string("tokenizer.chat_template.rerank", rerank_template)
    return _write(writer, path, tensors)


def make_tiny_bert(
    path: Path,
    *,
    seed: int = 1,
    n_ctx: int = 128,
    pooling: gguf.PoolingType | None = gguf.PoolingType.MEAN,
    classifier: bool = False,
) -> Path:
    """Write a BERT of random weights with a wordpiece vocabulary; with *classifier* it has a head that ranks."""
    n_embd, n_layer, n_ff, n_head = 64, 2, 128, 4
    pieces = wordpieces()
    make = _maker(np.random.default_rng(seed))

    def norm(name: str) -> dict[str, Array]:
        return {f"{name}.weight": np.ones(n_embd, np.float32), f"{name}.bias": make(1, n_embd)[0]}

    tensors = {
        "token_embd.weight": make(len(pieces), n_embd),
        "token_types.weight": make(2, n_embd),
        "position_embd.weight": make(n_ctx, n_embd),
        **norm("token_embd_norm"),
    }
    for layer in range(n_layer):
        prefix = f"blk.{layer}."
        for matrix in ("attn_q", "attn_k", "attn_v", "attn_output"):
            tensors[f"{prefix}{matrix}.weight"] = make(n_embd, n_embd)
            tensors[f"{prefix}{matrix}.bias"] = make(1, n_embd)[0]
        tensors[prefix + "ffn_up.weight"] = make(n_ff, n_embd)
        tensors[prefix + "ffn_up.bias"] = make(1, n_ff)[0]
        tensors[prefix + "ffn_down.weight"] = make(n_embd, n_ff)
        tensors[prefix + "ffn_down.bias"] = make(1, n_embd)[0]
        tensors |= norm(prefix + "attn_output_norm") | norm(prefix + "layer_output_norm")
    if classifier:
        tensors |= {"cls.weight": make(n_embd, n_embd), "cls.bias": make(1, n_embd)[0]}
        tensors |= {"cls.output.weight": make(1, n_embd), "cls.output.bias": make(1, 1)[0]}
    writer = gguf.GGUFWriter(path, "bert")
    _describe(writer, "tiny-bert", n_ctx=n_ctx, n_embd=n_embd, n_layer=n_layer, n_ff=n_ff, n_head=n_head)
    writer.add_layer_norm_eps(1e-12)
    writer.add_causal_attention(False)
    writer.add_token_type_count(2)
    if pooling is not None:
        writer.add_pooling_type(pooling)
    if classifier:
        writer.add_classifier_output_labels(["LABEL_0"])
    writer.add_tokenizer_model("bert")
    writer.add_token_list(pieces)
    writer.add_token_types(
        [int(gguf.TokenType.CONTROL)] * _WORDPIECE_SPECIALS + [1] * (len(pieces) - _WORDPIECE_SPECIALS)
    )
    writer.add_pad_token_id(0)
    writer.add_unk_token_id(1)
    writer.add_bos_token_id(2)
    writer.add_sep_token_id(3)
    writer.add_mask_token_id(4)
    return _write(writer, path, tensors)


def wordpieces() -> list[str]:
    """Return BERT's vocabulary as llama.cpp wants it: the beginning of a word is marked, not what follows it."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,!?"
    ordered = dict.fromkeys(("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"))
    ordered.update(dict.fromkeys("▁" + letter for letter in letters))
    ordered.update(dict.fromkeys(letters))
    ordered.update(dict.fromkeys("▁" + word for word in WORDS))
    return list(ordered)


def make_scripted_llama(
    path: Path,
    script: Sequence[str | int],
    *,
    loop: bool = False,
    n_ctx: int = 256,
    chat_template: str | None = None,
    name: str = "scripted",
    texts: Sequence[str] = (),
    specials: Sequence[str] = (),
) -> Path:
    """Write a model that answers any prompt with *script*, then ends, or with *loop* begins again.

    A str is a piece of the vocabulary (`" the"`), an int a raw byte. The next token depends only on the last one, so no
    piece may occur twice, and a prompt must not end with a piece of the script. The weights: embeddings are unit
    vectors, the layers add nothing, and the output matrix maps each unit vector to the next token's row.

    *texts* and *specials* are more pieces for the vocabulary, of any length; those with other names of special tokens
    that llama.cpp knows, such as `<|call|>`, get their meaning, too.
    """
    vocab = tiny_vocab(texts=texts, specials=specials)
    size = len(vocab.pieces)
    ids = [vocab.id_of(piece) for piece in script]
    if len(set(ids)) != len(ids):
        raise ValueError("a script cannot say a piece twice")
    n_embd = -(-size // 32) * 32
    head = 32
    tensors = _llama_tensors(np.random.default_rng(0), size, 1, n_embd, 32)
    # One narrow head, and nothing comes out of it: attention costs next to nothing.
    for matrix in ("attn_q", "attn_k", "attn_v"):
        tensors[f"blk.0.{matrix}.weight"] = tensors[f"blk.0.{matrix}.weight"][:head].copy()
    tensors["blk.0.attn_output.weight"] = np.zeros((n_embd, head), dtype=np.float32)
    tensors["blk.0.ffn_down.weight"][:] = 0
    tensors["token_embd.weight"] = np.eye(size, n_embd, dtype=np.float32)
    following = np.full(size, ids[0])
    following[ids] = [*ids[1:], ids[0] if loop else EOS]
    output = np.zeros((size, n_embd), dtype=np.float32)
    output[following, np.arange(size)] = 1
    tensors["output.weight"] = output
    writer = gguf.GGUFWriter(path, "llama")
    _describe(writer, name, n_ctx=n_ctx, n_embd=n_embd, n_layer=1, n_ff=32, n_head=1)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    _add_vocab(writer, vocab, chat_template)
    return _write(writer, path, tensors)


def make_tiny_gemma(path: Path, *, seed: int = 1, n_ctx: int = 256, window: int = 16) -> Path:
    """Write a gemma2 of random weights, every other layer of which sees only the last *window* tokens."""
    vocab = tiny_vocab()
    n_embd, n_layer, n_ff, head = 64, 2, 128, 16
    random = np.random.default_rng(seed)
    tensors = _llama_tensors(random, len(vocab.pieces), n_layer, n_embd, n_ff)
    tensors["token_embd.weight"] = tensors.pop("output.weight")
    _silence(tensors["token_embd.weight"], vocab, byte_output=False)
    for layer in range(n_layer):
        for norm in ("post_attention_norm", "post_ffw_norm"):
            # Gemma ties input and output; louder layers keep it from repeating the last token.
            tensors[f"blk.{layer}.{norm}.weight"] = np.full(n_embd, 16, dtype=np.float32)
    writer = gguf.GGUFWriter(path, "gemma2")
    _describe(writer, "tiny-gemma", n_ctx=n_ctx, n_embd=n_embd, n_layer=n_layer, n_ff=n_ff, n_head=n_embd // head)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_sliding_window(window)
    _add_vocab(writer, vocab, None)
    return _write(writer, path, tensors)


def make_tiny_mamba(path: Path, *, seed: int = 1, n_ctx: int = 256) -> Path:
    """Write a mamba of random weights: its memory is one state a sequence, not a row a token."""
    vocab = tiny_vocab()
    n_embd, n_layer, inner, state, rank, conv = 64, 2, 128, 16, 4, 4
    random = np.random.default_rng(seed)
    make = _maker(random)
    tensors = {
        "token_embd.weight": make(len(vocab.pieces), n_embd),
        "output_norm.weight": np.ones(n_embd, dtype=np.float32),
        "output.weight": make(len(vocab.pieces), n_embd),
    }
    _silence(tensors["output.weight"], vocab, byte_output=False)
    for layer in range(n_layer):
        prefix = f"blk.{layer}."
        tensors[prefix + "attn_norm.weight"] = np.ones(n_embd, dtype=np.float32)
        tensors[prefix + "ssm_in.weight"] = make(2 * inner, n_embd)
        tensors[prefix + "ssm_conv1d.weight"] = make(inner, conv)
        tensors[prefix + "ssm_conv1d.bias"] = np.zeros(inner, dtype=np.float32)
        tensors[prefix + "ssm_x.weight"] = make(rank + 2 * state, inner)
        tensors[prefix + "ssm_dt.weight"] = make(inner, rank)
        tensors[prefix + "ssm_dt.bias"] = np.zeros(inner, dtype=np.float32)
        tensors[prefix + "ssm_a"] = -np.tile(np.arange(1, state + 1, dtype=np.float32), (inner, 1))
        tensors[prefix + "ssm_d"] = np.ones(inner, dtype=np.float32)
        tensors[prefix + "ssm_out.weight"] = make(n_embd, inner)
    writer = gguf.GGUFWriter(path, "mamba")
    _describe(writer, "tiny-mamba", n_ctx=n_ctx, n_embd=n_embd, n_layer=n_layer, n_ff=0, n_head=0)
    writer.add_ssm_conv_kernel(conv)
    writer.add_ssm_inner_size(inner)
    writer.add_ssm_state_size(state)
    writer.add_ssm_time_step_rank(rank)
    _add_vocab(writer, vocab, None)
    return _write(writer, path, tensors)


def split_model(path: Path, shards: int) -> list[Path]:
    """Write the model in *path* again as *shards* files beside it, named as `gguf-split` does, and return them."""
    reader = gguf.GGUFReader(path)
    count = len(reader.tensors)
    per_shard = -(-count // shards)
    architecture = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=per_shard)
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        kind = field.types[0]
        writer.add_key_value(field.name, field.contents(), kind, field.types[-1] if len(field.types) > 1 else None)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data))
    written = _finish(writer)
    if len(written) != shards:
        raise ValueError(f"{count} tensors do not make {shards} shards")
    return written


def _llama_tensors(random: np.random.Generator, size: int, n_layer: int, n_embd: int, n_ff: int) -> dict[str, Array]:
    make = _maker(random)
    ones = np.ones(n_embd, dtype=np.float32)
    tensors = {"token_embd.weight": make(size, n_embd), "output_norm.weight": ones}
    for layer in range(n_layer):
        prefix = f"blk.{layer}."
        tensors[prefix + "attn_norm.weight"] = ones
        for matrix in ("attn_q", "attn_k", "attn_v", "attn_output"):
            tensors[f"{prefix}{matrix}.weight"] = make(n_embd, n_embd)
        tensors[prefix + "ffn_norm.weight"] = ones
        tensors[prefix + "ffn_gate.weight"] = make(n_ff, n_embd)
        tensors[prefix + "ffn_up.weight"] = make(n_ff, n_embd)
        tensors[prefix + "ffn_down.weight"] = make(n_embd, n_ff)
    tensors["output.weight"] = make(size, n_embd)
    return tensors


def _maker(random: np.random.Generator) -> Callable[[int, int], Array]:
    """Return a maker of random matrices; larger than a trained model's, so that context changes the next token."""

    def make(rows: int, columns: int) -> Array:
        return random.standard_normal((rows, columns), dtype=np.float32) * np.float32(2.5 / columns**0.5)

    return make


def _silence(output: Array, vocab: Vocab, *, byte_output: bool) -> None:
    """Zero the rows of tokens that must not be said: a logit of 0 loses against the best of hundreds."""
    first_word = _BYTE_0 + 256
    output[:_BYTE_0] = 0
    if byte_output:
        output[first_word:] = 0
    else:
        output[_BYTE_0:first_word] = 0


def _describe(
    writer: gguf.GGUFWriter, name: str, *, n_ctx: int, n_embd: int, n_layer: int, n_ff: int, n_head: int
) -> None:
    writer.add_name(name)
    writer.add_license("mit")
    writer.add_context_length(n_ctx)
    writer.add_embedding_length(n_embd)
    writer.add_block_count(n_layer)
    writer.add_feed_forward_length(n_ff)
    writer.add_head_count(n_head)
    writer.add_head_count_kv(n_head)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)


def _add_vocab(
    writer: gguf.GGUFWriter,
    vocab: Vocab,
    chat_template: str | None,
    *,
    add_bos: bool = True,
    space_prefix: bool = True,
) -> None:
    kinds = [gguf.TokenType.NORMAL] * len(vocab.pieces)
    kinds[0] = gguf.TokenType.UNKNOWN
    kinds[1:_BYTE_0] = [gguf.TokenType.CONTROL] * (_BYTE_0 - 1)
    kinds[_BYTE_0 : _BYTE_0 + 256] = [gguf.TokenType.BYTE] * 256
    for place in range(len(kinds) - vocab.more_specials, len(kinds)):
        kinds[place] = gguf.TokenType.CONTROL
    writer.add_tokenizer_model("llama")
    writer.add_token_list(list(vocab.pieces))
    # Longer pieces win, so that a known word becomes one token.
    writer.add_token_scores(
        [float(len(piece)) if index >= _BYTE_0 + 256 else 0.0 for index, piece in enumerate(vocab.pieces)]
    )
    writer.add_token_types([int(kind) for kind in kinds])
    writer.add_bos_token_id(BOS)
    writer.add_eos_token_id(EOS)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(add_bos)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(space_prefix)
    if chat_template is not None:
        writer.add_chat_template(chat_template)


def _write(writer: gguf.GGUFWriter, path: Path, tensors: dict[str, Array]) -> Path:
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    _finish(writer)
    return path


def _finish(writer: Any) -> list[Path]:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    paths = [Path(file.name) for file in writer.fout]
    writer.close()
    return paths


def main() -> None:
    """Write a tiny model from the command line."""
    parser = argparse.ArgumentParser(description=make_tiny_llama.__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--embd", type=int, default=64)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--ff", type=int, default=128)
    parser.add_argument("--ctx", type=int, default=256)
    parser.add_argument("--chat", action="store_true", help="with a ChatML template")
    options = parser.parse_args()
    make_tiny_llama(
        options.out,
        seed=options.seed,
        n_layer=options.layers,
        n_embd=options.embd,
        n_head=options.heads,
        n_ff=options.ff,
        n_ctx=options.ctx,
        chat_template=CHATML if options.chat else None,
    )


if __name__ == "__main__":
    main()
