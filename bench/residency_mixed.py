"""Three models where two fit, and clients that ask for any of them: what goes wrong, who waits, what is loaded."""

from __future__ import annotations

import random
import statistics
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from bench.answers import now_s
from bench.figures import Figure
from bench.meter import UsageMeter
from bench.models import benchmark_models
from bench.prompts import prompt
from bench.residents import LlamaRouter, ModelServer, OurModels
from lmd.v1.runtime_service_pb2 import Runner
from tests.support.least_recently_used import lru_loads

MODELS = ("one", "two", "three")
ROOM = 2
CLIENTS = 6
WAIT_LIMIT = 3.0
LOADS_LIMIT = 3.0
_PROMPT_TOKENS = (16, 64, 256)
_NEW_TOKENS = (8, 32, 64)


@dataclass(slots=True)
class Request:
    """What became of one request; times in seconds since the start of the measurement.

    Attributes:
        first_s: when the first text came; None when none did.
        error: what went wrong; "" when nothing did.
    """

    client: int
    model: str
    arrival_s: float
    tokens: int
    first_s: float | None = None
    end_s: float = 0.0
    error: str = ""

    @property
    def killed(self) -> bool:
        """Whether it had begun to be answered when it failed."""
        return bool(self.error) and self.first_s is not None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of all requests of one server.

    Attributes:
        most_ready: how many models were ready at once; 0 where only their number is bounded.
        drift_bytes: by how much the machine's free memory moved without the models.
    """

    name: str
    requests: Sequence[Request]
    loads: int
    elapsed_s: float
    most_ready: int
    others_cores: float
    drift_bytes: int = 0

    @property
    def errors(self) -> int:
        return sum(bool(request.error) for request in self.requests)

    @property
    def killed(self) -> int:
        return sum(request.killed for request in self.requests)

    @property
    def longest_wait_s(self) -> float:
        """The longest time to the first token; a request that never had one waited until it failed."""
        return max((r.end_s if r.first_s is None else r.first_s) - r.arrival_s for r in self.requests)

    @property
    def loads_per_request(self) -> float:
        return self.loads / len(self.requests)


def fair_share_s(requests: Sequence[Request], clients: int, elapsed_s: float) -> float:
    """Return the time in which each of *clients* has one answer when all have the same share.

    Clients ask again as soon as they have an answer. So the time from one answer to the next of the same client is, on
    average over all of them, the number of clients over the answers a second (Little's law). That takes loads, other
    answers and the speed of the machine into account; to wait *n* times as long is to be passed over *n* times.
    """
    answered = sum(not request.error for request in requests)
    return clients * elapsed_s / answered if answered else float("inf")


def mixed(
    program: Path, duration_s: float, num_ctx: int, *, steady: bool, with_router: bool
) -> tuple[list[Figure], dict[str, object]]:
    """Return the figures of clients that ask for *duration_s*; *with_router* has llama-server's router asked too."""
    models = dict(zip(MODELS, benchmark_models(len(MODELS)), strict=True))
    with OurModels(models, room=ROOM, num_ctx=num_ctx, steady=steady) as ours:
        facts = ours.facts()
        outcome = run_clients(ours, duration_s)
    theirs = None
    if with_router:
        with LlamaRouter(program, models, room=ROOM, num_ctx=num_ctx) as router:
            theirs = run_clients(router, duration_s)
    return _figures(outcome, theirs, steady=steady), {
        "mixed": {**facts, "ours": _told(outcome), "theirs": _told(theirs) if theirs else None}
    }


def run_clients(server: ModelServer, duration_s: float) -> Outcome:
    """Let all clients ask one request after the other until the time is over, and finish what is running then."""
    requests: list[Request] = []
    stop = threading.Event()
    most_ready = 0
    free: list[int] = []
    begin_s, loads_before = now_s(), server.loads()
    meter = UsageMeter(server.pids, ())
    clients = [
        threading.Thread(target=_client, args=(server, number, begin_s, duration_s, requests))
        for number in range(CLIENTS)
    ]

    def watch() -> None:
        nonlocal most_ready
        # Of the router it is known: it counts models, and nothing else.
        while isinstance(server, OurModels) and not stop.wait(0.5):
            # One that loads may still wait for the memory of one that leaves.
            ready = [runner for runner in server.residents() if runner.state == Runner.STATE_READY]
            most_ready = max(most_ready, len(ready))
            free.append(server.free_without_us_bytes())

    watcher = threading.Thread(target=watch)
    for thread in (*clients, watcher):
        thread.start()
    for thread in clients:
        thread.join()
    elapsed_s = now_s() - begin_s
    stop.set()
    watcher.join()
    requests.sort(key=lambda request: request.arrival_s)
    loads, drift_bytes = server.loads() - loads_before, max(free, default=0) - min(free, default=0)
    return Outcome(server.name, requests, loads, elapsed_s, most_ready, meter.read().others, drift_bytes)


def _client(server: ModelServer, client: int, begin_s: float, duration_s: float, into: list[Request]) -> None:
    """Ask as the client's number says, whatever is answered: all servers are asked for the same."""
    choose = random.Random(f"mixed/{client}")
    number = 0
    while now_s() - begin_s < duration_s:
        model = choose.choice(MODELS)
        length, tokens = choose.choice(_PROMPT_TOKENS), choose.choice(_NEW_TOKENS)
        request = Request(client, model, now_s() - begin_s, tokens)

        def note(request: Request = request) -> None:
            if request.first_s is None:
                request.first_s = now_s() - begin_s

        try:
            answer = server.ask(model, prompt(length, "mixed", client, number), tokens, on_text=note)
            if not answer.complete or answer.generated_tokens != tokens:
                request.error = f"ended after {answer.generated_tokens} of {tokens} tokens"
        except Exception as error:
            # Whatever a server does to its clients is what is counted here.
            request.error = f"{type(error).__name__}: {str(error)[:300]}"
        request.end_s = now_s() - begin_s
        into.append(request)
        number += 1


def _figures(ours: Outcome, theirs: Outcome | None, *, steady: bool) -> list[Figure]:
    def figure(
        title: str, unit: str, of_ours: float, of_theirs: float | None, value: float, kind: str, limit: float
    ) -> Figure:
        return Figure("mixed", title, unit, of_ours, of_theirs, value, kind, limit, ours.others_cores)

    share_s = fair_share_s(ours.requests, CLIENTS, ours.elapsed_s)
    lru = lru_loads([request.model for request in ours.requests], ROOM) / len(ours.requests)
    spared = lru / ours.loads_per_request if ours.loads else float("inf")
    title = f"{CLIENTS} clients, {len(MODELS)} models where {ROOM} fit"
    figures = [
        figure(f"{title}: errors", "", ours.errors, theirs.errors if theirs else None, ours.errors, "<=", 0),
        figure("answers that were killed", "", ours.killed, theirs.killed if theirs else None, ours.killed, "<=", 0),
        figure(
            "longest wait for a first token, to the fair share",
            "s",
            ours.longest_wait_s,
            share_s,
            ours.longest_wait_s / share_s,
            "<=",
            WAIT_LIMIT,
        ),
        figure(
            "loads per request: how much fewer than LRU on the same arrivals",
            "",
            ours.loads_per_request,
            lru,
            spared,
            ">=",
            LOADS_LIMIT,
        ),
        figure("models ready at once", "", ours.most_ready, None, ours.most_ready, "<=", ROOM),
    ]
    if not steady:
        moved = ours.drift_bytes / 1e6
        figures.append(figure("free memory that others took or gave back meanwhile", "MB", moved, None, moved, "", 0))
    if theirs is not None:
        rates = [len(outcome.requests) / outcome.elapsed_s for outcome in (ours, theirs)]
        figures += [
            figure("answers a second, to the router", "/s", rates[0], rates[1], rates[0] / rates[1], "", 0),
            figure(
                "loads per request, to the router",
                "",
                ours.loads_per_request,
                theirs.loads_per_request,
                ours.loads_per_request / theirs.loads_per_request,
                "",
                0,
            ),
            figure(
                "longest wait, to the router",
                "s",
                ours.longest_wait_s,
                theirs.longest_wait_s,
                ours.longest_wait_s / theirs.longest_wait_s,
                "",
                0,
            ),
        ]
    return figures


def _told(outcome: Outcome) -> dict[str, object]:
    waits = [r.first_s - r.arrival_s for r in outcome.requests if r.first_s is not None]
    return {
        "answers": len(outcome.requests),
        "loads": outcome.loads,
        "elapsed_s": outcome.elapsed_s,
        "drift_bytes": outcome.drift_bytes,
        "median_wait_s": statistics.median(waits) if waits else None,
        "errors": sorted({request.error for request in outcome.requests if request.error}),
        "requests": [asdict(request) for request in outcome.requests],
    }
