"""What goes wrong: a clear error with a reason and a next step, the store right afterwards, nothing left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
from pathlib import Path

import pytest

from tests.support.hub import HubServer, Trigger
from tests.support.product import Product, command
from tests.support.shared_models import STORIES

pytestmark = pytest.mark.e2e


def error_of(product: Product, *args: str, code: int = 1) -> tuple[str, str, str]:
    """Run a command that must fail with *code*; return reason, message and hint."""
    verb, *rest = args
    done = product.lm(verb, "--json", *rest, code=code)
    assert done.stdout == "" or verb == "pull"  # its events are data
    error = json.loads(done.stderr.strip().splitlines()[-1])["error"]
    return error["reason"], error["message"], error["hint"]


@pytest.fixture(autouse=True)
def running(product: Product) -> None:
    product.start()


def orphans(product: Product) -> list[dict[str, object]]:
    return [row for row in product.json("gc", "--dry-run", "--grace", "0s")["items"] if row["kind"] == "blob"]


def test_unknown_name_suggests_close_ones(product: Product) -> None:
    product.lm("pull", "hf.co/test/stories")
    product.lm("cp", "hf.co/test/stories", "stories")
    reason, message, hint = error_of(product, "show", "storis")
    assert reason == "MODEL_NOT_FOUND"
    assert "storis" in message
    assert "stories" in hint


@pytest.mark.parametrize(
    "name",
    [
        "x/../../etc/passwd",
        "a/../b",
        "x\u202egguf",
        "x\x07y",
        "n" * 301,
        "hf.co/org/repo/../../x",
        "hf.co/org",
        "a:b:c",
        "%2e%2e",
        "",
    ],
)
def test_hostile_names_are_refused(product: Product, name: str) -> None:
    for verb in ("pull", "show", "rm"):
        reason, message, _ = error_of(product, verb, "--", name, code=2)
        assert reason == "INVALID_MODEL_REF", message
        assert "\u202e" not in message
        assert "\x07" not in message


def test_repository_that_does_not_exist(product: Product) -> None:
    reason, message, _ = error_of(product, "pull", "hf.co/test/nothing")
    assert reason in ("SOURCE_NOT_FOUND", "SOURCE_ACCESS_DENIED")  # the Hub does not tell a stranger which
    assert "test/nothing" in message


def test_file_that_does_not_exist(product: Product) -> None:
    reason, message, hint = error_of(product, "pull", "hf.co/test/stories:Q9_X")
    assert reason == "SOURCE_NOT_FOUND"
    assert "Q9_X" in message
    assert "stories260K.gguf" in hint


def test_gated_repository_says_how_to_give_a_token(product: Product, hub: HubServer) -> None:
    hub.repos["test/stories"].gated = True
    reason, _, hint = error_of(product, "pull", "hf.co/test/stories")
    assert reason == "SOURCE_ACCESS_DENIED"
    assert "HF_TOKEN" in hint
    assert product.json("ls") == []


def test_no_network(product: Product, hub: HubServer) -> None:
    hub.stop()
    reason, _, hint = error_of(product, "pull", "hf.co/test/stories")
    assert reason == "SOURCE_UNAVAILABLE"
    assert hint


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"GGUF", "truncated"),
        (b"PK\x03\x04" + b"0" * 64, "zip"),
        (b"GGUF\x03\x00\x00\x00" + b"\xff" * 64, "counts"),
    ],
)
def test_hostile_gguf(product: Product, tmp_path: Path, content: bytes, what: str) -> None:
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(content)
    (tmp_path / "Modelfile").write_text("FROM ./bad.gguf\n")
    reason, message, hint = error_of(product, "create", what, "-f", str(tmp_path / "Modelfile"))
    assert reason == "GGUF_INVALID", message
    assert hint
    assert product.json("ls") == []


def test_things_that_are_not_files(product: Product, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.gguf")
    (tmp_path / "dir.gguf").mkdir()
    for target in (tmp_path / "fifo.gguf", tmp_path / "dir.gguf", Path("/dev/zero")):
        (tmp_path / "Modelfile").write_text(f"FROM {target}\n")
        reason, message, _ = error_of(product, "create", "x", "-f", str(tmp_path / "Modelfile"))
        assert reason == "FILE_INVALID", message


def test_modelfile_error_has_line_and_caret(product: Product, tmp_path: Path) -> None:
    (tmp_path / "Modelfile").write_text("FROM hf.co/test/chat\nPARAMETER temperatur 1\nFROB x\n")
    done = product.lm("create", "x", "-f", str(tmp_path / "Modelfile"), code=2)
    assert "temperatur" in done.stderr
    assert "^" in done.stderr
    assert "FROB x" in done.stderr


def test_prompt_longer_than_the_context(product: Product) -> None:
    product.lm("pull", "hf.co/test/stories")
    reason, message, hint = error_of(product, "run", "hf.co/test/stories", "once " * 2000)
    assert reason == "CONTEXT_LENGTH_EXCEEDED"
    assert "512" in message
    assert hint


def test_prompt_larger_than_a_message(product: Product, tmp_path: Path) -> None:
    """gRPC's own words for it were shown, which say neither what to do nor that the request is to blame."""
    product.lm("pull", "hf.co/test/stories")
    done = product.lm("run", "hf.co/test/stories", stdin="once " * 1_000_000, code=2)
    assert "hint:" in done.stderr
    assert "4 MiB" in done.stderr
    (tmp_path / "Modelfile").write_text("FROM hf.co/test/stories\nSYSTEM " + "once " * 1_000_000)
    reason, _, hint = error_of(product, "create", "big", "-f", str(tmp_path / "Modelfile"), code=2)
    assert reason == "INVALID_ARGUMENT"
    assert "Modelfile" in hint


