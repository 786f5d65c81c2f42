"""Requests for a model that needs an eviction, beside llama-server's router on the same two models, in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import grpc

from bench.figures import Figure
from bench.meter import UsageMeter, settle, wait_for_quiet
from bench.models import benchmark_models
from bench.prompts import prompt
from bench.residents import DISTURBED, LlamaRouter, ModelServer, OurModels
from bench.serving_report import NOISY_CORES

MODELS = ("one", "two")
LIMIT = 1.0
_PROMPT_TOKENS, _NEW_TOKENS = 64, 8
#: Ours starts a spare runner some seconds after a load.
_PAUSE_S = 5.0
_IN_A_ROW = 6
_ATTEMPTS = 3


def swap(
    program: Path, rounds: int, num_ctx: int, *, steady: bool, patience_s: float
) -> tuple[list[Figure], dict[str, object]]:
    """Return the times to the first token of requests that make the other model leave, and facts about them.

    Only one of two models fits. Each round asks each server for each model; the next round the other way round. Between
    requests there is a pause: what a server prepares for the next load, it has prepared. Then the same
    without a pause between the requests, which no bar is about.
    """
    models = dict(zip(MODELS, benchmark_models(len(MODELS)), strict=True))
    with LlamaRouter(program, models, room=1, num_ctx=num_ctx) as theirs:
        for model in MODELS:
            theirs.ask(model, prompt(8, "warm", model), 1)
        # Ours comes second: it finds what the other one holds in use, and reserves from what is left.
        with OurModels(models, room=1, num_ctx=num_ctx, steady=steady) as ours:
            sides: tuple[ModelServer, ModelServer] = (ours, theirs)
            apart: dict[str, list[float]] = {side.name: [] for side in sides}
            others = 0.0
            for number in range(rounds):
                for model in MODELS:
                    for side in sides if number % 2 == 0 else sides[::-1]:
                        time.sleep(_PAUSE_S)
                        settle([*ours.pids, *theirs.pids])
                        wait_for_quiet(NOISY_CORES, patience_s)
                        meter = UsageMeter(ours.pids, theirs.pids)
                        apart[side.name].append(_first_token_s(side, model, "apart", number))
                        others = max(others, meter.read().others)
            row, row_others = _in_a_row(sides, max(1, rounds // 2))
    figures = [_figure("a request that needs an eviction, to the first token", apart, LIMIT, others)]
    figures.append(_figure(f"the same, {_IN_A_ROW} in a row without a pause, each", row, None, row_others))
    return figures, {"swap": {"apart_s": apart, "in_a_row_s": row, **ours.facts()}}


def _in_a_row(sides: Sequence[ModelServer], rounds: int) -> tuple[dict[str, list[float]], float]:
    times: dict[str, list[float]] = {side.name: [] for side in sides}
    others = 0.0
    for number in range(rounds):
        for side in sides if number % 2 == 0 else sides[::-1]:
            settle([pid for one in sides for pid in one.pids])
            meter = UsageMeter(side.pids, [pid for one in sides if one is not side for pid in one.pids])
            for turn in range(_IN_A_ROW):
                # The last model of a round is the second one, so the first of the next is never there already.
                times[side.name].append(_first_token_s(side, MODELS[turn % 2], "row", number, turn))
            others = max(others, meter.read().others)
    return times, others


def _first_token_s(side: ModelServer, model: str, *seed: object) -> float:
    """Ask for *model* when the other one is resident, and return how long the first token took.

    A measurement in which ours had nothing to evict, or was refused the memory, is void: something else on the machine
    took or gave back memory. Then the memory is made scarce anew, and it is measured again.
    """
    (other,) = set(MODELS) - {model}
    for _ in range(_ATTEMPTS):
        if side.resident_models() != {other}:
            side.ask(other, prompt(_PROMPT_TOKENS, "before", other, *seed), 1)
        try:
            answer = side.ask(model, prompt(_PROMPT_TOKENS, "swap", model, *seed), _NEW_TOKENS)
        except grpc.RpcError as error:
            if error.code() != grpc.StatusCode.RESOURCE_EXHAUSTED:
                raise
        else:
            if not answer.complete or answer.generated_tokens != _NEW_TOKENS or answer.prompt_tokens != _PROMPT_TOKENS:
                raise RuntimeError(f"{side.name} answered with {answer.generated_tokens} of {_NEW_TOKENS} tokens")
            if side.resident_models() == {model}:
                return answer.first_token_s
        if isinstance(side, OurModels):
            side.make_scarce()
    raise RuntimeError(f"{side.name} had not one model resident at a time: {DISTURBED}")


def _figure(title: str, measured: dict[str, list[float]], limit: float | None, others: float) -> Figure:
    ours, theirs = (statistics.median(measured[side]) for side in ("ours", "theirs"))
    kind = "<=" if limit is not None else ""
    return Figure(
        "swap", f"{title}, to llama-server's router", "s", ours, theirs, ours / theirs, kind, limit or 0, others
    )
