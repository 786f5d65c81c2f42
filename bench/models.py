"""The model that serving is measured with: 0.4 B parameters of noise, in the format and quantization people run.

    python -m bench.models

A llama of 23 layers with grouped heads and tied embeddings, as small Llama 3 models have them, quantized to Q4_K_M.
What it says is noise, but what it costs is not: every matrix is read for every token. It never ends by itself and says
only words of plain letters, so that N new tokens are N new tokens, each with a text, whichever server it runs in.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.support.tiny_models import CHATML, WORDS

N_LAYER, N_EMBD, N_HEAD, N_HEAD_KV, N_FF, N_CTX = 23, 1024, 16, 8, 2816, 32768
VOCAB_SIZE = 128_256
SEED = 20_261_125
#: As `write_plain` writes it.
_NAME = "noise 0.4B"

_VOCAB_FILE = Path(__file__).resolve().parents[2] / "shared" / "models" / "vocab" / "ggml-vocab-llama-bpe.gguf"
_SPECIALS = ("<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>")

LLAMA_3 = (
    "{{- bos_token }}{%- for message in messages %}"
    "{{ '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' + message.content + '<|eot_id|>' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)


def cache_directory() -> Path:
    """Return where models and peers are kept between runs; the same place as in tools/build_llama_server.sh."""
    if given := os.environ.get("LM_BENCH_CACHE"):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lm-bench"


def benchmark_model() -> Path:
    """Return the model's file, made on first use: about a minute, 2.5 GB of memory, 0.3 GB of disk in the end."""
    directory = cache_directory() / "models"
    path = directory / f"noise-0.4B-Q4_K_M-{_content_key()}.gguf"
    if path.exists():
        return path
    directory.mkdir(parents=True, exist_ok=True)
    print(f"making the benchmark model {path}", file=sys.stderr)
    plain, unfinished = path.with_suffix(".f16"), path.with_suffix(".partial")
    try:
        # Each step in a process of its own: neither its memory nor the engine is left in the one that measures.
        for step, *files in (("write", plain), ("quantize", plain, unfinished)):
            command = [sys.executable, "-m", "bench.models", "--step", step, *map(str, files)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"cannot {step} the model\n{done.stderr[-2000:]}")
        unfinished.rename(path)
    finally:
        plain.unlink(missing_ok=True)
        unfinished.unlink(missing_ok=True)
    return path


def benchmark_models(count: int) -> list[Path]:
    """Return *count* models that cost the same but are different files: copies with other names in their headers."""
    original = benchmark_model()
    return [original, *(_renamed(original, chr(ord("B") + number)) for number in range(1, count))]


