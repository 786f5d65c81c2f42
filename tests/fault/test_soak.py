"""A daemon under load whose runners are killed, stopped and asked for by turns: every request gets an end.

Each request is answered whole, or refused or ended with a reason; nothing is cut without a word, nobody waits for ever,
and when the storm is over everything works and nothing is left over.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import random
import signal
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest

from tests.support.product import Daemon, Product, installed, wait_until
from tests.support.tiny_models import make_tiny_llama

pytestmark = [pytest.mark.fault, pytest.mark.e2e]

MODELS = ("one", "two", "three")
CLIENTS = 6
#: What a request may take: a load in a storm of failures waits for pauses of up to half a minute.
PATIENCE_S = 120.0
#: What errors that are somebody's doing say, in the words of the daemon.
REASONS = ("died", "too many requests", "does not fit", "was unloaded", "made no progress", "did not answer for")


@pytest.fixture
def product(lmd_home: Path, tmp_path: Path) -> Iterator[Product]:
    with installed(lmd_home) as made:
        made.start()
        for number, name in enumerate(MODELS):
            weights = make_tiny_llama(tmp_path / f"{name}.gguf", seed=number, n_ctx=2048)
            (tmp_path / "Modelfile").write_text(f"FROM {weights}\n")
            made.lm("create", name, "-f", str(tmp_path / "Modelfile"))
        yield made


def runners(daemon: Daemon) -> list[psutil.Process]:
    """Return the daemon's runners, those of models and a spare one."""
    found = []
    for child in psutil.Process(daemon.pid).children():
        with contextlib.suppress(psutil.NoSuchProcess):
            if "lmd.runner.main" in child.cmdline():
                found.append(child)
    return found


class Storm:
    """Clients that ask, and a hand that kills, until the time is over."""

    def __init__(self, product: Product, seed: int) -> None:
        self.outcomes: Counter[str] = Counter()
        #: Requests that got no proper end, with what came instead.
        self.wrongs: list[str] = []
        self._product = product
        self._daemon = product.daemons[-1]
        self._address = urlsplit(product.http_url)
        self._chances = random.Random(seed)
        self._over = threading.Event()

    def rage(self, seconds: float) -> None:
        """Go on for *seconds*, and then until the last request has its end."""
        seeds = [self._chances.random() for _ in range(CLIENTS)]
        threads = [threading.Thread(target=self._ask_on, args=(random.Random(seed),)) for seed in seeds]
        threads.append(threading.Thread(target=self._kill_on))
        for thread in threads:
            thread.start()
        self._over.wait(seconds)
        self._over.set()
        for thread in threads:
            thread.join(2 * PATIENCE_S)
        self.wrongs += [f"{thread.name} still waits" for thread in threads if thread.is_alive()]

    def _ask_on(self, chances: random.Random) -> None:
        while not self._over.is_set():
            try:
                self.outcomes[self._ask(chances)] += 1
            except Exception as error:  # whatever it is, the test has to show it
                self.wrongs.append(repr(error))

    def _ask(self, chances: random.Random) -> str:
        body: dict[str, Any] = {
            "model": chances.choice(MODELS),
            "prompt": "once upon a time " * chances.randrange(1, 20),
            "options": {"num_predict": chances.choice((1, 20, 200)), "num_ctx": chances.choice((256, 256, 512))},
        }
        if (keep_alive := chances.choice((None, None, "0s", "1s"))) is not None:
            body["keep_alive"] = keep_alive
        connection = http.client.HTTPConnection(self._address.hostname or "", self._address.port, timeout=PATIENCE_S)
        with contextlib.closing(connection):
            connection.request("POST", "/api/generate", json.dumps(body))
            response = connection.getresponse()
            lines_left = chances.choice((1, 1 << 20, 1 << 20, 1 << 20))
            last: dict[str, Any] = {}
            while (line := response.readline()).strip():
                last = json.loads(line)
                lines_left -= 1
                if not lines_left:
                    return "left"
            return self._outcome(response.status, last)

    def _outcome(self, status: int, last: dict[str, Any]) -> str:
        if last.get("done") is True and last.get("done_reason") in ("stop", "length"):
            return "answered"
        error = str(last.get("error", ""))
        if not any(reason in error for reason in REASONS):
            self.wrongs.append(f"status {status}, last line {last}")
        return "refused"

    def _kill_on(self) -> None:
        while not self._over.wait(self._chances.uniform(0.05, 0.8)):
            victims = runners(self._daemon)
            if not victims:
                continue
            victim = self._chances.choice(victims)
            with contextlib.suppress(psutil.NoSuchProcess):
                match self._chances.choice(("kill", "kill", "abort", "stop")):
                    case "kill":
                        victim.kill()
                    case "abort":
                        victim.send_signal(signal.SIGABRT)
                    case "stop":
                        victim.suspend()
                        self._over.wait(self._chances.uniform(0.1, 1.0))
                        victim.resume()


def all_is_well(product: Product) -> None:
    """Every model answers, nothing waits, and only what is listed is there."""
    for name in MODELS:
        assert product.json("run", name, "hello", "-o", "num_predict=4")["response"]
    listed = product.json("ps")
    assert all(runner["slots_busy"] == runner["queued"] == 0 for runner in listed), listed
    for name in MODELS:
        product.lm("stop", name, code=None)
    wait_until(lambda: product.json("ps") == [], "nothing is loaded")
    wait_until(lambda: len(runners(product.daemons[-1])) <= 1, "no more than a spare runner is left")
    views = product.home / "run" / "runners"
    assert len(list(views.iterdir())) <= 1


@pytest.mark.parametrize(
    "seconds",
    [
        pytest.param(10, marks=pytest.mark.timeout(400)),
        pytest.param(600, marks=[pytest.mark.slow, pytest.mark.timeout(1200)]),
    ],
)
def test_every_request_has_an_end_whatever_dies(product: Product, seconds: int) -> None:
    all_is_well(product)
    me = psutil.Process(product.daemons[-1].pid)
    descriptors = me.num_fds()
    storm = Storm(product, seed=seconds)
    storm.rage(seconds)
    assert storm.wrongs == []
    assert storm.outcomes["answered"] > 0, storm.outcomes
    assert storm.outcomes["refused"] > 0, f"nobody was hit: {storm.outcomes}"
    all_is_well(product)
    wait_until(lambda: me.num_fds() <= descriptors + 8, f"descriptors are back to about {descriptors}")


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_loads_and_unloads_leave_nothing(product: Product) -> None:
    """Two hundred of each: the daemon is no larger afterwards, and has no more open files."""
    me = psutil.Process(product.daemons[-1].pid)

    def cycle(count: int) -> tuple[int, int]:
        for number in range(count):
            name = MODELS[number % len(MODELS)]
            product.json("run", name, "hello", "-o", "num_predict=1")
            product.lm("stop", name)
        wait_until(lambda: len(runners(product.daemons[-1])) <= 1, "no more than a spare runner is left")
        return me.num_fds(), me.memory_info().rss

    descriptors, resident_bytes = cycle(30)
    after_descriptors, after_bytes = cycle(200)
    assert after_descriptors <= descriptors + 6
    assert after_bytes <= resident_bytes + (8 << 20)
