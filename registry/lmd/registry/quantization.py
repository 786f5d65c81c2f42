"""Quantizations that can be made: their names, and whether one suits a model.

Source: ``tools/quantize/quantize.cpp`` and ``llama-quant.cpp`` of llama.cpp as vendored in llama-cpp-python 0.3.36. A
test makes every one of them with the installed engine.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

from lmd.registry.errors import InvalidRequest
from lmd.registry.gguf import GgufHeader, TensorInfo
from lmd.registry.gguf_types import FULL_PRECISION, TENSOR_TYPES

FIELD = "quantize"

_BY_NAME = {kind.name: kind for kind in TENSOR_TYPES.values()}
_F32_BYTES = 4
#: What the quantizer adds at most to the header: names of its own, and padding.
_HEADER_SLACK_BYTES = 1 << 20
_SMALL_ITEMS = 1 << 16
#: Recipes give some matrices of the blocks more bits than most: Q2_K and Q3_K_L, the most generous, a quarter more.
_MIXED = 1.3


@dataclass(frozen=True, slots=True)
class QuantType:
    """A recipe of the quantizer.

    *number* is its ``llama_ftype``; *main* is the tensor type that most matrices get, *wide* the widest one that some
    of them get instead. Recipes that need an importance matrix are refused without one.
    """

    name: str
    number: int
    main: str
    wide: str
    needs_imatrix: bool = False


QUANT_TYPES: tuple[QuantType, ...] = (
    QuantType("F32", 0, "F32", "F32"),
    QuantType("F16", 1, "F16", "F16"),
    QuantType("BF16", 32, "BF16", "BF16"),
    QuantType("Q8_0", 7, "Q8_0", "Q8_0"),
    QuantType("Q6_K", 18, "Q6_K", "Q8_0"),
    QuantType("Q5_K_M", 17, "Q5_K", "Q8_0"),
    QuantType("Q5_K_S", 16, "Q5_K", "Q8_0"),
    QuantType("Q5_1", 9, "Q5_1", "Q8_0"),
    QuantType("Q5_0", 8, "Q5_0", "Q8_0"),
    QuantType("Q4_K_M", 15, "Q4_K", "Q8_0"),
    QuantType("Q4_K_S", 14, "Q4_K", "Q8_0"),
    QuantType("Q4_1", 3, "Q4_1", "Q8_0"),
    QuantType("Q4_0", 2, "Q4_0", "Q8_0"),
    QuantType("IQ4_NL", 25, "IQ4_NL", "Q8_0"),
    QuantType("IQ4_XS", 30, "IQ4_XS", "Q8_0"),
    QuantType("Q3_K_L", 13, "Q3_K", "Q8_0"),
    QuantType("Q3_K_M", 12, "Q3_K", "Q8_0"),
    QuantType("Q3_K_S", 11, "Q3_K", "Q8_0"),
    QuantType("IQ3_M", 27, "IQ3_S", "Q8_0"),
    QuantType("IQ3_S", 26, "IQ3_S", "Q8_0"),
    QuantType("IQ3_XS", 22, "IQ3_S", "Q8_0", needs_imatrix=True),
    QuantType("IQ3_XXS", 23, "IQ3_XXS", "Q8_0", needs_imatrix=True),
    QuantType("Q2_K", 10, "Q2_K", "Q8_0"),
    QuantType("Q2_K_S", 21, "Q2_K", "Q8_0", needs_imatrix=True),
    QuantType("IQ2_M", 29, "IQ2_S", "Q8_0", needs_imatrix=True),
    QuantType("IQ2_S", 28, "IQ2_XS", "Q8_0", needs_imatrix=True),
    QuantType("IQ2_XS", 20, "IQ2_XS", "Q8_0", needs_imatrix=True),
    QuantType("IQ2_XXS", 19, "IQ2_XXS", "Q8_0", needs_imatrix=True),
    QuantType("IQ1_M", 31, "IQ1_M", "Q8_0", needs_imatrix=True),
    QuantType("IQ1_S", 24, "IQ1_S", "Q8_0", needs_imatrix=True),
    QuantType("Q2_0", 41, "Q2_0", "Q8_0"),
    QuantType("Q1_0", 40, "Q1_0", "Q8_0"),
    QuantType("TQ2_0", 37, "TQ2_0", "Q8_0"),
    QuantType("TQ1_0", 36, "TQ1_0", "Q8_0"),
    # Only the experts become MXFP4; everything else becomes Q8_0.
    QuantType("MXFP4_MOE", 38, "Q8_0", "Q8_0"),
)
"""From the most faithful to the smallest, about."""

_ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M", "FP16": "F16", "FP32": "F32", "MXFP4": "MXFP4_MOE"}
_TYPES = {kind.name: kind for kind in QUANT_TYPES}


def parse_quant_type(text: str, *, field: str = FIELD) -> QuantType:
    """Return the quantization *text* names, in any case; Q4_K means Q4_K_M, as llama.cpp has it.

    Raises:
        InvalidRequest: when there is none; the hint lists the legal ones.
    """
    name = text.strip().upper()
    kind = _TYPES.get(_ALIASES.get(name, name))
    if kind is None:
        close = difflib.get_close_matches(name[:32], _TYPES, 2)
        meant = f" (did you mean {' or '.join(close)}?)" if close else ""
        shown = f"`{ascii(text[:32])[1:-1]}`" if text else "an empty value"
        raise InvalidRequest(f"{shown} is no quantization{meant}", field=field, hint=f"legal are {', '.join(_TYPES)}")
    return kind


@dataclass(frozen=True, slots=True)
class QuantizePlan:
    """What a quantization comes to, as far as the headers tell.

    *source* names the quantization there is. *output_bytes* is about the most it can come to, *work_bytes* what the
    largest tensor takes while it is converted. *warnings* are for people.
    """

    kind: QuantType
    source: str
    read_bytes: int
    output_bytes: int
    work_bytes: int
    requantizes: bool
    warnings: tuple[str, ...]


def plan_quantization(
    header: GgufHeader, kind: QuantType, *, header_bytes: int, requantize: bool, with_imatrix: bool
) -> QuantizePlan:
    """Say what quantizing a model takes; *header* is that of all its files, whose own headers have *header_bytes*.

    Raises:
        InvalidRequest: when the model is of that type already, is quantized and *requantize* is not set, has no tensor
            the type suits, or the type needs an importance matrix.
    """
    source = header.quantization
    if source == kind.name:
        raise InvalidRequest(f"the model is {kind.name} already", field=FIELD, hint="choose another type")
    quantized = sorted({tensor.type_name for tensor in header.tensors} - FULL_PRECISION - _INTEGERS)
    if quantized and not requantize:
        raise InvalidRequest(
            f"the model is quantized already ({source}); quantizing it again loses more than quantizing the original",
            field=FIELD,
            hint="start from its F16, BF16 or F32 file, or do it nevertheless with `--requantize`",
        )
    if kind.needs_imatrix and not with_imatrix:
        raise InvalidRequest(
            f"{kind.name} needs an importance matrix",
            field="imatrix",
            hint="give the GGUF file that `llama-imatrix` makes with `--imatrix`, or choose a type such as Q4_K_M",
        )
    warnings = [*_shape_warnings(header, kind)]
    if quantized:
        warnings.append(f"quantizing {source} again loses more than quantizing the original would")
    return QuantizePlan(
        kind=kind,
        source=source,
        read_bytes=header.weights_bytes,
        output_bytes=header_bytes + _HEADER_SLACK_BYTES + sum(_at_most(tensor, kind) for tensor in header.tensors),
        work_bytes=max((tensor.item_count * _F32_BYTES + tensor.size_bytes for tensor in header.tensors), default=0),
        requantizes=bool(quantized),
        warnings=tuple(warnings),
    )


_INTEGERS = frozenset({"I8", "I16", "I32", "I64"})


def _shape_warnings(header: GgufHeader, kind: QuantType) -> list[str]:
    """Say how many matrices cannot be of the type. Raises: InvalidRequest when none can."""
    block_items = _BY_NAME[kind.main].block_items
    matrices = [tensor for tensor in header.tensors if len(tensor.shape) >= 2]
    odd = [tensor for tensor in matrices if tensor.shape[0] % block_items]
    if not odd:
        return []
    example = f"`{odd[0].name[:64]}` has rows of {odd[0].shape[0]}"
    if len(odd) == len(matrices):
        suited = [other.name for other in QUANT_TYPES if _suits(matrices, other) and not other.needs_imatrix]
        raise InvalidRequest(
            f"{kind.name} does not suit this model: it packs {block_items} weights of a row, and no matrix has rows of "
            f"a multiple of that ({example})",
            field=FIELD,
            hint=f"types that suit it: {', '.join(suited)}",
        )
    return [
        f"{len(odd)} of {len(matrices)} matrices do not have rows of a multiple of {block_items} ({example}); they get "
        "a type that takes more space"
    ]


def _suits(matrices: Sequence[TensorInfo], kind: QuantType) -> bool:
    block_items = _BY_NAME[kind.main].block_items
    return any(tensor.shape[0] % block_items == 0 for tensor in matrices)


def _at_most(tensor: TensorInfo, kind: QuantType) -> int:
    """Return about the most bytes a tensor takes afterwards: vectors stay F32, matrices may get a wider type."""
    if len(tensor.shape) < 2 or tensor.type_name in _INTEGERS:
        return max(tensor.size_bytes, tensor.item_count * _F32_BYTES)
    row, main, wide = tensor.shape[0], _BY_NAME[kind.main], _BY_NAME[kind.wide]
    fitting = next(fit for fit in (wide, _BY_NAME["F16"]) if row % fit.block_items == 0)
    packed_bytes = tensor.item_count // fitting.block_items * fitting.block_bytes
    if tensor.name.startswith("blk.") and row % main.block_items == 0:
        mixed_bytes = int(tensor.item_count // main.block_items * main.block_bytes * _MIXED)
        packed_bytes = min(packed_bytes, mixed_bytes)
    # Routers, convolutions and the like are left as they are; all of them are small.
    return max(packed_bytes, tensor.size_bytes) if tensor.item_count <= _SMALL_ITEMS else packed_bytes
