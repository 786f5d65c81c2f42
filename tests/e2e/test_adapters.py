"""A model with adapters, from its Modelfile to its answers."""

from __future__ import annotations

from pathlib import Path

import openai
import pytest

from tests.support.product import Product
from tests.support.tiny_adapters import make_tiny_adapter, merge
from tests.support.tiny_models import make_tiny_llama

pytestmark = pytest.mark.e2e

ASK = ["the people", "-o", "num_predict=40", "-o", "temperature=0", "-o", "num_ctx=256", "-o", "ignore_eos=true"]


@pytest.fixture
def files(tmp_path: Path) -> Path:
    base = make_tiny_llama(tmp_path / "base.gguf")
    for seed, name in enumerate(("pirate", "poet"), 1):
        make_tiny_adapter(tmp_path / f"{name}.gguf", base, seed=seed)
    return tmp_path


def create(product: Product, folder: Path, name: str, text: str) -> None:
    path = folder / f"{name}.modelfile"
    path.write_text(text)
    product.lm("create", name, "-f", str(path))


def test_answers_are_those_of_the_merged_weights(product: Product, files: Path) -> None:
    pirate, poet = ((files / f"{name}.gguf") for name in ("pirate", "poet"))
    for name, scales in (("both", (1.0, 0.5)), ("half", (0.5, 0.5))):
        merge(files / f"{name}.gguf", files / "base.gguf", list(zip((pirate, poet), scales, strict=True)))
    product.start()
    for name in ("base", "both", "half"):
        create(product, files, name, f"FROM ./{name}.gguf\n")
    create(product, files, "adapted", "FROM base\nADAPTER ./pirate.gguf\nADAPTER ./poet.gguf 0.5\n")
    expected = {name: product.json("run", name, *ASK)["response"] for name in ("base", "both", "half")}
    assert len(set(expected.values())) == 3

    def ask(*options: str) -> str:
        text: str = product.json("run", "adapted", *options, *ASK)["response"]
        return text

    assert ask() == expected["both"]
    assert ask("--adapter", "pirate=0.5") == expected["half"]
    assert ask("--adapter", "pirate.gguf=0", "--adapter", "2=0") == expected["base"]
    assert ask() == expected["both"]
    assert len(product.json("ps")) == 4, "scales are no reason to load a model again"

    shown = product.json("show", "adapted")
    assert [(file["role"], file.get("scale")) for file in shown["files"]] == [
        ("weights", None),
        ("adapter", 1.0),
        ("adapter", 0.5),
    ]
    assert "scale 0.5" in product.lm("show", "adapted").stdout
    again = product.lm("show", "--modelfile", "adapted").stdout
    create(product, files, "again", again)
    assert product.json("show", "again")["digest"] == shown["digest"]


def test_openais_clients_choose_scales(product: Product, files: Path) -> None:
    product.start()
    create(product, files, "base", "FROM ./base.gguf\n")
    create(product, files, "pirate", "FROM base\nADAPTER ./pirate.gguf\n")
    with openai.OpenAI(base_url=f"{product.http_url}/v1", api_key="none") as client:

        def ask(model: str, **extra: object) -> str:
            done = client.completions.create(
                model=model, prompt="the people", max_tokens=30, temperature=0, extra_body={"ignore_eos": True, **extra}
            )
            return done.choices[0].text

        plain, adapted = ask("base"), ask("pirate")
        assert ask("pirate", adapters={"pirate": 0}) == plain != adapted
        assert ask("pirate", adapters={"pirate": 1}) == adapted
        with pytest.raises(openai.BadRequestError, match="no adapter called `parrot`"):
            ask("pirate", adapters={"parrot": 1})


def test_a_derived_model_takes_adapters_over_or_leaves_them(product: Product, files: Path) -> None:
    product.start()
    create(product, files, "base", "FROM ./base.gguf\n")
    create(product, files, "pirate", "FROM base\nADAPTER ./pirate.gguf\n")
    create(product, files, "calm", "FROM pirate\nPARAMETER temperature 0\n")
    create(product, files, "plain", 'FROM pirate\nADAPTER ""\n')
    texts = {name: product.json("run", name, *ASK)["response"] for name in ("base", "pirate", "calm", "plain")}
    assert texts["calm"] == texts["pirate"] != texts["base"] == texts["plain"]


def test_prefixes_that_outlive_the_runner_stay_with_their_adapters(product: Product, files: Path) -> None:
    product.start()
    create(product, files, "base", "FROM ./base.gguf\n")
    create(product, files, "pirate", "FROM base\nADAPTER ./pirate.gguf\n")
    story = " ".join(["the house of the people was small and the water was great"] * 3)

    def cached(name: str, *options: str) -> int:
        tokens: int = product.json("run", name, story, *ASK[1:], *options)["cached_tokens"]
        return tokens

    assert [cached("base"), cached("pirate"), cached("pirate", "--adapter", "pirate=2")] == [0, 0, 0]
    for name in ("base", "pirate"):
        product.lm("stop", name)
    assert cached("pirate", "--adapter", "pirate=0") == 0
    assert min(cached("base"), cached("pirate"), cached("pirate", "--adapter", "pirate=2")) > 30


def test_what_does_not_fit_is_refused_when_it_is_asked_for(product: Product, files: Path) -> None:
    make_tiny_adapter(files / "wide.gguf", files / "base.gguf", widen=32)
    make_tiny_adapter(files / "qwen.gguf", files / "base.gguf", architecture="qwen2", widen=32)
    product.start()
    create(product, files, "pirate", "FROM ./base.gguf\nADAPTER ./pirate.gguf\n")
    for name, words in (
        ("wide", "`blk.0.attn_q.weight` as one of 96 x 64, and the model's is of 64 x 64"),
        ("qwen", "`qwen2` with a `blk.0.attn_q.weight` of 96 x 64, and the model is of `llama` with one of 64 x 64"),
        ("base", "is of the kind `model`, not an adapter"),
    ):
        (files / "Modelfile").write_text(f"FROM ./base.gguf\nADAPTER ./{name}.gguf\n")
        failed = product.lm("create", "bad", "-f", str(files / "Modelfile"), code=None)
        assert failed.returncode != 0
        assert words in failed.stderr
    (files / "Modelfile").write_text("FROM ./pirate.gguf\n")
    assert "is an adapter, not a model" in product.lm("create", "bad", "-f", str(files / "Modelfile"), code=None).stderr
    unknown = product.lm("run", "pirate", "x", "--adapter", "parrot=1", code=None)
    assert unknown.returncode != 0
    assert "no adapter called `parrot`" in unknown.stderr
    assert "`pirate`" in unknown.stderr
    assert "NAME=SCALE" in product.lm("run", "pirate", "x", "--adapter", "pirate", code=2).stderr
    assert "from -100 to 100" in product.lm("run", "pirate", "x", "--adapter", "pirate=1e9", code=None).stderr
