"""Builds llama.cpp's sampler chain for a request.

Order, as in llama.cpp's own tools: penalties, top-k, typical, top-p, min-p, temperature, choice. Mirostat replaces the
cutting samplers; temperature 0 replaces everything but the penalties with the best token.
"""

from __future__ import annotations

import math
from array import array
from typing import Any

from lmd.runner.v1 import frames_pb2

# The number of most likely tokens mirostat 1 estimates from: the paper's m.
_MIROSTAT_M = 100


def check_sampling(sampling: frames_pb2.Sampling) -> str:
    """Return what is wrong with the values, empty when nothing is.

    The daemon has checked the ranges; this catches what would make the engine compute nonsense or stop.
    """
    for name in (
        "temperature",
        "top_p",
        "min_p",
        "typical_p",
        "repeat_penalty",
        "presence_penalty",
        "frequency_penalty",
        "mirostat_tau",
        "mirostat_eta",
    ):
        if not math.isfinite(getattr(sampling, name)):
            return f"{name} is not a finite number"
    if sampling.repeat_penalty <= 0:
        return "repeat_penalty must be above 0"
    if sampling.mirostat not in (0, 1, 2):
        return "mirostat must be 0, 1 or 2"
    return ""


def make_sampler(
    llama: Any, sampling: frames_pb2.Sampling, *, vocab_size: int, num_ctx: int, prompt: array[int]
) -> Any:
    """Return a chain that has seen the end of the prompt; free it with `llama_sampler_free`."""
    chain = llama.llama_sampler_chain_init(llama.llama_sampler_chain_default_params())

    def add(sampler: Any) -> None:
        llama.llama_sampler_chain_add(chain, sampler)

    penalties = _make_penalties(llama, sampling, vocab_size=vocab_size, num_ctx=num_ctx, prompt=prompt)
    if penalties is not None:
        add(penalties)
    if sampling.temperature <= 0:
        add(llama.llama_sampler_init_greedy())
    elif sampling.mirostat == 1:
        add(llama.llama_sampler_init_temp(sampling.temperature))
        add(
            llama.llama_sampler_init_mirostat(
                vocab_size, sampling.seed, sampling.mirostat_tau, sampling.mirostat_eta, _MIROSTAT_M
            )
        )
    elif sampling.mirostat == 2:
        add(llama.llama_sampler_init_temp(sampling.temperature))
        add(llama.llama_sampler_init_mirostat_v2(sampling.seed, sampling.mirostat_tau, sampling.mirostat_eta))
    else:
        if sampling.top_k > 0:
            add(llama.llama_sampler_init_top_k(sampling.top_k))
        if sampling.typical_p < 1:
            add(llama.llama_sampler_init_typical(sampling.typical_p, 1))
        if sampling.top_p < 1:
            add(llama.llama_sampler_init_top_p(sampling.top_p, 1))
        if sampling.min_p > 0:
            add(llama.llama_sampler_init_min_p(sampling.min_p, 1))
        add(llama.llama_sampler_init_temp(sampling.temperature))
        add(llama.llama_sampler_init_dist(sampling.seed))
    return chain


def _make_penalties(
    llama: Any, sampling: frames_pb2.Sampling, *, vocab_size: int, num_ctx: int, prompt: array[int]
) -> Any:
    """Return the penalty sampler, or None when the values switch it off."""
    last_n = num_ctx if sampling.repeat_last_n < 0 else min(sampling.repeat_last_n, num_ctx)
    off = sampling.repeat_penalty == 1 and sampling.presence_penalty == 0 and sampling.frequency_penalty == 0
    if off or last_n == 0:
        return None
    penalties = llama.llama_sampler_init_penalties(
        vocab_size, last_n, sampling.repeat_penalty, sampling.frequency_penalty, sampling.presence_penalty
    )
    for token in prompt[-last_n:]:
        llama.llama_sampler_accept(penalties, token)
    return penalties