def test_option_that_does_not_exist_or_fit(product: Product) -> None:
    product.lm("pull", "hf.co/test/stories")
    done = product.lm("run", "hf.co/test/stories", "x", "-o", "temprature=1", code=2)
    assert "temperature" in done.stderr
    reason, message, _ = error_of(product, "run", "hf.co/test/stories", "x", "-o", "top_p=7", code=2)
    assert reason == "INVALID_ARGUMENT"
    assert "top_p" in message


def test_second_daemon_on_one_store(product: Product) -> None:
    done = subprocess.run(
        [command("lmd")], env=product.environment(), capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode == 1
    assert str(product.daemons[0].pid) in done.stderr
    product.lm("ls")


def test_interrupted_pull_resumes(product: Product, hub: HubServer) -> None:
    middle, go_on = threading.Event(), threading.Event()

    def hold() -> None:
        middle.set()
        go_on.wait(30)

    hub.fault("test/stories", STORIES.name, Trigger(300_000, hold))
    pull = product.spawn_lm("pull", "hf.co/test/stories")
    assert middle.wait(30)
    pull.send_signal(signal.SIGINT)
    _, err = pull.communicate(timeout=20)
    assert pull.returncode == 130
    assert "lm pull hf.co/test/stories" in err
    go_on.set()
    product.lm("pull", "hf.co/test/stories")
    assert orphans(product) == []


def test_daemon_that_is_not_running(product: Product) -> None:
    product.daemons[0].stop()
    done = product.lm("ls", code=3)
    assert "hint:" in done.stderr


def test_file_that_is_no_model_takes_no_space(product: Product, tmp_path: Path) -> None:
    """Files used to be copied into the store before their header was looked at, and stayed for the grace period."""
    (tmp_path / "notes.gguf").write_text("not a model\n" * 1000)
    for verb, *rest in (("pull",), ("run", "hi")):
        reason, _, _ = error_of(product, verb, str(tmp_path / "notes.gguf"), *rest)
        assert reason == "GGUF_INVALID"
    assert not any((product.home / "store" / "blobs" / "sha256").iterdir())