def _renamed(original: Path, letter: str) -> Path:
    """Return a copy that says *letter* in the place of its name's last one, made on first use."""
    path = original.with_name(f"{original.stem}-{letter}{original.suffix}")
    if path.exists():
        return path
    unfinished = path.with_suffix(".partial")
    try:
        shutil.copyfile(original, unfinished)
        with unfinished.open("r+b") as file:
            place = file.read(4096).index(_NAME.encode()) + len(_NAME) - 1
            file.seek(place)
            file.write(letter.encode())
        unfinished.rename(path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path


def _content_key() -> str:
    """Return what changes when the model would: how it is written, the tokenizer, the engine that quantizes."""
    shape = (N_LAYER, N_EMBD, N_HEAD, N_HEAD_KV, N_FF, N_CTX, VOCAB_SIZE, SEED)
    how = [inspect.getsource(part) for part in (write_plain, _real_tokenizer, _synthetic_tokenizer, _spoken)]
    tokenizer = str(_VOCAB_FILE.stat().st_size) if _VOCAB_FILE.exists() else "synthetic"
    known = "\0".join([*map(str, shape), *how, tokenizer, version("llama-cpp-python")])
    return hashlib.sha256(known.encode()).hexdigest()[:12]


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """Metadata of a tokenizer, as keys, values and kinds of GGUF; *spoken* are the tokens that the model may say."""

    fields: list[tuple[str, Any, list[Any]]]
    spoken: list[int]
    chat_template: str


def _real_tokenizer(path: Path) -> Tokenizer:
    import gguf

    reader = gguf.GGUFReader(path)
    fields = [(f.name, f.contents(), f.types) for f in reader.fields.values() if f.name.startswith("tokenizer.")]
    texts = {name: value for name, value, _ in fields}["tokenizer.ggml.tokens"]
    return Tokenizer(fields, _spoken(texts, "Ġ"), LLAMA_3)


def _synthetic_tokenizer() -> Tokenizer:
    """Return a sentencepiece vocabulary of the same size, in which the words that prompts are made of are tokens."""
    from gguf import GGUFValueType as Kind
    from gguf import TokenType

    ordered: dict[str, None] = dict.fromkeys(_SPECIALS)
    ordered.update(dict.fromkeys(f"<0x{byte:02X}>" for byte in range(256)))
    ordered.update(dict.fromkeys("▁abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,!?:;'\"()-"))
    for word in WORDS:
        # All beginnings too: tokens are joined pair by pair.
        ordered.update(dict.fromkeys("▁" + word[:length] for length in range(1, len(word) + 1)))
    ordered.update(dict.fromkeys(f"▁filler-{number}" for number in range(VOCAB_SIZE - len(ordered))))
    texts = list(ordered)
    bytes_end = len(_SPECIALS) + 256
    kinds = [TokenType.UNKNOWN] + [TokenType.CONTROL] * (len(_SPECIALS) - 1) + [TokenType.BYTE] * 256
    kinds += [TokenType.NORMAL] * (VOCAB_SIZE - bytes_end)
    scores = [0.0] * bytes_end + [float(len(text)) for text in texts[bytes_end:]]
    fields: list[tuple[str, Any, list[Any]]] = [
        ("tokenizer.ggml.model", "llama", [Kind.STRING]),
        ("tokenizer.ggml.tokens", texts, [Kind.ARRAY, Kind.STRING]),
        ("tokenizer.ggml.scores", scores, [Kind.ARRAY, Kind.FLOAT32]),
        ("tokenizer.ggml.token_type", [int(kind) for kind in kinds], [Kind.ARRAY, Kind.INT32]),
        ("tokenizer.ggml.bos_token_id", 1, [Kind.UINT32]),
        ("tokenizer.ggml.eos_token_id", 2, [Kind.UINT32]),
        ("tokenizer.ggml.unknown_token_id", 0, [Kind.UINT32]),
        ("tokenizer.ggml.add_bos_token", True, [Kind.BOOL]),
        ("tokenizer.ggml.add_space_prefix", True, [Kind.BOOL]),
    ]
    return Tokenizer(fields, _spoken(texts, "▁"), CHATML)


def _spoken(texts: Sequence[str], space: str) -> list[int]:
    return [
        number
        for number, text in enumerate(texts)
        if text[:1] == space and text[1:].isascii() and text[1:].isalpha() and text[1:].islower()
    ]


def write_plain(path: Path) -> None:
    """Write the model in F16, half precision being what models are published and quantized from."""
    import gguf
    import numpy as np

    tokenizer = _real_tokenizer(_VOCAB_FILE) if _VOCAB_FILE.exists() else _synthetic_tokenizer()
    random = np.random.default_rng(SEED)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("noise 0.4B")
    writer.add_license("mit")
    writer.add_context_length(N_CTX)
    writer.add_embedding_length(N_EMBD)
    writer.add_block_count(N_LAYER)
    writer.add_feed_forward_length(N_FF)
    writer.add_head_count(N_HEAD)
    writer.add_head_count_kv(N_HEAD_KV)
    writer.add_rope_dimension_count(N_EMBD // N_HEAD)
    writer.add_rope_freq_base(500_000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCAB_SIZE)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    for key, value, kinds in tokenizer.fields:
        writer.add_key_value(key, value, kinds[0], kinds[-1] if len(kinds) > 1 else None)
    writer.add_chat_template(tokenizer.chat_template)

    def add(name: str, rows: int, columns: int, *, only: Sequence[int] | None = None) -> None:
        # Larger than a trained model's weights, so that the layers, and with them the context, change the next token.
        weights = random.standard_normal((rows, columns), dtype=np.float32) * np.float32(2.5 / columns**0.5)
        if only is not None:
            # A score of 0 loses against the best of ten thousand.
            weights[np.setdiff1d(np.arange(rows), only)] = 0
        writer.add_tensor(f"{name}.weight", weights.astype(np.float16))

    add("token_embd", VOCAB_SIZE, N_EMBD, only=tokenizer.spoken)
    ones = np.ones(N_EMBD, dtype=np.float32)
    writer.add_tensor("output_norm.weight", ones)
    n_kv = N_EMBD // N_HEAD * N_HEAD_KV
    for layer in range(N_LAYER):
        writer.add_tensor(f"blk.{layer}.attn_norm.weight", ones)
        writer.add_tensor(f"blk.{layer}.ffn_norm.weight", ones)
        for name, rows, columns in (
            ("attn_q", N_EMBD, N_EMBD),
            ("attn_k", n_kv, N_EMBD),
            ("attn_v", n_kv, N_EMBD),
            ("attn_output", N_EMBD, N_EMBD),
            ("ffn_gate", N_FF, N_EMBD),
            ("ffn_up", N_FF, N_EMBD),
            ("ffn_down", N_EMBD, N_FF),
        ):
            add(f"blk.{layer}.{name}", rows, columns)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantize(plain: Path, path: Path) -> None:
    """Quantize to Q4_K_M with the engine's own function."""
    import ctypes

    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M
    code = llama_cpp.llama_model_quantize(str(plain).encode(), str(path).encode(), ctypes.byref(params))
    if code:
        raise RuntimeError(f"the engine cannot quantize {plain} (code {code})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--step", choices=("write", "quantize"), help=argparse.SUPPRESS)
    parser.add_argument("files", nargs="*", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step == "write":
        write_plain(*options.files)
    elif options.step == "quantize":
        quantize(*options.files)
    else:
        print(benchmark_model())


if __name__ == "__main__":
    main()
