"""The HTTP gateway beside gRPC, and beside llama-cpp-python's own server.

    python -m bench.gateway [--cases first-token,streams,lists,crowd] [--rounds 5] [--quick] [--json FILE]

- `first-token`: the same request through Ollama's API and through gRPC, one after the other and then the other way
  round, on a tiny model whose cache has the prompt. The figure is the difference of the medians.
- `streams`: 8 answers at once on the model of 0.4 B parameters; the ratio of the medians of tokens a second.
- `lists`: `/api/tags` beside `/v1/models` of `llama_cpp.server`, one model each, 8 connections that stay.
- `crowd`: a fresh connection with one request, while 500 connections idle and 50 clients hardly read
  their answers; beside the same with nobody else. Once for `/api/tags`, once for an answer of one token.

Exit status 1 says that a bar was missed.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.answers import Server, ask_all, check, summary
from bench.figures import Figure, table
from bench.gateway_client import (
    Gateway,
    fresh_request_s,
    generate_body,
    idle_connections,
    post_request,
    requests_per_s,
    slow_readers,
    tags_request,
    wait_until_idle,
)
from bench.llama_cpp_server import LlamaCppServer
from bench.meter import UsageMeter, machine
from bench.models import benchmark_model
from bench.our_server import OurServer
from bench.prompts import prompt
from tests.support.shared_models import STORIES

_FREE_PORT = {"LMD_HTTP_LISTEN": "127.0.0.1:0"}
_STREAMS = 8
_IDLE, _SLOW = 500, 50
_CONNECTIONS = 8
_DESCRIPTORS = 4096


def first_token(rounds: int) -> list[Figure]:
    meter = UsageMeter((), ())
    with OurServer(STORIES, slots=1, num_ctx=512, settings=_FREE_PORT) as grpc:
        sides: tuple[Server, Server] = (Gateway(grpc), grpc)
        text = prompt(16, "first-token")
        for side in sides:
            side.ask(text, 1)
        measured: dict[str, list[float]] = {side.name: [] for side in sides}
        for number in range(40 * rounds):
            for side in sides if number % 2 else sides[::-1]:
                answer = side.ask(text, 1)
                check(side, answer, 1)
                measured[side.name].append(answer.first_token_s * 1e3)
    ours, theirs = (statistics.median(measured[side.name]) for side in sides)
    others = meter.read().others
    return [
        Figure(
            "first-token", "to the first token, more than gRPC", "ms", ours, theirs, ours - theirs, "<=", 1.0, others
        )
    ]


def streams(rounds: int) -> list[Figure]:
    meter = UsageMeter((), ())
    with OurServer(benchmark_model(), slots=_STREAMS, num_ctx=1024, settings=_FREE_PORT) as grpc:
        sides: tuple[Server, Server] = (Gateway(grpc), grpc)
        measured: dict[str, list[float]] = {side.name: [] for side in sides}
        for number in range(rounds):
            for side in sides if number % 2 else sides[::-1]:
                prompts = [prompt(64, "streams", number, side.name, client) for client in range(_STREAMS)]
                measured[side.name].append(summary(ask_all(side, prompts, 64))["tokens_per_s"])
    ours, theirs = (statistics.median(measured[side.name]) for side in sides)
    title = f"{_STREAMS} streams, 0.4 B, to gRPC"
    return [Figure("streams", title, "tokens/s", ours, theirs, ours / theirs, ">=", 0.95, meter.read().others)]


def lists(rounds: int) -> list[Figure]:
    meter = UsageMeter((), ())
    with OurServer(STORIES, slots=1, num_ctx=512, settings=_FREE_PORT) as server, LlamaCppServer(STORIES) as peer:
        sides = {"ours": (Gateway(server).port, "/api/tags"), "theirs": (peer.port, "/v1/models")}
        measured: dict[str, list[float]] = {name: [] for name in sides}
        for number in range(rounds):
            for name in sides if number % 2 else reversed(sides):
                port, path = sides[name]
                measured[name].append(requests_per_s(port, path, connections=_CONNECTIONS, duration_s=2.0))
    ours, theirs = statistics.median(measured["ours"]), statistics.median(measured["theirs"])
    title = "`/api/tags`, to `/v1/models` of llama_cpp.server"
    return [Figure("lists", title, "/s", ours, theirs, ours / theirs, ">=", 2.0, meter.read().others)]


def crowd(rounds: int) -> list[Figure]:
    meter = UsageMeter((), ())
    with OurServer(STORIES, slots=_STREAMS, num_ctx=512, settings=_FREE_PORT) as server:
        port = Gateway(server).port
        long = post_request(
            port,
            "/api/generate",
            # Log probabilities make an answer that no buffer of the kernel's takes.
            generate_body("once upon a time", 200, num_ctx=512, logprobs=True, top_logprobs=20),
        )
        short = post_request(port, "/api/generate", generate_body("the", 1, num_ctx=512, stream=False))
        requests = {"a list": tags_request(port), "an answer of one token": short}
        calm: dict[str, list[float]] = {name: [] for name in requests}
        crowded: dict[str, list[float]] = {name: [] for name in requests}
        for _ in range(rounds):
            _measure_fresh(port, requests, calm)
            with idle_connections(port, _IDLE), slow_readers(port, long, _SLOW):
                wait_until_idle(server)
                _measure_fresh(port, requests, crowded)
            wait_until_idle(server)
            _measure_fresh(port, requests, calm)
    others = meter.read().others
    figures = []
    for name in requests:
        ours, theirs = statistics.median(crowded[name]) * 1e3, statistics.median(calm[name]) * 1e3
        title = f"{name}, beside {_IDLE} idle connections and {_SLOW} slow readers, to alone"
        figures.append(Figure("crowd", title, "ms", ours, theirs, ours / theirs, "<=", 1.5, others))
    return figures


def _measure_fresh(port: int, requests: dict[str, bytes], into: dict[str, list[float]]) -> None:
    for _ in range(50):
        for name, request in requests.items():
            into[name].append(fresh_request_s(port, request))


CASES: dict[str, Callable[[int], list[Figure]]] = {
    "first-token": first_token,
    "streams": streams,
    "lists": lists,
    "crowd": crowd,
}


def main() -> None:
    options = _options()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, _DESCRIPTORS)), hard))
    figures: list[Figure] = []
    for name in options.cases:
        figures += CASES[name](options.rounds)
        print(f"{name}: done", file=sys.stderr)
    if options.json:
        whole: dict[str, Any] = {"machine": machine(), "rounds": options.rounds}
        whole["figures"] = [{**asdict(figure), "met": figure.met} for figure in figures]
        options.json.write_text(json.dumps(whole, indent=2) + "\n")
    busy = max(figure.others_cores for figure in figures)
    print(table(figures))
    print(f"\nEverything else on the machine used up to {busy:.2f} cores on average, the client included.")
    sys.exit(any(not figure.met for figure in figures))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=",".join(CASES), help="with commas between; default: all")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--quick", action="store_true", help="2 rounds, to see that all works")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    options.rounds = options.rounds or (2 if options.quick else 5)
    options.cases = options.cases.split(",")
    if unknown := [name for name in options.cases if name not in CASES]:
        parser.error(f"no such case: {', '.join(unknown)} (there are {', '.join(CASES)})")
    return options


if __name__ == "__main__":
    main()
