"""`lm fit` and `lm lease` against a real daemon: what they say, and what the machine then does."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support.hub import HubServer
from tests.support.product import Product, command, wait_until
from tests.support.shared_models import STORIES

REF = "hf.co/test/stories"


def fit(product: Product, *args: str, code: int = 0) -> Any:
    return json.loads(product.lm("fit", "--json", *args, code=code).stdout)


def python(code: str) -> tuple[str, ...]:
    return ("--", sys.executable, "-c", code)


def test_before_a_download_and_after_it(product: Product, hub: HubServer) -> None:
    product.start()
    before = fit(product, REF)
    assert before["fits"]
    assert (before["stored"], before["download_bytes"]) == (False, STORIES.stat().st_size)
    assert product.json("ls") == []
    assert len(hub.data_requests(STORIES.name)) == 1
    product.lm("pull", REF)
    after = fit(product, REF)
    assert (after["stored"], after["download_bytes"]) == (True, 0)
    same = ("total_bytes", "weights_bytes", "kv_bytes", "compute_bytes", "devices", "context_length", "layers")
    assert {key: before[key] for key in same} == {key: after[key] for key in same}
    parts = ("weights_bytes", "kv_bytes", "compute_bytes", "beside_bytes")
    assert after["total_bytes"] == sum(after[part] for part in parts)


def test_after_a_run_it_says_what_was_measured(product: Product) -> None:
    product.start()
    product.lm("pull", REF)
    guessed = fit(product, REF)
    assert (guessed["measured"], guessed["tokens_per_second"]) == (False, None)
    # Beyond its context: of what takes less than 50 ms no speed is learned, and fast machines do 200 tokens in that.
    long = ("--context", "shift", "-o", "num_predict=2000", "-o", "temperature=0", "-o", "ignore_eos=true")
    product.lm("run", REF, "Once upon a time", *long)
    measured = fit(product, REF)
    assert measured["measured"]
    assert measured["calibrated"]
    assert measured["tokens_per_second"] > 1
    assert measured["reason"] == "is in memory already, on cpu"
    assert measured["weights_bytes"] == pytest.approx(guessed["weights_bytes"], rel=0.01)
    assert measured["kv_bytes"] == pytest.approx(guessed["kv_bytes"], rel=0.01)


def test_a_machine_without_room(product: Product) -> None:
    """A reserve larger than the machine leaves nothing for models."""
    product.start(LMD_RUNTIME_MEMORY_RESERVE_BYTES="1TiB")
    told = fit(product, REF, code=1)
    assert not told["fits"]
    assert told["largest_context_length"] == 0
    assert "needed" in told["reason"]
    assert product.lm("fit", REF, code=1).stdout.startswith(f"{REF} does not fit on main memory: ")
    assert "can be freed" in product.lm("lease", "1GiB", "--", "true", code=1).stderr


def test_a_model_that_is_nowhere(product: Product) -> None:
    product.start()
    assert "does not exist" in product.lm("fit", "hf.co/test/nothing", code=1).stderr


def test_a_lease_ends_with_its_command_and_with_lm(product: Product, tmp_path: Path) -> None:
    daemon = product.start()
    ran = product.lm("lease", "1MiB", *python("import sys; print('out'); sys.exit(7)"), code=7)
    assert ran.stdout == "out\n"
    assert product.json("ps", "--plan")["recent"][0]["action"] == "hold"
    wait_until(lambda: daemon.log.read_text().count("lease_ended") == 1, "the lease ended")
    process = product.spawn_lm("lease", "1MiB", *python("print('ready', flush=True); import signal; signal.pause()"))
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    wait_until(lambda: daemon.log.read_text().count("lease_ended") == 2, "the lease ended with `lm`")
    for child in children:
        child.kill()
    process.communicate(timeout=30)


def test_a_daemon_that_stops_tells_who_holds_a_lease(product: Product) -> None:
    daemon = product.start()
    code = "print('ready', flush=True); import sys; sys.stdin.readline(); print('went on')"
    process = subprocess.Popen(
        [command("lm"), "--no-start", "lease", "1MiB", *python(code)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=product.environment(),
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    assert daemon.stop(20) == 0
    out, err = process.communicate("\n", timeout=30)
    assert (out, process.returncode) == ("went on\n", 0)
    assert "the lease is lost: the daemon is shutting down" in err
