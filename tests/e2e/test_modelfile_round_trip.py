"""What `lm show --modelfile` prints makes the very same model again, whatever is in it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.hub import HubServer
from tests.support.hub.content import HubFile
from tests.support.product import Product, installed
from tests.support.tiny_adapters import make_tiny_adapter
from tests.support.tiny_models import CHATML, make_tiny_llama, split_model

_RECIPES = {
    "weights alone": "FROM ./weights.gguf\n",
    "a name": "FROM base\n",
    "shards": "FROM ./weights-00001-of-00002.gguf\nFROM ./weights-00002-of-00002.gguf\nSYSTEM hi\n",
    "parameters": 'FROM base\nPARAMETER stop <|end|>\nPARAMETER stop " b "\nPARAMETER stop "\n"\n'
    "PARAMETER temperature 0.1\nPARAMETER top_k 7\nPARAMETER use_mmap false\nPARAMETER min_p 1e-05\n",
    "an odd system prompt": 'FROM base\nSYSTEM """\n "He said \\"no\\"."  \n\ttabs, '
    '\u00fcmlauts, \U0001f600\n# no comment\n"""\n',
    "a bare quote": 'FROM base\nSYSTEM say "yes"\nLICENSE it\'s free\n',
    "quotes that end a line": 'FROM base\nSYSTEM """a "\nb"""\n',
    "no system prompt": 'FROM prompted\nSYSTEM ""\n',
    "messages": 'FROM base\nMESSAGE user 1 + 1?\nMESSAGE assistant """2\n"""\n'
    'MESSAGE system be brief\nMESSAGE user ""\n',
    "licences": 'FROM base\nLICENSE MIT\nLICENSE """\n  All rights\n\n  reserved.\n"""\n',
    "a Jinja template": 'FROM base\nTEMPLATE """{% for m in messages %}{{ m.content }}\n{% endfor %}"""\n',
    "a Go template": 'FROM base\nTEMPLATE """{{ if .System }}{{ .System }}\n{{ end }}{{ .Prompt }}"""\n',
    "an empty template": 'FROM templated\nTEMPLATE ""\n',
    "a draft": "FROM base\nDRAFT ./small.gguf\n",
    "adapters": "FROM base\nADAPTER ./one.gguf\nADAPTER ./two.gguf 0.3\nADAPTER ./three.gguf -1.5\n",
    "an inherited adapter": "FROM adapted\nSYSTEM hi\n",
    "a required version": "FROM base\nREQUIRES 0.14.0\n",
    "line ends of DOS": 'FROM base\r\nSYSTEM """a\r\nb"""\r\n',
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files that the recipes name."""
    made = tmp_path_factory.mktemp("recipes")
    weights = make_tiny_llama(made / "weights.gguf", chat_template=CHATML)
    split_model(weights, 2)
    make_tiny_llama(made / "small.gguf", seed=2, chat_template=CHATML)
    for seed, name in enumerate(("one", "two", "three")):
        make_tiny_adapter(made / f"{name}.gguf", weights, seed=seed)
    return made


@pytest.fixture(scope="module")
def product(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Product]:
    with installed(tmp_path_factory.mktemp("home")) as made:
        made.start()
        _create(made, folder, "base", "FROM ./weights.gguf\n")
        _create(made, folder, "prompted", "FROM base\nSYSTEM a prompt\n")
        _create(made, folder, "templated", "FROM base\nTEMPLATE {{ messages[-1].content }}\n")
        _create(made, folder, "adapted", "FROM base\nADAPTER ./one.gguf 0.5\n")
        yield made


def _create(product: Product, folder: Path, name: str, recipe: str) -> None:
    path = folder / f"{name}.modelfile"
    path.write_bytes(recipe.encode())
    product.lm("create", name, "-f", str(path))


def _digest(product: Product, name: str) -> str:
    [model] = product.json("ls", name)
    return str(model["digest"])


@pytest.mark.parametrize("recipe", _RECIPES.values(), ids=_RECIPES.keys())
def test_the_modelfile_of_a_model_makes_it_again(product: Product, folder: Path, recipe: str) -> None:
    _create(product, folder, "original", recipe)
    modelfile = product.lm("show", "--modelfile", "original").stdout
    product.lm("create", "twin", "-f", "-", stdin=modelfile)
    assert _digest(product, "twin") == _digest(product, "original")
    # The text is stable, too: but for the name in its first line it is that of the twin.
    again = product.lm("show", "--modelfile", "twin").stdout
    assert again.partition("\n")[2] == modelfile.partition("\n")[2]


def test_it_does_so_for_a_pulled_model(product: Product, folder: Path) -> None:
    product.lm("pull", str(folder / "small.gguf"))
    modelfile = product.lm("show", "--modelfile", "small").stdout
    product.lm("create", "twin", "-f", "-", stdin=modelfile)
    assert _digest(product, "twin") == _digest(product, "small")


def test_it_does_so_when_the_base_is_gone(product: Product, folder: Path) -> None:
    """The files are named by digest, so the model that they came from need not be there any more."""
    _create(product, folder, "parent", "FROM base\nSYSTEM of the parent\n")
    _create(product, folder, "child", "FROM parent\nPARAMETER temperature 0.5\n")
    product.lm("rm", "parent")
    modelfile = product.lm("show", "--modelfile", "child").stdout
    product.lm("create", "twin", "-f", "-", stdin=modelfile)
    assert _digest(product, "twin") == _digest(product, "child")
    assert product.lm("show", "--system", "twin").stdout == "of the parent\n"


def test_it_does_so_when_the_model_itself_is_gone(product: Product, folder: Path) -> None:
    """Its weights are those of `base`, so nothing that cannot be made again went with it."""
    make_tiny_adapter(folder / "own.gguf", folder / "weights.gguf", seed=9)
    _create(product, folder, "passing", "FROM base\nSYSTEM on its way\nADAPTER ./own.gguf 0.5\n")
    _create(product, folder, "adapting", "FROM base\nADAPTER ./own.gguf\n")
    before = _digest(product, "passing")
    modelfile = product.lm("show", "--modelfile", "passing").stdout
    product.lm("rm", "passing")
    product.lm("create", "passing", "-f", "-", stdin=modelfile)
    assert _digest(product, "passing") == before
    product.lm("rm", "passing")
    product.lm("rm", "adapting")
    refused = product.lm("create", "passing", "-f", "-", stdin=modelfile, code=1)
    assert "error: ADAPTER sha256:" in refused.stderr
    assert "is not in the store, or no longer" in refused.stderr
    assert "hint: put the path of its GGUF file behind ADAPTER" in refused.stderr


def test_weights_that_went_with_their_model_are_told(product: Product, folder: Path) -> None:
    make_tiny_llama(folder / "lonely.gguf", seed=9)
    _create(product, folder, "lonely", "FROM ./lonely.gguf\nSYSTEM a\n")
    _create(product, folder, "lonely", "FROM lonely\nSYSTEM b\n")
    before = _digest(product, "lonely")
    modelfiles = [product.lm("show", "--modelfile", name).stdout for name in ("lonely@1", "lonely")]
    product.lm("rm", "lonely")
    for modelfile in modelfiles:
        refused = product.lm("create", "lonely", "-f", "-", stdin=modelfile, code=1)
        assert "error: `lonely.gguf`, which FROM needs, went with the last model that had it" in refused.stderr
        assert "hint: put the path of its GGUF file behind FROM" in refused.stderr
    _create(product, folder, "again", "FROM ./lonely.gguf\n")
    product.lm("create", "lonely", "-f", "-", stdin=modelfiles[1])
    assert _digest(product, "lonely") == before


def test_weights_that_were_pulled_are_pulled_again(folder: Path, tmp_path: Path) -> None:
    with HubServer() as hub, installed(tmp_path / "home", HF_ENDPOINT=hub.endpoint) as product:
        repo = hub.add_repo("test/chat", {"chat.gguf": folder / "weights.gguf"})
        product.home.mkdir()
        product.start()
        product.lm("pull", "hf.co/test/chat")
        _create(product, tmp_path, "mine", "FROM hf.co/test/chat\nSYSTEM a\n")
        before = _digest(product, "mine")
        modelfile = product.lm("show", "--modelfile", "mine").stdout
        for name in ("mine", "hf.co/test/chat"):
            product.lm("rm", name)
        made = product.lm("create", "mine", "-f", "-", stdin=modelfile)
        assert "pulling hf.co/test/chat:" in made.stderr
        assert _digest(product, "mine") == before

        for name in ("mine", "hf.co/test/chat:chat.gguf"):
            product.lm("rm", name)
        repo.commit([HubFile.of("chat.gguf", folder / "small.gguf")])
        refused = product.lm("create", "mine", "-f", "-", stdin=modelfile, code=1)
        assert "error: `chat.gguf`, which FROM needs, went with the last model that had it" in refused.stderr
        assert "hint: put `FROM hf.co/test/chat:chat.gguf` in its place" in refused.stderr


def test_a_modelfile_in_utf_16_means_the_same(product: Product, folder: Path) -> None:
    recipe = 'FROM base\nSYSTEM """grün\n"""\n'
    (folder / "narrow").write_text(recipe)
    (folder / "wide").write_bytes(recipe.encode("utf-16"))
    for name in ("narrow", "wide"):
        product.lm("create", name, "-f", str(folder / name))
    assert _digest(product, "narrow") == _digest(product, "wide")


def test_shards_become_one_file_that_says_the_same(product: Product, folder: Path) -> None:
    _create(product, folder, "merged", "FROM ./weights-00002-of-00002.gguf\n")
    _create(product, folder, "whole", "FROM ./weights.gguf\n")
    [file] = product.json("show", "merged")["files"]
    assert file["filename"] == "weights.gguf"
    answers = [
        product.lm("run", name, "Once", "-o", "temperature=0", "-o", "num_predict=20").stdout
        for name in ("merged", "whole")
    ]
    assert answers[0] == answers[1] != ""
