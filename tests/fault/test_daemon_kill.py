"""`kill -9` of the daemon in the middle of its work: the next start goes on where it was, without a human."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.hub import HubServer, serve
from tests.support.product import Product, installed, wait_until
from tests.support.tiny_models import make_tiny_llama

pytestmark = [pytest.mark.fault, pytest.mark.e2e, pytest.mark.timeout(180)]


@pytest.fixture(scope="module")
def big_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 40 MB of runnable model: several ranges, several journal records."""
    return make_tiny_llama(tmp_path_factory.mktemp("models") / "big.gguf", n_layer=8, n_embd=640, n_ctx=256)


@pytest.fixture
def hub(big_model: Path) -> Iterator[HubServer]:
    with serve({"test/big": big_model}) as server:
        yield server


@pytest.fixture
def product(lmd_home: Path, hub: HubServer) -> Iterator[Product]:
    with installed(lmd_home, HF_ENDPOINT=hub.endpoint) as made:
        yield made


def test_ten_kills_in_one_pull(product: Product, hub: HubServer, big_model: Path) -> None:
    size = big_model.stat().st_size
    random_moments = random.Random(20261121)
    repo = hub.repo("test/big")
    product.start()
    for step in range(1, 11):
        sent = hub.bytes_sent
        # The transfer stands still at a random byte of the next twelfth of the file; there the daemon is killed.
        repo.hold_after_bytes = random_moments.randrange(size // 24, size // 12)
        pull = product.spawn_lm("pull", "hf.co/test/big")
        wait_until(lambda: hub.held > 0, f"transfer {step} is in the middle")
        product.daemons[-1].kill()
        pull.communicate(timeout=20)
        assert pull.returncode == 1
        assert hub.bytes_sent > sent
        repo.hold_after_bytes = None
        hub.release()
        hub.log.clear()
        product.start()
        assert product.json("ls") == []

    product.lm("pull", "hf.co/test/big", timeout_s=120)
    offsets = [request.range_start for request in hub.log if request.range_start is not None]
    assert offsets, "the last pull asked for ranges"
    assert min(offsets) > 0, "and did not start over"
    digest = hashlib.sha256(big_model.read_bytes()).hexdigest()
    blob = product.home / "store" / "blobs" / "sha256" / digest
    assert hashlib.sha256(blob.read_bytes()).hexdigest() == digest
    report = product.json("gc", "--dry-run", "--grace", "0s")
    assert report["items"] == []


@pytest.mark.parametrize("verb", ["create", "cp", "rm"])
def test_kill_right_after_an_acknowledged_change(product: Product, big_model: Path, tmp_path: Path, verb: str) -> None:
    product.start()
    (tmp_path / "Modelfile").write_text(f"FROM {big_model}\n")
    product.lm("create", "a", "-f", str(tmp_path / "Modelfile"))
    if verb == "cp":
        product.lm("cp", "a", "b")
    elif verb == "rm":
        product.lm("rm", "a")
    product.daemons[-1].kill()
    product.start()
    names = {model["name"] for model in product.json("ls")}
    assert names == {"create": {"a:latest"}, "cp": {"a:latest", "b:latest"}, "rm": set()}[verb]
