"""The versions of a model as its owner sees them: edit, history, diff, rollback, and what garbage collection leaves."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support.product import Product, command, wait_until
from tests.support.shared_models import STORIES

pytestmark = pytest.mark.e2e

LONG = ["-o", "num_predict=200", "-o", "temperature=0", "-o", "num_ctx=512", "-o", "ignore_eos=true"]


def _create(product: Product, name: str, text: str) -> None:
    product.lm("create", name, "-f", "-", stdin=text)


def _edit(product: Product, name: str, script: str, code: int = 0) -> None:
    env = {"EDITOR": f"sed -i '{script}'", "VISUAL": "", "TMPDIR": str(product.home)}
    product.lm("edit", name, env=env, code=code)


def _hows(product: Product, name: str) -> list[str]:
    return [f"{v['how']} {v['detail']}".strip() for v in product.json("history", name)["versions"]]


def test_a_model_is_edited_compared_and_rolled_back(product: Product) -> None:
    product.start()
    _create(product, "poet", f"FROM {STORIES}\nPARAMETER temperature 0.5\nSYSTEM Be brief.\n")
    first = product.json("show", "poet")
    _edit(product, "poet", "s/0.5/0.7/; s/brief/bold/")
    second = product.json("show", "poet")
    assert (second["parameters"]["temperature"], second["system"]) == (0.7, "Be bold.")
    _edit(product, "poet", "s/temperature/temprature/", code=2)
    _edit(product, "poet", "s/^FROM.*/FROM nobody-has-this-file.gguf/", code=1)
    assert product.json("show", "poet")["digest"] == second["digest"], "mistakes change nothing"

    current, before = product.json("history", "poet")["versions"]
    assert (current["how"], current["change"]) == ("edit", "system +1 -1, temperature 0.5 to 0.7")
    assert (before["how"], before["state"], before["digest"]) == ("create", "kept", first["digest"])
    earlier = product.json("show", "poet@1")
    assert [earlier[key] for key in ("digest", "system", "parameters")] == [
        first[key] for key in ("digest", "system", "parameters")
    ]
    shown = product.lm("diff", "poet", code=1).stdout
    assert "-temperature 0.5\n+temperature 0.7\n" in shown
    assert "-Be brief.\n+Be bold.\n" in shown

    product.lm("cp", "poet", "other")
    product.lm("rollback", "poet")
    assert product.json("show", "poet")["digest"] == first["digest"]
    product.lm("diff", "poet@1", "poet", code=0)
    product.lm("cp", "poet@2", "bold")
    assert (product.json("show", "bold")["system"], _hows(product, "bold")) == ("Be bold.", ["copy of poet:latest@2"])
    assert _hows(product, "poet") == ["rollback to version 1", "edit", "create"]
    assert _hows(product, "other") == ["copy of poet:latest"]

    # Two edits of one version: the second to be made is refused.
    editor = f'sed -i "s/brief/slow/" "$1"; {command("lm")} --no-start rollback poet 2'
    env = {"EDITOR": f"e() {{ {editor}; }}; e", "VISUAL": "", "TMPDIR": str(product.home)}
    done = product.lm("edit", "poet", env=env, code=1)
    assert "was changed meanwhile" in done.stderr
    kept = re.search(r"your text is kept in (\S+)", done.stderr)
    assert kept is not None
    assert "SYSTEM Be slow." in Path(kept[1]).read_text()
    assert product.json("show", "poet")["digest"] == second["digest"]


def test_a_pulled_model_is_edited_under_the_name_of_its_source(product: Product) -> None:
    product.start()
    name = "hf.co/test/chat:latest"
    product.lm("pull", name)
    pulled = product.json("show", name)
    _edit(product, name, "$aSYSTEM Be bold.")
    assert product.json("show", name)["system"] == "Be bold."
    product.lm("pull", "hf.co/test/chat")
    assert product.json("show", name)["digest"] == pulled["digest"], "a pull brings what the source has"
    assert _hows(product, name) == ["pull", "edit", "pull"]
    product.lm("rollback", name)
    assert product.json("show", name)["system"] == "Be bold."


def test_versions_outlive_a_restart_and_go_when_they_are_told_to(product: Product, tiny_chat: Path) -> None:
    daemon = product.start()
    _create(product, "m", f"FROM {STORIES}\n")
    _create(product, "m", f"FROM {tiny_chat}\n")
    daemon.stop()
    product.start()
    product.lm("gc", "--grace", "0")
    product.lm("rollback", "m")
    assert product.lm("run", "m", "Once", "-o", "num_predict=4").stdout
    product.lm("stop", "m")
    product.lm("gc", "--grace", "0", "--history", "0")
    states = [version["state"] for version in product.json("history", "m")["versions"]]
    assert states == ["current", "gone", "kept"]
    refused = product.lm("rollback", "m", "2", code=1)
    assert "version 2 of `m:latest` is no longer kept" in refused.stderr
    product.lm("rm", "m")
    assert product.lm("gc", "-n", "--grace", "0").stdout == ""


def test_an_answer_that_is_running_finishes_on_the_version_it_began_with(product: Product) -> None:
    product.start()
    folder = product.home / "dropin"
    recipe = folder / "story.modelfile"
    (folder / "w.gguf").write_bytes(STORIES.read_bytes())
    recipe.write_text("FROM ./w.gguf\nPARAMETER seed 1\n")
    wait_until(lambda: product.lm("show", "story", code=None).returncode == 0, "the folder's model")
    expected = product.lm("run", "story", "Once upon a time", *LONG).stdout
    assert len(expected) > 200

    answer = product.spawn_lm("run", "story", "Once upon a time", *LONG)
    assert answer.stdout is not None
    begun = answer.stdout.read(1)
    recipe.write_text('FROM ./w.gguf\nPARAMETER seed 1\nPARAMETER stop "e"\n')
    wait_until(lambda: len(_hows(product, "story")) == 2, "the edit of the file")
    rest, errors = answer.communicate(timeout=60)
    assert (begun + rest, answer.returncode) == (expected, 0), errors
    assert "e" not in product.lm("run", "story", "Once upon a time", *LONG).stdout
    assert _hows(product, "story") == ["folder", "folder"]
