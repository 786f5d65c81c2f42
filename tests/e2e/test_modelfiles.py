"""Modelfiles, from the command line to the store: what they inherit, share, attach, and what is said about bad ones."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from tests.support.product import Product
from tests.support.tiny_models import make_tiny_llama, split_model

pytestmark = pytest.mark.e2e

BASE = '''FROM ./model.gguf
TEMPLATE """{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"""
SYSTEM Be brief.
PARAMETER temperature 0.5
PARAMETER stop a
PARAMETER stop "b b"
MESSAGE user Hi
MESSAGE assistant "Hello "
LICENSE """MIT
with a line"""
REQUIRES 0.14.0
'''


@pytest.fixture
def folder(product: Product, tmp_path: Path) -> Path:
    make_tiny_llama(tmp_path / "model.gguf")
    product.start()
    return tmp_path


def create(product: Product, folder: Path, name: str, text: str | bytes) -> str:
    """Create a model and return what `lm` said."""
    path = folder / f"{name}.modelfile"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return product.lm("create", name, "-f", str(path)).stderr


def make_adapter(path: Path, *, fill: float = 0.0) -> Path:
    """Write a file that says it is a LoRA adapter for a tiny llama."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 4.0)
    for end, shape in (("lora_a", (4, 64)), ("lora_b", (64, 4))):
        writer.add_tensor(f"blk.0.attn_q.weight.{end}", np.full(shape, fill, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_what_is_inherited_overridden_and_taken_away(product: Product, folder: Path) -> None:
    create(product, folder, "base", BASE)
    create(product, folder, "same", "FROM base\n")
    create(product, folder, "other", 'FROM base\nSYSTEM ""\nPARAMETER stop c\nMESSAGE user Bye\nLICENSE Apache\n')
    base, same, other = (product.json("show", name) for name in ("base", "same", "other"))
    assert same["digest"] == base["digest"]
    assert base["requires"] == other["requires"] == "0.14.0"
    assert (base["system"], other["system"]) == ("Be brief.", "")
    assert other["template"] == base["template"] != ""
    assert other["parameters"] == {"temperature": 0.5, "stop": ["c"]}
    assert other["messages"] == [{"role": "user", "content": "Bye"}]
    assert other["licenses"] == ["MIT\nwith a line", "Apache"]
    assert other["files"] == base["files"]


def test_a_shown_modelfile_makes_the_same_digest(product: Product, folder: Path) -> None:
    make_adapter(folder / "a.gguf")
    make_adapter(folder / "my b 2.gguf", fill=1.0)
    create(product, folder, "base", BASE)
    create(product, folder, "adapted", 'FROM base\nADAPTER ./a.gguf 0.5\nADAPTER "./my b 2.gguf"\n')
    create(product, folder, "derived", "FROM adapted\nSYSTEM new\n")
    for name in ("base", "adapted", "derived"):
        shown = product.lm("show", "--modelfile", name).stdout
        product.lm("create", "again", "-f", "-", stdin=shown)
        assert product.json("show", "again")["digest"] == product.json("show", name)["digest"], name
    files = [(f["role"], f["filename"], f.get("scale")) for f in product.json("show", "derived")["files"]]
    assert files == [("weights", "model.gguf", None), ("adapter", "a.gguf", 0.5), ("adapter", "my b 2.gguf", 1.0)]
    create(product, folder, "plain", 'FROM adapted\nADAPTER ""\n')
    assert product.json("show", "plain")["digest"] == product.json("show", "base")["digest"]


def test_shared_weights_are_counted_once(product: Product, folder: Path) -> None:
    create(product, folder, "base", "FROM ./model.gguf\n")
    alone = product.json("du")
    assert [model["shared_bytes"] for model in alone["models"]] == [0]
    create(product, folder, "pirate", "FROM base\nSYSTEM Arr.\n")
    product.lm("cp", "pirate", "twin")
    weights = (folder / "model.gguf").stat().st_size
    used = product.json("du")
    by_name = {model["name"]: model for model in used["models"]}
    assert used["blob_bytes"] - alone["blob_bytes"] < 4096
    assert all(model["shared_bytes"] >= weights for model in by_name.values())
    assert 0 < by_name["base:latest"]["own_bytes"] < 4096
    assert by_name["twin:latest"]["own_bytes"] == by_name["pirate:latest"]["own_bytes"] == 0
    product.lm("rm", "twin")
    listed = {model["name"]: model["own_bytes"] for model in product.json("ls")}
    assert 0 < listed["pirate:latest"] < 4096
    assert "OWN" in product.lm("ls").stdout
    assert "SHARED" in product.lm("du").stdout


@pytest.mark.parametrize("argument", ["./parts", "./parts/", "./parts/model-*.gguf", "first", "each"])
def test_shards(product: Product, folder: Path, argument: str) -> None:
    (folder / "parts").mkdir()
    make_tiny_llama(folder / "parts" / "model.gguf")
    shards = [shard.relative_to(folder) for shard in split_model(folder / "parts" / "model.gguf", 3)]
    (folder / "parts" / "model.gguf").unlink()
    named = {"first": [f"./{shards[0]}"], "each": [f"./{shard}" for shard in reversed(shards)]}
    create(product, folder, "whole", "".join(f"FROM {value}\n" for value in named.get(argument, [argument])))
    files = product.json("show", "whole")["files"]
    assert [file["filename"] for file in files] == ["model.gguf"]
    assert product.json("run", "whole", "the people", "-o", "num_predict=4", "-o", "num_ctx=256")["response"]


def test_utf_16_and_warnings(product: Product, folder: Path) -> None:
    text = "FROM ./model.gguf\nSYSTEM é\x0cè\nPARAMETER num_keep 4\n"
    said = create(product, folder, "wide", b"\xff\xfe" + text.encode("utf-16-le"))
    path = folder / "wide.modelfile"
    assert f"{path}:2:9: U+000C is a control character; it is dropped" in said
    assert f"{path}:3:11: `num_keep` has no effect here" in said
    assert product.json("show", "wide")["system"] == "éè"


def test_every_mistake_is_shown(product: Product, folder: Path) -> None:
    """The details of a failed call have room for a few; that was all that people saw."""
    text = "FROM ./model.gguf\n" + "".join(f"PARAMETER top_k x{number}\n" for number in range(90))
    (folder / "bad.modelfile").write_text(text)
    failed = product.lm("create", "bad", "-f", str(folder / "bad.modelfile"), code=2).stderr
    assert failed.startswith(
        "error: Modelfile line 2: parameter `top_k` must be a whole number, at least 0, not 'x0' (and 89 more)\n"
    )
    for number in range(90):
        assert f"at least 0, not 'x{number}'\n" in failed


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("FROM ./none.gguf", "none.gguf: there is no such file"),
        ("FROM ./*.bin", "*.bin: no file matches it"),
        ("FROM ./empty", "empty: there is no GGUF file in it"),
        ("FROM ./torch", "torch: model.safetensors is not in GGUF"),
        ("FROM ./several", "several: it holds 2 models: a.gguf, b.gguf"),
        ("FROM ./cut-00001-of-00002.gguf", "it is one of 2 parts, and cut-00002-of-00002.gguf is not there"),
        ("FROM ./bad.modelfile", "not a valid GGUF file"),
        ("FROM ./adapter.gguf", "FROM `adapter.gguf` is an adapter, not a model"),
        ("FROM ./model.gguf\nADAPTER none", "none: there is no such file"),
        ("FROM ./model.gguf\nADAPTER ./empty", "empty: it is a directory"),
        ("FROM ./model.gguf\nADAPTER ./model.gguf", "ADAPTER `model.gguf` is of the kind `model`, not an adapter"),
        ("FROM ./model.gguf\nADAPTER ./adapter.gguf\nADAPTER adapter.gguf", "two adapters are the same file"),
        ("FROM ./model.gguf\nPROJECTOR ./adapter.gguf", "`adapter.gguf` is of the kind `adapter`, not a projector"),
        ("FROM ./model.gguf\nREQUIRES 99.0", "the model requires Ollama 99.0, and this daemon answers as"),
        ("FROM ./model.gguf\nFROM ./several/a.gguf", "`model.gguf` and `a.gguf` are both a whole model"),
        ("FROM new", "FROM new is the model that is to be made, and there is none yet"),
        ("FROM ./model.gguf\nDRAFT ./adapter.gguf", "is of the kind `adapter`, not a model"),
        ('FROM ./model.gguf\nLICENSE """\n' + "MIT\n" * 2_600_000 + '"""', "must stay below 4 MiB"),
    ],
)
def test_what_cannot_be_made(product: Product, folder: Path, text: str, message: str) -> None:
    make_adapter(folder / "adapter.gguf")
    for name in ("empty", "torch", "several"):
        (folder / name).mkdir()
    (folder / "torch" / "model.safetensors").write_bytes(b"x")
    make_tiny_llama(folder / "several" / "a.gguf", seed=2)
    make_tiny_llama(folder / "several" / "b.gguf", seed=3)
    (folder / "cut-00001-of-00002.gguf").write_bytes(b"x")
    (folder / "bad.modelfile").write_text(text)
    failed = product.lm("create", "new", "-f", str(folder / "bad.modelfile"), code=None)
    assert failed.returncode in (1, 2)
    assert message in failed.stderr
    assert "error: " in failed.stderr
    assert "internal" not in failed.stderr
    assert product.json("ls") == []


def test_a_model_may_be_made_of_itself(product: Product, folder: Path) -> None:
    """Manifests are whole, so `FROM` its own name is no cycle: it is the model as it was, with something changed."""
    create(product, folder, "me", "FROM ./model.gguf\nSYSTEM one\n")
    create(product, folder, "me", "FROM me\nPARAMETER top_k 5\n")
    create(product, folder, "you", "FROM me\n")
    create(product, folder, "me", "FROM you\nSYSTEM two\n")
    shown = product.json("show", "me")
    assert (shown["system"], shown["parameters"]) == ("two", {"top_k": 5})
    product.lm("rm", "you")
    assert product.json("run", "me", "the people", "-o", "num_predict=4", "-o", "num_ctx=256")["response"]


def test_two_creates_of_one_name_at_once(product: Product, folder: Path) -> None:
    create(product, folder, "base", "FROM ./model.gguf\n")
    texts = {f"FROM base\nSYSTEM {number}\n" for number in range(6)}
    running = []
    for number, text in enumerate(sorted(texts)):
        path = folder / f"{number}.modelfile"
        path.write_text(text)
        running.append(product.spawn_lm("create", "one", "-f", str(path)))
    for process in running:
        _, said = process.communicate(timeout=60)
        assert process.returncode == 0, said
    assert product.json("show", "one")["system"] in "012345"
    assert len(product.json("ls")) == 2


def test_quantize_in_a_modelfile(product: Product, folder: Path) -> None:
    make_tiny_llama(folder / "wide.gguf", n_embd=256, n_ff=256)
    create(product, folder, "small", "FROM ./wide.gguf\nQUANTIZE q8_0\nSYSTEM Be brief.\n")
    small = product.json("show", "small")
    assert (small["quantization"], small["system"]) == ("Q8_0", "Be brief.")
    create(product, folder, "same", "FROM ./wide.gguf\nSYSTEM Be brief.\nQUANTIZE Q8_0\n")
    assert product.json("show", "same")["digest"] == small["digest"]
    shown = product.lm("show", "--modelfile", "small").stdout
    assert "QUANTIZE" not in shown
    product.lm("create", "again", "-f", "-", stdin=shown)
    assert product.json("show", "again")["digest"] == small["digest"]
    assert product.json("run", "small", "the people", "-o", "num_predict=4", "-o", "num_ctx=256")["response"]
