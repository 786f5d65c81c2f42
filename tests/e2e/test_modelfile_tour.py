"""The guide to Modelfiles, run as it is written."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.hub import HubServer
from tests.support.product import installed
from tests.support.tiny_adapters import make_tiny_adapter
from tests.support.tiny_models import CHATML, make_tiny_llama
from tests.support.tour import Step, matches, run_step, steps

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "guides" / "modelfile.md"
_REPO = "bartowski/Llama-3.2-1B-Instruct-GGUF"
_FILE = "Llama-3.2-1B-Instruct"


def test_the_guide_runs_as_written(lmd_home: Path, tmp_path: Path) -> None:
    """The models of the guide are tiny ones, which a Hub on loopback has under the names of the real ones."""
    weights = make_tiny_llama(tmp_path / "weights.gguf", chat_template=CHATML, n_ctx=2048)
    folder = tmp_path / "tour"
    folder.mkdir()
    make_tiny_adapter(folder / "sailor-lora.gguf", weights)
    with HubServer() as hub:
        hub.add_repo(_REPO, {f"{_FILE}-Q4_K_M.gguf": weights, f"{_FILE}-f16.gguf": weights})
        with installed(lmd_home, HF_ENDPOINT=hub.endpoint) as product:
            product.start()
            for step in steps(GUIDE.read_text()):
                run_step(step, folder, product.environment())


def test_steps_are_read_with_what_they_print() -> None:
    page = "# A guide\n```sh\necho a\n```\n\n```text\na\n```\n"
    page += "text\n```sh\nfalse\n```\nmore text\n```text\nno output\n```\n"
    assert steps(page) == [Step("echo a\n", 3, "a\n"), Step("false\n", 11, None)]


@pytest.mark.parametrize(
    ("shown", "printed", "same"),
    [
        ("a\nb\n", "a\nb\n", True),
        ("a\nb\n", "a\nc\n", False),
        ("a\n", "a\nb\n", False),
        ("…\nb\n", "x\ny\nb\n", True),
        ("…\nb\n", "b\n", True),
        ("…\nb\n", "x\n", False),
        ("size … MiB\n", "size 1.2 MiB   \n", True),
        ("size … MiB\n", "size 1.2\nMiB\n", False),
        ("a(b\n", "a(b\n", True),
    ],
)
def test_an_ellipsis_stands_for_any_text(shown: str, printed: str, same: bool) -> None:
    assert matches(shown, printed) is same


def test_a_step_that_does_not_do_what_is_shown_fails_the_guide(tmp_path: Path) -> None:
    env = {"PATH": "/usr/bin:/bin"}
    assert run_step(Step("echo b; echo c >&2\n", 1, "b\nc\n"), tmp_path, env) == "b\nc\n"
    assert run_step(Step("echo error: bad >&2; exit 2\n", 1, "error: bad\n"), tmp_path, env) == "error: bad\n"
    for wrong in (Step("echo b\n", 1, "c\n"), Step("false; echo b\n", 1, None), Step("true\n", 1, "error: bad\n")):
        with pytest.raises(AssertionError, match="line 1 of the guide"):
            run_step(wrong, tmp_path, env)
