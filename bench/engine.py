"""What the runner process costs beside llama-cpp-python called in-process, and what many streams gain.

    python -m bench.engine MODEL.gguf [--tokens 200] [--rounds 5] [--streams 8]

One stream: greedy, the same prompt and number of tokens, the two alternating so that whatever else the machine does
hits both; the figure is the ratio of the medians (above 1: the runner is faster). Many streams: tokens a second of all
together, and as a multiple of one stream. JSON on stdout.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

from tests.support.runner_client import RunnerProcess

PROMPT = "Once upon a time"


def in_process(model: Any, tokens: int) -> float:
    """Return tokens a second of `llama_cpp.Llama`, streaming as a program that shows them would."""
    start = time.perf_counter()
    count = sum(1 for _ in model.create_completion(PROMPT, max_tokens=tokens, temperature=0, stream=True))
    assert count >= tokens, f"it ended after {count} tokens"
    return tokens / (time.perf_counter() - start)


def one_stream(runner: RunnerProcess, tokens: int) -> float:
    """Return tokens a second of one request."""
    start = time.perf_counter()
    done = runner.ask(PROMPT, num_predict=tokens).done
    assert done.generated_tokens == tokens, f"it ended after {done.generated_tokens} tokens"
    return tokens / (time.perf_counter() - start)


def many_streams(runner: RunnerProcess, tokens: int, streams: int) -> float:
    """Return tokens a second of *streams* requests at once."""
    start = time.perf_counter()
    ids = [runner.submit(f"{PROMPT} number {index}", num_predict=tokens) for index in range(streams)]
    count = sum(runner.answer(request_id).done.generated_tokens for request_id in ids)
    return count / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--num-ctx", type=int, default=512)
    options = parser.parse_args()
    # Here, not above: the runner must come up as it does in the daemon, which never imports this.
    import llama_cpp

    with RunnerProcess() as single, RunnerProcess() as many:
        ready = single.load(options.model, num_ctx=options.num_ctx, slots=4, num_batch=512, num_thread=0)
        many.load(options.model, num_ctx=options.num_ctx, slots=options.streams, num_batch=512, num_thread=0)
        model = llama_cpp.Llama(str(options.model), n_ctx=options.num_ctx, verbose=False)
        one_stream(single, options.tokens)
        in_process(model, options.tokens)
        pairs = [(one_stream(single, options.tokens), in_process(model, options.tokens)) for _ in range(options.rounds)]
        ours, theirs = (statistics.median(side) for side in zip(*pairs, strict=True))
        together = statistics.median(many_streams(many, options.tokens, options.streams) for _ in range(options.rounds))
    print(
        json.dumps(
            {
                "model": options.model.name,
                "threads": ready.num_thread,
                "runner_tokens_per_s": round(ours, 1),
                "in_process_tokens_per_s": round(theirs, 1),
                "ratio": round(ours / theirs, 3),
                "streams": options.streams,
                "streams_tokens_per_s": round(together, 1),
                "streams_gain": round(together / ours, 2),
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
