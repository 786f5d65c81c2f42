"""Whether an adapter fits a model: what can be told from the headers, before anything is loaded.

An adapter has two small matrices A and B for each matrix W that it changes, and W + scale * alpha / rank * B A takes
the place of W. The engine checks shapes in `llama_adapter_lora_init_impl` (llama-adapter.cpp of llama-cpp-python
0.3.36) and refuses what is refused here, but only when the model is loaded, and without saying what it compared.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from lmd.registry.errors import InvalidRequest
from lmd.registry.gguf import GgufArray, GgufHeader

Shape = tuple[int, ...]

_A, _B = ".lora_a", ".lora_b"
# Norms are vectors, to which nothing can be added in this way; the engine leaves such tensors of adapters out.
_LEFT_OUT = "_norm.weight"
# Its rows are looked up rather than multiplied, so the engine wants A with a row for each token.
_EMBEDDINGS = "token_embd.weight"
# Types of tensors that the engine multiplies with nothing: it would end the runner when it first decodes.
_NOT_MULTIPLIED = frozenset(("I8", "I16", "I32", "I64", "F64"))
_INVOCATION = "adapter.alora.invocation_tokens"

_WRONG_KIND = "give a LoRA adapter in GGUF (llama.cpp's `convert_lora_to_gguf.py` makes one)"
_WRONG_BASE = "name the model that the adapter was trained for with FROM"


def check_adapter(filename: str, adapter: GgufHeader, model: Sequence[GgufHeader]) -> None:
    """Make sure that an adapter can be added to the weights of a model, whose shards' headers are *model*.

    Raises:
        InvalidRequest: when it cannot; the message has what the adapter and the model say about the same thing.
    """
    shown = f"ADAPTER `{_text(filename)}`"
    _check_kind(shown, adapter)
    weights = {tensor.name: tensor.shape for header in model for tensor in header.tensors}
    small, large = _halves(shown, adapter)
    if model[0].architecture != adapter.architecture:
        raise _misfit(_other_architecture(shown, adapter, model[0], small, large, weights))
    for name in sorted(small):
        if name not in weights:
            raise _misfit(
                f"{shown} changes `{_text(name)}` of {_size(_changed(name, small[name], large[name]))}, and the model "
                f"has no such matrix{_blocks(model[0].block_count)}"
            )
        mine, its = _changed(name, small[name], large[name]), _whole(weights[name])
        if mine != its:
            raise _misfit(
                f"{shown} changes `{_text(name)}` as one of {_size(mine)}, and the model's is of {_size(its)}"
            )


def _check_kind(shown: str, adapter: GgufHeader) -> None:
    if adapter.kind != "adapter":
        raise _no_adapter(f"{shown} is of the kind `{_text(adapter.kind)}`, not an adapter")
    kind = adapter.text("adapter.type")
    if kind != "lora":
        raise _no_adapter(f"{shown} is an adapter of the type `{_text(kind)}`, and only `lora` is supported")
    tokens = adapter.metadata.get(_INVOCATION)
    if isinstance(tokens, GgufArray) and tokens.length:
        raise _no_adapter(
            f"{shown} starts only after certain tokens (it is an aLoRA), and only those that always apply are supported"
        )


def _halves(shown: str, adapter: GgufHeader) -> tuple[dict[str, Shape], dict[str, Shape]]:
    """Return the shapes of A and B by the names of the matrices they change; for each both are there, and fit."""
    small: dict[str, Shape] = {}
    large: dict[str, Shape] = {}
    for tensor in adapter.tensors:
        if tensor.type_name in _NOT_MULTIPLIED:
            raise _no_adapter(
                f"{shown} has `{_text(tensor.name)}` in the type {tensor.type_name}, which the engine cannot multiply"
            )
        for suffix, found in ((_A, small), (_B, large)):
            if tensor.name.endswith(suffix):
                found[tensor.name.removesuffix(suffix)] = _whole(tensor.shape)
                break
        else:
            if not tensor.name.endswith(_LEFT_OUT):
                raise _no_adapter(f"{shown} has a tensor `{_text(tensor.name)}`, which is no half of a LoRA matrix")
    if alone := sorted(small.keys() ^ large.keys()):
        missing = "B" if alone[0] in small else "A"
        raise _no_adapter(f"{shown} has only one half of `{_text(alone[0])}`: {missing} is missing")
    if not small:
        raise _no_adapter(f"{shown} changes nothing: it has no LoRA matrices")
    for name, a in small.items():
        b = large[name]
        rank = a[0] if name == _EMBEDDINGS else a[1]
        if b[0] != rank or b[2:] != a[2:]:
            raise _no_adapter(
                f"{shown} is damaged: the halves of `{_text(name)}` do not fit, A of {_size(a)} and B of {_size(b)}"
            )
    return small, large


def _other_architecture(
    shown: str,
    adapter: GgufHeader,
    model: GgufHeader,
    small: Mapping[str, Shape],
    large: Mapping[str, Shape],
    weights: Mapping[str, Shape],
) -> str:
    mine, its = (f"`{_text(header.architecture) or 'none'}`" for header in (adapter, model))
    name = min(small.keys() & weights.keys() or small)
    size = _size(_changed(name, small[name], large[name]))
    other = f"one of {_size(_whole(weights[name]))}" if name in weights else f"a width of {model.embedding_length}"
    return (
        f"{shown} is for the architecture {mine} with a `{_text(name)}` of {size}, and the model is of {its} with "
        f"{other}"
    )


def _changed(name: str, a: Shape, b: Shape) -> Shape:
    """Return the shape of the matrix that A and B change, in the order of files: the length of a row first."""
    return (b[1], a[1], *a[2:]) if name == _EMBEDDINGS else (a[0], b[1], *a[2:])


def _whole(shape: Iterable[int]) -> Shape:
    """Return a shape of at least two dimensions, without those of 1 at the end."""
    lengths = list(shape)
    while len(lengths) > 2 and lengths[-1] == 1:
        lengths.pop()
    return tuple(lengths + [1] * (2 - len(lengths)))


def _size(shape: Shape) -> str:
    return " x ".join(str(length) for length in shape)


def _blocks(count: int) -> str:
    return f" in its {count} block{'s' if count > 1 else ''}" if count else ""


def _text(text: str) -> str:
    return ascii(text[:80])[1:-1]


def _no_adapter(message: str) -> InvalidRequest:
    return InvalidRequest(message, field="adapter", hint=_WRONG_KIND)


def _misfit(message: str) -> InvalidRequest:
    return InvalidRequest(message, field="adapter", hint=_WRONG_BASE)
