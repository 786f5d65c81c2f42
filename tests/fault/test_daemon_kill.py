"""`kill -9` of the daemon in the middle of its work: the next start goes on where it was, without a human."""

from __future__ import annotations

import hashlib
import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.hub import HubServer, Trigger
from tests.support.product import Daemon, Product, installed, wait_until
from tests.support.tiny_models import make_tiny_llama

REPO = "test/big"

pytestmark = [pytest.mark.fault, pytest.mark.e2e, pytest.mark.timeout(180)]


@pytest.fixture(scope="module")
def big_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 40 MB of runnable model: several ranges, several journal records."""
    return make_tiny_llama(tmp_path_factory.mktemp("models") / "big.gguf", n_layer=8, n_embd=640, n_ctx=256)


@pytest.fixture
def hub(big_model: Path) -> Iterator[HubServer]:
    with HubServer() as server:
        server.add_repo(REPO, {big_model.name: big_model})
        yield server


@pytest.fixture
def product(lmd_home: Path, hub: HubServer) -> Iterator[Product]:
    with installed(lmd_home, HF_ENDPOINT=hub.endpoint) as made:
        yield made


def on_disk_bytes(product: Product) -> int:
    """Return the disk space that unfinished transfers take."""
    files = (product.home / "store" / "ingest").rglob("*")
    return sum(path.stat().st_blocks * 512 for path in files if path.is_file())


def test_ten_kills_in_one_pull(product: Product, hub: HubServer, big_model: Path) -> None:
    size = big_model.stat().st_size
    moments = random.Random(20261121)
    for _ in range(10):
        daemon = product.start()
        assert product.json("ls") == []
        # At a random byte of the next twelfth of the file the server itself kills the daemon, as soon as some of what
        # is in the sockets has reached the disk.
        killed = threading.Event()
        before = on_disk_bytes(product)

        def kill(daemon: Daemon = daemon, killed: threading.Event = killed, before: int = before) -> None:
            wait_until(lambda: on_disk_bytes(product) > before, "something new is on the disk")
            daemon.kill()
            killed.set()

        moment = hub.sent_bytes(REPO, big_model.name) + moments.randrange(size // 24, size // 12)
        hub.fault(REPO, big_model.name, Trigger(moment, kill))
        pull = product.lm("pull", f"hf.co/{REPO}", code=3)
        assert killed.wait(10), pull.stderr

    product.start()
    hub.requests.clear()
    product.lm("pull", f"hf.co/{REPO}", timeout_s=120)
    offsets = [request.byte_range[0] for request in hub.data_requests(big_model.name) if request.byte_range]
    assert offsets, "the last pull asked for ranges"
    assert min(offsets) > 0, "and did not start over"
    digest = hashlib.sha256(big_model.read_bytes()).hexdigest()
    blob = product.home / "store" / "blobs" / "sha256" / digest
    assert hashlib.sha256(blob.read_bytes()).hexdigest() == digest
    assert product.json("gc", "--dry-run", "--grace", "0s")["items"] == []


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
