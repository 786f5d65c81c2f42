"""One answer through the whole product, beside llama-cpp-python called in-process.

    python -m bench.stream [--rounds 5] [--big]

Ours: a Generate call of `lmd.v1` on the public socket of an installed daemon, as `lm run` makes it. Theirs:
`Llama.create_completion` streaming in this process, with the thread count that suits it best. Greedy, the same prompt
and number of tokens, alternating; the figure is the ratio of the medians. Bars: 0.5 on stories260K, where a token takes
less time than the way it travels; 0.95 on a model of 0.4 billion parameters (`--big`, which writes 1.6 GB of random
weights).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import grpc

from lmd.v1 import inference_service_pb2 as pb
from lmd.v1 import model_pb2
from lmd.v1.inference_service_pb2_grpc import InferenceServiceStub
from tests.support.product import Product, installed
from tests.support.shared_models import STORIES
from tests.support.tiny_models import make_tiny_llama

PROMPT = "Once upon a time"


def through_the_product(stub: InferenceServiceStub, tokens: int) -> float:
    """Return tokens a second of one Generate call, from the request to its end."""
    request = pb.GenerateRequest(
        model="bench",
        prompt=PROMPT,
        raw=True,
        parameters=model_pb2.Parameters(temperature=0, num_predict=tokens, num_ctx=512),
    )
    start = time.perf_counter()
    *_, last = stub.Generate(request)
    elapsed = time.perf_counter() - start
    assert last.done.generated_tokens == tokens, f"it ended after {last.done.generated_tokens} tokens"
    return tokens / elapsed


def in_process(model: Any, tokens: int) -> float:
    """Return tokens a second of `llama_cpp.Llama`, streaming as a program that shows them would."""
    start = time.perf_counter()
    count = sum(1 for _ in model.create_completion(PROMPT, max_tokens=tokens, temperature=0, stream=True))
    assert count >= tokens, f"it ended after {count} tokens"
    return tokens / (time.perf_counter() - start)


def best_in_process(path: Path, tokens: int) -> Any:
    """Return the peer with the faster of one thread and one for each core."""
    import llama_cpp

    made = [
        llama_cpp.Llama(str(path), n_ctx=512, n_threads=threads, verbose=False)
        for threads in {1, len(os.sched_getaffinity(0))}
    ]
    return max(made, key=lambda model: max(in_process(model, tokens) for _ in range(2)))


def measure(product: Product, path: Path, *, tokens: int, rounds: int) -> dict[str, object]:
    """Return the figures for one model file."""
    modelfile = product.home / "Modelfile"
    modelfile.write_text(f"FROM {path}\n")
    product.lm("create", "bench", "-f", str(modelfile), timeout_s=600)
    with grpc.insecure_channel(f"unix:{product.socket}") as channel:
        stub = InferenceServiceStub(channel)
        through_the_product(stub, tokens)
        model = best_in_process(path, tokens)
        pairs = [(through_the_product(stub, tokens), in_process(model, tokens)) for _ in range(rounds)]
    ours, theirs = (statistics.median(side) for side in zip(*pairs, strict=True))
    return {
        "model": path.name,
        "tokens": tokens,
        "product_tokens_per_s": round(ours, 1),
        "in_process_tokens_per_s": round(theirs, 1),
        "ratio": round(ours / theirs, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--big", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lm-bench-") as scratch:
        home = Path(scratch) / "home"
        home.mkdir()
        path, tokens = STORIES, 400
        if options.big:
            path, tokens = Path(scratch) / "random-0.4B-F32.gguf", 32
            make_tiny_llama(path, n_layer=20, n_embd=1280, n_head=20, n_ff=3456, n_ctx=512)
        with installed(home) as product:
            product.start()
            print(json.dumps(measure(product, path, tokens=tokens, rounds=options.rounds), indent=2))


if __name__ == "__main__":
    main()
