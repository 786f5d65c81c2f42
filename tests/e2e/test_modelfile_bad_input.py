"""What `lm create` and its kin refuse, on a whole installation: with which words, and that nothing changes by it."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.product import Product, installed
from tests.support.tiny_adapters import make_tiny_adapter
from tests.support.tiny_models import CHATML, make_tiny_bert, make_tiny_llama


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files that the recipes name."""
    made = tmp_path_factory.mktemp("recipes")
    weights = make_tiny_llama(made / "weights.gguf", chat_template=CHATML)
    make_tiny_bert(made / "bert.gguf")
    make_tiny_adapter(made / "wide.gguf", weights, widen=32)
    make_tiny_adapter(made / "foreign.gguf", weights, architecture="gemma")
    (made / "cut.gguf").write_bytes(weights.read_bytes()[:300_000])
    (made / "text.gguf").write_text("This is no GGUF file, but long enough for a header.\n")
    (made / "empty.gguf").touch()
    (made / "nothing").mkdir()
    return made


@pytest.fixture(scope="module")
def product(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Product]:
    with installed(tmp_path_factory.mktemp("home")) as made:
        made.start()
        made.lm("create", "base", "-f", "-", stdin=f"FROM {folder / 'weights.gguf'}\n")
        made.lm("create", "victim", "-f", "-", stdin="FROM base\nSYSTEM as it was\n")
        made.lm("create", "small", "-f", "-", stdin="FROM base\nQUANTIZE Q8_0\n")
        yield made


_REFUSED = {
    "a Jinja template that does not compile": (
        'TEMPLATE """{% for m in messages %}"""',
        "the template does not compile: line 1: Unexpected end of template",
    ),
    "a Go template that does not compile": (
        'TEMPLATE """{{ range .Messages }}"""',
        "the template ends where {{else}} or {{end}} is missing",
    ),
    "a function that Go templates do not have": ("TEMPLATE {{ .Prompt | shout }}", 'function "shout" not defined'),
    "a parameter out of range": (
        "PARAMETER temperature 1000",
        "parameter `temperature` must be a number from 0 to 100, not 1000",
    ),
    "a parameter that nobody knows": ("PARAMETER temprature 1", "did you mean `temperature`?"),
    "a quantization that nobody knows": ("QUANTIZE Q4_K_N", "`Q4_K_N` is no quantization (did you mean Q4_K_"),
    "a quantization that does not suit": ("QUANTIZE Q4_K_M", "Q4_K_M does not suit this model"),
    "a draft that cannot draft": ("DRAFT ./bert.gguf", "the draft only embeds"),
    "an adapter that is none": ("ADAPTER ./weights.gguf", "is of the kind `model`, not an adapter"),
    "an adapter that is no GGUF": ("ADAPTER ./text.gguf", "text.gguf: not a valid GGUF file: it starts with 'This'"),
    "an adapter that is not there": ("ADAPTER ./nowhere.gguf", "nowhere.gguf: there is no such file"),
    "an adapter for wider weights": ("ADAPTER ./wide.gguf", "as one of 96 x 64, and the model's is of 64 x 64"),
    "an adapter for another architecture": ("ADAPTER ./foreign.gguf", "gemma"),
    "a scale beyond all measure": ("ADAPTER ./wide.gguf 1e9", "the scale of an adapter must be a number from -100 to"),
    "a projector that is none": ("PROJECTOR ./weights.gguf", "is of the kind `model`, not a projector"),
    "two projectors": ("PROJECTOR ./a.gguf\nPROJECTOR ./b.gguf", "a model has one projector at most"),
    "a model and weights": ("FROM ./weights.gguf", "FROM names both a model and weights"),
    "two models": ("FROM small", "a model is made of one other model at most"),
    "a file cut short": ("DRAFT ./cut.gguf", "cut.gguf: not a valid GGUF file: the tensor"),
    "an empty file": ("DRAFT ./empty.gguf", "empty.gguf: not a valid GGUF file: 0 bytes are too few"),
    "a folder without models": ("DRAFT ./nothing", "nothing"),
    "a release that is not out": ("REQUIRES 99.0", "the model requires Ollama 99.0"),
    "what only Ollama has": ("RENDERER qwen3", "RENDERER cannot be used here"),
    "a directive of a Dockerfile": ("RUN rm", "it is a directive of Dockerfiles"),
    "a text that never ends": ('SYSTEM """never', 'the text that begins here never ends; """ must end a line'),
}


