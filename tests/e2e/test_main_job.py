"""The main job, as a user does it: pull, run, list, show, create, stop, remove."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.hub import HubServer
from tests.support.product import Product, wait_until
from tests.support.shared_models import STORIES

pytestmark = pytest.mark.e2e

IN_PROCESS = """
import sys
from llama_cpp import Llama
llm = Llama(sys.argv[1], n_ctx=512, verbose=False)
print(llm("Once upon a time", max_tokens=60, temperature=0)["choices"][0]["text"], end="")
"""


def test_pulled_model_says_what_the_engine_says_in_process(product: Product) -> None:
    product.start()
    product.lm("pull", "hf.co/test/stories")
    ours = product.lm("run", "hf.co/test/stories", "Once upon a time", "-o", "temperature=0", "-o", "num_predict=60")
    theirs = subprocess.run(
        [sys.executable, "-c", IN_PROCESS, str(STORIES)], capture_output=True, text=True, check=True
    )
    assert len(theirs.stdout) > 40
    assert ours.stdout.rstrip("\n") == theirs.stdout.rstrip("\n")


def test_life_of_a_model(product: Product) -> None:
    product.start()
    assert product.json("ls") == []
    product.lm("pull", "hf.co/test/chat")

    (model,) = product.json("ls")
    assert model["name"] == "hf.co/test/chat:latest"
    assert model["digest"].startswith("sha256:")
    assert model["size_bytes"] > 1000
    assert model["modified_at"]

    answer = json.loads(
        product.lm("run", "hf.co/test/chat", "hello", "-o", "num_predict=8", "-o", "seed=3", "--json").stdout
    )
    assert answer["generated_tokens"] <= 8
    again = json.loads(
        product.lm("run", "hf.co/test/chat", "hello", "-o", "num_predict=8", "-o", "seed=3", "--json").stdout
    )
    assert again["response"] == answer["response"]

    (runner,) = product.json("ps")
    assert runner["name"] == "hf.co/test/chat:latest"
    assert runner["state"] == "ready"
    assert runner["memory_bytes"] > 1000
    assert runner["device"] == "cpu"
    assert runner["slots"] >= 1

    product.lm("stop", "hf.co/test/chat")
    wait_until(lambda: product.json("ps") == [], "the runner is gone")
    product.lm("rm", "hf.co/test/chat")
    assert product.json("ls") == []
    assert not any((product.home / "store" / "blobs" / "sha256").iterdir())


def test_run_pulls_what_is_missing(product: Product) -> None:
    product.start()
    done = product.lm("run", "hf.co/test/stories", "Once", "-o", "num_predict=4", "-o", "temperature=0")
    assert done.stdout.strip()
    assert [model["name"] for model in product.json("ls")] == ["hf.co/test/stories:latest"]


def test_prompt_and_piped_input_are_one_prompt(product: Product) -> None:
    product.start()
    options = ["-o", "num_predict=1", "-o", "temperature=0", "--json"]
    alone = json.loads(product.lm("run", "hf.co/test/chat", "summarize", *options).stdout)
    piped = json.loads(product.lm("run", "hf.co/test/chat", "summarize", *options, stdin="a b c d e f").stdout)
    assert piped["prompt_tokens"] > alone["prompt_tokens"]


def test_second_pull_moves_no_bytes(product: Product, hub: HubServer) -> None:
    product.start()
    product.lm("pull", "hf.co/test/stories")
    before = hub.sent_bytes("test/stories", STORIES.name)
    assert before >= STORIES.stat().st_size
    product.lm("pull", "hf.co/test/stories")
    assert hub.sent_bytes("test/stories", STORIES.name) == before


def test_created_model_and_its_modelfile(product: Product, tmp_path: Path) -> None:
    product.start()
    product.lm("pull", "hf.co/test/chat")
    modelfile = tmp_path / "Modelfile"
    modelfile.write_text(
        'FROM hf.co/test/chat\nSYSTEM """Be brief."""\nPARAMETER temperature 0\nPARAMETER num_predict 5\n'
    )
    product.lm("create", "brief", "-f", str(modelfile))
    shown = product.lm("show", "brief", "--modelfile").stdout
    assert "Be brief." in shown
    (tmp_path / "again").write_text(shown)
    product.lm("create", "again", "-f", str(tmp_path / "again"))
    digests = {model["name"]: model["digest"] for model in product.json("ls")}
    assert digests["again:latest"] == digests["brief:latest"] != digests["hf.co/test/chat:latest"]


def test_create_from_a_file(product: Product, tmp_path: Path, tiny_chat: Path) -> None:
    product.start()
    (tmp_path / "w.gguf").write_bytes(tiny_chat.read_bytes())
    (tmp_path / "Modelfile").write_text("FROM ./w.gguf\n")
    product.lm("create", "mine", "-f", str(tmp_path / "Modelfile"))
    assert product.lm("run", "mine", "hi", "-o", "num_predict=2").returncode == 0


def test_first_command_starts_a_daemon_and_says_so(product: Product) -> None:
    first = product.lm("ls", "--json", start=True)
    assert json.loads(first.stdout) == []
    assert "started" in first.stderr
    status = product.json("status")
    assert status["socket"] == str(product.socket)
    assert os.path.exists(f"/proc/{status['pid']}")
    product.lm("serve", "--stop")
    wait_until(lambda: not os.path.exists(f"/proc/{status['pid']}"), "the daemon is gone")
    assert product.lm("ls", code=3).stderr.startswith("error:")


def test_copies_share_their_bytes(product: Product) -> None:
    product.start()
    product.lm("pull", "hf.co/test/stories")
    blobs = product.home / "store" / "blobs" / "sha256"
    before = sorted(blobs.iterdir())
    product.lm("cp", "hf.co/test/stories", "tales")
    assert sorted(blobs.iterdir()) == before
    product.lm("rm", "hf.co/test/stories")
    assert sorted(blobs.iterdir()) == before
    product.lm("run", "tales", "Once", "-o", "num_predict=2")


def test_dropped_file_becomes_a_model(product: Product, tiny_chat: Path) -> None:
    product.start()
    folder = Path(product.json("status")["dropin"])
    target = folder / "dropped.gguf"
    partial = folder / ".dropped.part"
    partial.write_bytes(tiny_chat.read_bytes())
    partial.rename(target)
    wait_until(lambda: [m["name"] for m in product.json("ls")] == ["dropped:latest"], "the file is a model")
    target.unlink()
    wait_until(lambda: product.json("ls") == [], "the model is gone with its file")


def test_relative_path_of_a_file_is_a_model(product: Product, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The daemon has another working directory than the user, so `lm` names the file in full."""
    product.start()
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "tale.gguf").write_bytes(STORIES.read_bytes())
    (tmp_path / "link.gguf").symlink_to(tmp_path / "weights" / "tale.gguf")
    monkeypatch.chdir(tmp_path / "weights")
    product.lm("pull", "./tale.gguf")
    for path in ("./tale.gguf", "../weights/tale.gguf", "../link.gguf"):
        product.lm("run", path, "Once", "-o", "num_predict=1")
    assert [model["name"] for model in product.json("ls")] == ["tale:latest"]
