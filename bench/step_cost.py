"""What it costs to decode several tokens of one sequence at once, as a multiple of one: when drafting can pay.

    python -m bench.step_cost MODEL.gguf [--threads 2] [--context 256] [--rounds 6]

Each figure is the least of all rounds, in which the counts take turns so that whatever else the machine does hits all
of them; what was measured while other processes computed does not count. Every token gets logits, as verifying a draft
needs. JSON on stdout.
"""

from __future__ import annotations

import argparse
import json
import time
from array import array
from pathlib import Path
from typing import Any

from bench.meter import UsageMeter, wait_for_quiet
from lmd.runner.batch import Batch
from lmd.runner.log import EngineLog
from lmd.runner.memory import Memory
from lmd.runner.native import load_bindings

COUNTS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 16, 17, 24, 32)
STEP = 64
TRIES = 3
NOISY_CORES = 0.1
PATIENCE_S = 30.0


def open_context(llama: Any, model: Any, *, num_ctx: int, threads: int) -> Any:
    """Return a context of one sequence that can give the logits of a whole step."""
    params = llama.llama_context_default_params()
    params.n_ctx = num_ctx
    params.n_batch = params.n_ubatch = params.n_outputs_max = STEP
    params.n_seq_max = 1
    params.no_perf = True
    context = llama.llama_init_from_model(model, params)
    llama.llama_set_n_threads(context, threads, threads)
    return context


def seconds_by_count(llama: Any, model: Any, *, context_tokens: int, threads: int, rounds: int) -> dict[int, float]:
    """Return the least time of a step for each count of tokens."""
    context = open_context(llama, model, num_ctx=context_tokens + STEP, threads=threads)
    memory, batch = Memory(llama, context, model), Batch(llama, STEP, 1)

    def decode(tokens: list[int], position: int, *, outputs: bool) -> None:
        batch.clear()
        if outputs:
            for offset, token in enumerate(tokens):
                batch.add(token, position + offset, 0)
        else:
            batch.add_chunk(array("i", tokens), position, 0, sample=False)
        code = llama.llama_decode(context, batch.finish())
        assert code == 0, f"the engine failed (code {code})"
        llama.llama_synchronize(context)

    size = int(llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model)))
    some = [(1000 + 7 * number) % size for number in range(context_tokens + STEP)]
    for begin in range(0, context_tokens, STEP):
        decode(some[begin : min(begin + STEP, context_tokens)], begin, outputs=False)
    best: dict[int, float] = {}
    for _ in range(rounds):
        wait_for_quiet(NOISY_CORES, PATIENCE_S)
        for count in COUNTS:
            usage = UsageMeter((), ())
            seconds = []
            for _ in range(TRIES):
                memory.keep(0, context_tokens)
                start = time.perf_counter()
                decode(some[context_tokens : context_tokens + count], context_tokens, outputs=True)
                seconds.append(time.perf_counter() - start)
            if usage.read().others <= NOISY_CORES:
                best[count] = min(best.get(count, float("inf")), *seconds)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--gpu-layers", type=int, default=0)
    options = parser.parse_args()
    llama = load_bindings()
    log = EngineLog(llama)
    llama.llama_backend_init()
    params = llama.llama_model_default_params()
    params.n_gpu_layers = options.gpu_layers
    model = llama.llama_model_load_from_file(str(options.model).encode(), params)
    if not model:
        raise SystemExit(log.errors())
    best = seconds_by_count(
        llama, model, context_tokens=options.context, threads=options.threads, rounds=options.rounds
    )
    if 1 not in best:
        raise SystemExit("the machine was busy with other things all the time")
    print(
        json.dumps(
            {
                "model": options.model.name,
                "threads": options.threads,
                "one_token_ms": round(best[1] * 1000, 2),
                "multiples": {count: round(seconds / best[1], 2) for count, seconds in sorted(best.items())},
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