@pytest.mark.parametrize(("lines", "said"), _REFUSED.values(), ids=_REFUSED.keys())
def test_it_is_refused_and_the_model_stays(product: Product, folder: Path, lines: str, said: str) -> None:
    before = product.json("ls")
    recipe = folder / "refused.modelfile"
    recipe.write_text(f"FROM base\n{lines}\n")
    refused = product.lm("create", "victim", "-f", str(recipe), code=None)
    assert refused.returncode in (1, 2), refused.stderr
    assert said in " ".join(refused.stderr.split())
    assert "Traceback" not in refused.stderr
    assert product.json("ls") == before
    assert product.lm("show", "--system", "victim").stdout == "as it was\n"


def test_a_licence_of_ten_megabytes(product: Product) -> None:
    recipe = f'FROM base\nLICENSE """{"x" * 10_000_000}"""\n'
    refused = product.lm("create", "victim", "-f", "-", stdin=recipe, code=2)
    assert "4 MiB" in refused.stderr


def test_a_model_of_itself_and_a_circle(product: Product) -> None:
    refused = product.lm("create", "loop", "-f", "-", stdin="FROM loop\n", code=2)
    assert "loop" in refused.stderr
    # One that is there may be built on itself: the name moves, what it meant stays what it was.
    product.lm("create", "tower", "-f", "-", stdin="FROM base\nPARAMETER stop a\n")
    product.lm("create", "tower", "-f", "-", stdin="FROM tower\nPARAMETER temperature 0.5\n")
    assert product.lm("show", "--parameters", "tower").stdout == 'temperature 0.5\nstop "a"\n'


def test_a_base_that_was_removed_meanwhile(product: Product) -> None:
    product.lm("create", "parent", "-f", "-", stdin="FROM base\nSYSTEM of the parent\n")
    product.lm("create", "child", "-f", "-", stdin="FROM parent\nPARAMETER temperature 0\n")
    product.lm("rm", "parent")
    refused = product.lm("create", "child", "-f", "-", stdin="FROM parent\n", code=1)
    assert "model `parent:latest` not found" in refused.stderr
    assert product.lm("run", "child", "hi", "-o", "num_predict=3").stdout


def test_quantizing_what_is_quantized_must_be_asked_for(product: Product) -> None:
    refused = product.lm("create", "smaller", "-f", "-", stdin="FROM small\nQUANTIZE Q4_0\n", code=2)
    assert "the model is quantized already (Q8_0)" in refused.stderr
    done = product.lm("create", "smaller", "-f", "-", "--requantize", stdin="FROM small\nQUANTIZE Q4_0\n")
    assert "loses more" in done.stderr
    assert product.json("ls", "smaller")[0]["quantization"] == "Q4_0"


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}xxxxxxxxxxxxxxxx{% endfor %}{% endfor %}",
        '{{ range $i := 100000 }}{{ printf "%9999d" $i }}{{ end }}{{ .Prompt }}',
    ],
)
def test_a_template_that_renders_a_bomb_ends_its_own_answer_only(product: Product, template: str) -> None:
    product.lm("create", "bomb", "-f", "-", stdin=f'FROM base\nTEMPLATE """{template}"""\n')
    refused = product.lm("run", "bomb", "hi", code=1)
    assert "error: the chat template fails: " in refused.stderr
    assert "renders more than" in refused.stderr or "steps" in refused.stderr
    assert product.lm("run", "base", "hi", "-o", "num_predict=3").stdout


def test_many_creations_of_one_name_at_once(product: Product) -> None:
    """Each is a version of its own, and the name means one of them."""

    def create(number: int) -> None:
        product.lm("create", "contested", "-f", "-", stdin=f"FROM base\nSYSTEM number {number}\n")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(create, range(4)))
    versions = product.json("history", "contested")["versions"]
    assert len({version["digest"] for version in versions}) == 4
    [listed] = product.json("ls", "contested")
    assert listed["digest"] == versions[0]["digest"]


@pytest.mark.parametrize(
    ("editor", "said"),
    [
        ("false", "the editor `false` ended with 1"),
        ("sed -i s/SYSTEM/SISTEM/", "unknown directive `SISTEM` (did you mean SYSTEM?)"),
        ("no-such-editor", "no-such-editor"),
    ],
)
def test_an_edit_that_fails_changes_nothing(product: Product, editor: str, said: str) -> None:
    before = product.json("ls", "victim")
    env = {"EDITOR": editor, "VISUAL": "", "TMPDIR": str(product.home)}
    refused = product.lm("edit", "victim", env=env, code=None)
    assert refused.returncode in (1, 2), refused.stderr
    assert said in refused.stderr
    assert product.json("ls", "victim") == before
