from __future__ import annotations

import io
from pathlib import Path

import pytest

from lmd.registry.errors import InvalidRequest
from lmd.registry.gguf import GgufHeader, read_header
from lmd.registry.imatrix import imatrix_entries
from lmd.registry.lm_config import LmConfig, Origin
from lmd.registry.quantization import QUANT_TYPES, QuantizePlan, parse_quant_type, plan_quantization
from tests.support.imatrices import make_imatrix
from tests.support.tiny_models import make_tiny_llama


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> GgufHeader:
    """Rows of 256 and 512, which suit every type."""
    return header_of(make_tiny_llama(tmp_path_factory.mktemp("m") / "w.gguf", n_embd=256, n_ff=512))


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> GgufHeader:
    """Rows of 64 and 128."""
    return header_of(make_tiny_llama(tmp_path_factory.mktemp("m") / "n.gguf"))


def header_of(path: Path) -> GgufHeader:
    data = path.read_bytes()
    return read_header(io.BytesIO(data), len(data))


def plan(header: GgufHeader, kind: str, **options: bool) -> QuantizePlan:
    wanted = {"requantize": False, "with_imatrix": False} | options
    return plan_quantization(header, parse_quant_type(kind), header_bytes=header.data_offset, **wanted)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("Q4_K_M", "Q4_K_M"),
        ("q4_k_m", "Q4_K_M"),
        (" Q4_K ", "Q4_K_M"),
        ("q5_k", "Q5_K_M"),
        ("bf16", "BF16"),
        ("fp16", "F16"),
    ],
)
def test_types_are_named_as_llama_cpp_names_them(text: str, name: str) -> None:
    assert parse_quant_type(text).name == name


@pytest.mark.parametrize("text", ["", "Q9", "Q4_K_XXL", "4bit", "Q8_1", "NVFP4", "\x1b[31m", "Q4_0" * 100])
def test_an_unknown_type_is_refused_with_the_legal_ones(text: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_quant_type(text)
    assert caught.value.metadata["field"] == "quantize"
    assert caught.value.hint.startswith("legal are F32, F16, BF16, Q8_0, ")
    assert "\x1b" not in caught.value.message
    assert len(caught.value.message) < 100


def test_names_and_numbers_are_unique() -> None:
    assert len({kind.name for kind in QUANT_TYPES}) == len({kind.number for kind in QUANT_TYPES}) == len(QUANT_TYPES)


def test_a_plan_says_what_there_is(wide: GgufHeader) -> None:
    made = plan(wide, "Q4_K_M")
    assert (made.source, made.requantizes, made.warnings) == ("F32", False, ())
    assert made.read_bytes == wide.weights_bytes
    assert wide.weights_bytes // 8 < made.output_bytes < wide.weights_bytes // 2 + (1 << 20)


def test_the_type_there_is_already(wide: GgufHeader) -> None:
    with pytest.raises(InvalidRequest, match="the model is F32 already"):
        plan(wide, "F32")


def test_a_type_without_a_matrix_that_it_suits(narrow: GgufHeader) -> None:
    with pytest.raises(InvalidRequest) as caught:
        plan(narrow, "Q4_K_M")
    assert "packs 256 weights of a row" in caught.value.message
    assert "`token_embd.weight` has rows of 64" in caught.value.message
    assert "Q8_0" in caught.value.hint
    assert "Q6_K" not in caught.value.hint


def test_a_type_that_suits_some_matrices_warns(narrow: GgufHeader) -> None:
    [warning] = plan(narrow, "Q1_0").warnings  # blocks of 128: only the second matrix of the feed-forward parts
    assert "14 of 16 matrices" in warning


def test_types_that_need_an_importance_matrix(wide: GgufHeader) -> None:
    for kind in ("IQ1_S", "IQ2_XXS", "IQ3_XS", "Q2_K_S"):
        with pytest.raises(InvalidRequest, match=f"{kind} needs an importance matrix") as caught:
            plan(wide, kind)
        assert caught.value.metadata["field"] == "imatrix"
        plan(wide, kind, with_imatrix=True)


def test_the_importance_of_columns_is_found(tmp_path: Path, wide: GgufHeader) -> None:
    entries = imatrix_entries(header_of(make_imatrix(tmp_path / "i.gguf", wide)), wide)
    assert {entry.name for entry in entries} == {
        t.name for t in wide.tensors if t.name.startswith("blk.") and len(t.shape) == 2
    }
    down = next(entry for entry in entries if entry.name == "blk.0.ffn_down.weight")
    assert (down.columns, down.matrices) == (512, 1)


def test_an_importance_matrix_of_another_model(tmp_path: Path, wide: GgufHeader, narrow: GgufHeader) -> None:
    header = header_of(make_imatrix(tmp_path / "i.gguf", narrow))
    with pytest.raises(
        InvalidRequest, match=r"has 64 columns there and 256 in the model|has 128 columns there and 512"
    ):
        imatrix_entries(header, wide)


def test_a_model_is_no_importance_matrix(wide: GgufHeader) -> None:
    with pytest.raises(InvalidRequest, match="the file is of the kind `model`"):
        imatrix_entries(wide, wide)


def test_where_weights_come_from_survives() -> None:
    lm = LmConfig(origin=Origin("hf.co/a/b:F16", "c0ffee", "Q4_K_M", "sha256:" + "a" * 64, "sha256:" + "b" * 64))
    assert LmConfig.parse(lm.to_bytes()).origin == lm.origin
    plain = LmConfig(origin=Origin("hf.co/a/b:F16", "c0ffee"))
    assert plain.to_bytes() == b'{"origin":{"commit":"c0ffee","ref":"hf.co/a/b:F16"},"version":1}'
