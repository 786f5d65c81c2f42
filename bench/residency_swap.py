"""Requests for a model that needs an eviction, beside llama-server's router on the same two models, in turns."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from bench.answers import Answer
from bench.figures import Figure
from bench.meter import UsageMeter, settle, wait_for_quiet
from bench.models import benchmark_models
from bench.prompts import prompt
from bench.residents import LlamaRouter, ModelServer, OurModels
from bench.serving_report import NOISY_CORES

MODELS = ("one", "two")
LIMIT = 1.0
_PROMPT_TOKENS, _NEW_TOKENS = 64, 8
_PATIENCE_S = 30.0
_IN_A_ROW = 6


def swap(program: Path, rounds: int) -> tuple[list[Figure], dict[str, object]]:
    """Return the times to the first token of requests that make the other model leave, and facts about them.

    Only one of two models fits. Each round asks each server for each model; the next round the other way round. Before
    each request both servers have settled: what a server prepares for the next load, it has prepared. Then the same
    without a pause between the requests, which no bar is about.
    """
    models = dict(zip(MODELS, benchmark_models(len(MODELS)), strict=True))
    with LlamaRouter(program, models, room=1) as theirs:
        for model in MODELS:
            theirs.ask(model, prompt(8, "warm", model), 1)
        # Ours comes second: it finds what the other one holds in use, and reserves from what is left.
        with OurModels(models, room=1) as ours:
            sides: tuple[ModelServer, ModelServer] = (ours, theirs)
            apart: dict[str, list[float]] = {side.name: [] for side in sides}
            others = 0.0
            for number in range(rounds):
                for model in MODELS:
                    for side in sides if number % 2 == 0 else sides[::-1]:
                        settle([*ours.pids, *theirs.pids])
                        wait_for_quiet(NOISY_CORES, _PATIENCE_S)
                        meter = UsageMeter(ours.pids, theirs.pids)
                        apart[side.name].append(_ask_other(side, model, "apart", number).first_token_s)
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
                answer = _ask_other(side, MODELS[turn % 2], "row", number, turn)
                # The last model of a round is the second one, so the first of the next is never there already.
                times[side.name].append(answer.first_token_s)
            others = max(others, meter.read().others)
    return times, others


def _ask_other(side: ModelServer, model: str, *seed: object) -> Answer:
    """Ask for *model*, and refuse an answer for which nothing had to be loaded."""
    before = side.loads()
    answer = side.ask(model, prompt(_PROMPT_TOKENS, "swap", model, *seed), _NEW_TOKENS)
    if not answer.complete or answer.generated_tokens != _NEW_TOKENS or answer.prompt_tokens != _PROMPT_TOKENS:
        raise RuntimeError(f"{side.name} answered with {answer.generated_tokens} of {_NEW_TOKENS} tokens")
    if side.loads() != before + 1:
        raise RuntimeError(f"{side.name} loaded {side.loads() - before} models for one request that needs one load")
    return answer


def _figure(title: str, measured: dict[str, list[float]], limit: float | None, others: float) -> Figure:
    ours, theirs = (statistics.median(measured[side]) for side in ("ours", "theirs"))
    kind = "<=" if limit is not None else ""
    return Figure(
        "swap", f"{title}, to llama-server's router", "s", ours, theirs, ours / theirs, kind, limit or 0, others
    )
