"""`lm quantize` and `lm create --quantize`, from the command to the answer of the result."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.support.product import Product, wait_until
from tests.support.shared_models import STORIES
from tests.support.tiny_models import make_tiny_llama

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]

ASK = ["the people", "-o", "num_predict=8", "-o", "temperature=0", "-o", "num_ctx=256"]


@pytest.fixture
def wide(product: Product, tmp_path: Path) -> str:
    """The name of a model whose rows suit every type, with settings of its own."""
    make_tiny_llama(tmp_path / "wide-F32.gguf", n_embd=256, n_ff=512)
    (tmp_path / "Modelfile").write_text("FROM ./wide-F32.gguf\nSYSTEM Be brief.\nPARAMETER num_ctx 200\n")
    product.start()
    product.lm("create", "wide", "-f", str(tmp_path / "Modelfile"))
    return "wide"


def staged_bytes(product: Product) -> int:
    """Return the bytes of files that a quantization under way has written."""
    return sum(path.stat().st_size for path in (product.home / "store" / "ingest").glob("tmp-*"))


def test_a_quantized_model_has_everything_but_the_weights(product: Product, wide: str, tmp_path: Path) -> None:
    done = product.lm("quantize", wide, "q4_k_m")
    assert "quantizing F32 to Q4_K_M\n" in done.stderr
    assert done.stderr.endswith("created wide:q4_k_m\n")
    before, after = product.json("show", wide), product.json("show", "wide:q4_k_m")
    assert after["quantization"] == "Q4_K_M"
    assert after["size_bytes"] < before["size_bytes"] / 4
    assert (after["system"], after["parameters"]) == (before["system"], before["parameters"])
    assert after["files"][0]["filename"] == "wide-Q4_K_M.gguf"
    assert after["origin"]["quantize"] == "Q4_K_M"
    assert after["origin"]["quantized_from"] == before["files"][0]["digest"]
    assert product.json("run", "wide:q4_k_m", *ASK)["response"]

    # The same again, from the command and from a Modelfile, is the same model; so is what its Modelfile makes.
    assert product.json("quantize", wide, "Q4_K_M", "--name", "again")["digest"] == after["digest"]
    (tmp_path / "shown").write_text(product.lm("show", "--modelfile", "wide:q4_k_m").stdout)
    assert product.json("create", "shown", "-f", str(tmp_path / "shown"))["digest"] == after["digest"]
    created = product.json("create", "made", "-f", str(tmp_path / "Modelfile"), "--quantize", "q4_k_m")
    assert created["digest"] == after["digest"]


def test_a_modelfile_asks_for_it(product: Product, wide: str, tmp_path: Path) -> None:
    (tmp_path / "Small").write_text("FROM wide\nQUANTIZE q4_k\nPARAMETER temperature 0.5\n")
    product.lm("create", "small", "-f", str(tmp_path / "Small"))
    product.lm("create", "smaller", "-f", str(tmp_path / "Small"), "--quantize", "q2_k")
    small = product.json("show", "small")
    assert (small["quantization"], small["system"]) == ("Q4_K_M", "Be brief.")
    assert product.json("show", "smaller")["quantization"] == "Q2_K"
    # What is of the type already is left as it is.
    (tmp_path / "Same").write_text("FROM small\nQUANTIZE Q4_K_M\n")
    assert product.json("create", "same", "-f", str(tmp_path / "Same"))["digest"] == small["digest"]


def test_the_model_itself_is_replaced_when_its_name_is_given(product: Product, wide: str) -> None:
    product.lm("quantize", wide, "q8_0", "--name", wide)
    assert [(model["name"], model["quantization"]) for model in product.json("ls")] == [("wide:latest", "Q8_0")]


def test_a_comparison(product: Product, tmp_path: Path) -> None:
    (tmp_path / "Modelfile").write_text(f"FROM {STORIES}\n")
    (tmp_path / "text.txt").write_text("Once upon a time there was a little girl. She liked to play. " * 20)
    product.start()
    product.lm("create", "stories", "-f", str(tmp_path / "Modelfile"))
    made = product.json("quantize", "stories", "q8_0", "--text", str(tmp_path / "text.txt"))
    before, after = made["comparison"]
    assert (before["name"], before["quantization"]) == ("stories:latest", "F32")
    assert (after["name"], after["quantization"]) == ("stories:q8_0", "Q8_0")
    assert 1 < before["perplexity"] < 10
    assert after["perplexity"] == pytest.approx(before["perplexity"], rel=0.02)
    assert after["size_bytes"] < before["size_bytes"] / 2
    table = product.lm("quantize", "stories", "q8_0", "--compare").stdout.splitlines()
    assert table[0].split() == "MODEL QUANT SIZE PERPLEXITY PROMPT TOK/S ANSWER TOK/S".split()
    assert [line.split()[0] for line in table[1:]] == ["stories:latest", "stories:q8_0", "change"]
    assert "-6" in table[3]


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["wide", "q9"], 2, "`q9` is no quantization"),
        (["wide", "f32"], 2, "the model is F32 already"),
        (["wide", "iq1_s"], 2, "IQ1_S needs an importance matrix"),
        (["nope", "q8_0"], None, "nope"),
        (["wide", "q8_0", "--name", "hf.co/a/b"], 2, "is no name for a new model"),
        (["wide", "q8_0", "--imatrix", "/nonexistent"], 2, "/nonexistent is no file"),
        (["wide", "q8_0", "--text", "/nonexistent"], 2, "cannot read /nonexistent: No such file or directory"),
        (["wide", "q8_0", "--text", "/dev/null"], 2, "/dev/null is empty"),
    ],
)
def test_bad_requests(product: Product, wide: str, args: list[str], code: int | None, message: str) -> None:
    refused = product.lm("quantize", *args, code=code)
    assert refused.returncode != 0
    assert message in refused.stderr
    assert [model["name"] for model in product.json("ls")] == ["wide:latest"]


def test_quantizing_again_needs_to_be_asked_for(product: Product, wide: str, tmp_path: Path) -> None:
    product.lm("quantize", wide, "q4_k_m")
    refused = product.lm("quantize", "wide:q4_k_m", "q3_k_s", code=2)
    assert "the model is quantized already (Q4_K_M)" in refused.stderr
    assert "--requantize" in refused.stderr
    done = product.lm("quantize", "wide:q4_k_m", "q3_k_s", "--requantize")
    assert "warning: quantizing Q4_K_M again loses more" in done.stderr
    (tmp_path / "Again").write_text("FROM wide:q4_k_m\n")
    assert "quantized already" in product.lm("create", "x", "-f", str(tmp_path / "Again"), "-q", "q2_k", code=2).stderr
    product.lm("create", "x", "-f", str(tmp_path / "Again"), "-q", "q2_k", "--requantize")


@pytest.fixture
def big(product: Product, tmp_path: Path) -> str:
    """The name of a model that takes seconds to quantize to the types with the most work."""
    make_tiny_llama(tmp_path / "big.gguf", n_layer=6, n_embd=768, n_ff=3072)
    (tmp_path / "Modelfile").write_text("FROM ./big.gguf\n")
    product.start()
    product.lm("create", "big", "-f", str(tmp_path / "Modelfile"))
    return "big"


def test_ctrl_c_leaves_nothing(product: Product, big: str) -> None:
    quantizing = product.spawn_lm("quantize", big, "iq3_s")
    wait_until(lambda: staged_bytes(product) > 0, "some of the result is on the disk")
    children = product.daemons[-1].children()
    quantizing.send_signal(signal.SIGINT)
    _, said = quantizing.communicate(timeout=30)
    assert quantizing.returncode == 130
    assert "stopped; nothing was kept" in said
    wait_until(lambda: not any(child.is_running() for child in children), "the child is gone")
    wait_until(lambda: not list((product.home / "store" / "ingest").iterdir()), "its file is gone")
    assert not list((product.home / "run" / "quantize").iterdir())
    assert [model["name"] for model in product.json("ls")] == ["big:latest"]


@pytest.mark.fault
def test_a_child_that_is_killed(product: Product, big: str) -> None:
    quantizing = product.spawn_lm("quantize", big, "iq3_s")
    wait_until(lambda: staged_bytes(product) > 0, "some of the result is on the disk")
    [child] = product.daemons[-1].children()
    child.kill()
    _, said = quantizing.communicate(timeout=30)
    assert quantizing.returncode not in (0, 130)
    assert "its process died (SIGKILL" in said
    assert not list((product.home / "store" / "ingest").iterdir())
    product.lm("quantize", big, "q8_0")


@pytest.mark.fault
def test_a_daemon_that_is_killed(product: Product, big: str) -> None:
    quantizing = product.spawn_lm("quantize", big, "iq3_s")
    wait_until(lambda: staged_bytes(product) > 0, "some of the result is on the disk")
    [child] = product.daemons[-1].children()
    product.daemons[-1].kill()
    quantizing.communicate(timeout=30)
    assert quantizing.returncode != 0
    wait_until(lambda: not child.is_running(), "the child follows its daemon")
    product.start()
    assert not list((product.home / "store" / "ingest").iterdir())
    assert not (product.home / "run" / "quantize").exists() or not os.listdir(product.home / "run" / "quantize")
    assert [model["name"] for model in product.json("ls")] == ["big:latest"]
    assert product.json("gc", "--dry-run", "--grace", "0s")["items"] == []
    product.lm("quantize", big, "q8_0")
