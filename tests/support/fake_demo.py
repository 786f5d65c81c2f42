"""A lively script for the fake daemon, to look at the screens of `lm` without models."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import grpc

from lmd.v1 import inference_service_pb2 as inference_pb
from lmd.v1 import model_service_pb2 as model_pb
from lmd.v1 import runtime_service_pb2 as runtime_pb
from tests.support.fake_daemon import MIB, FakeDaemon, text_events

_ANSWER = """\
# Ice

Ice is slippery because its **surface** is not quite solid. Three things work together, and the first alone would do \
for a skate:

1. The top layer of molecules is held on one side only, so it *moves*.
2. Pressure and friction melt a little more.
   - friction does most of it
   - pressure does less than people think
3. Water between two solids is a lubricant.

| cause | share |
|---|---|
| premelting | large |
| friction | medium |
| pressure | small |

```python
def slip(temperature_c: float) -> bool:
    \"\"\"Return whether one slips.\"\"\"
    return -40 < temperature_c < 0
```

> Faraday saw it in 1850.

So `slip(-7)` is true. <b>Tags</b> stay as they are.
"""


def _chat(request: inference_pb.ChatRequest, context: grpc.ServicerContext) -> Iterator[Any]:
    for step in range(8):
        load = runtime_pb.LoadProgress(fraction=step / 8)
        yield inference_pb.ChatResponse(waiting=inference_pb.Waiting(load=load))
        time.sleep(0.08)
    text = _ANSWER * 3 if "long" in request.messages[-1].content else _ANSWER
    for event in text_events(inference_pb.ChatResponse, text, size=5):
        time.sleep(0.01)
        if not context.is_active():
            return
        yield event


def _pull(request: model_pb.PullModelRequest, context: grpc.ServicerContext) -> Iterator[model_pb.PullModelResponse]:
    state = model_pb.PullProgress.State
    name = f"{request.ref}:latest"
    yield model_pb.PullModelResponse(started=model_pb.PullStarted(pull_id="p1", name=name))

    def step(filename: str, done: int, total: int, now: state, **more: Any) -> model_pb.PullModelResponse:  # type: ignore[valid-type]
        progress = model_pb.PullProgress(
            filename=filename, digest="sha256:" + "b" * 64, completed_bytes=done, total_bytes=total, state=now, **more
        )
        return model_pb.PullModelResponse(progress=progress)

    total = 1900 * MIB
    yield step("", 0, 0, state.STATE_RESOLVING, detail="asking hf.co")
    time.sleep(0.5)
    yield step("config.json", 800, 800, state.STATE_PRESENT)
    for done in range(600 * MIB, total, 12 * MIB):
        time.sleep(0.04)
        if done == 1200 * MIB:
            yield step(
                "llama-3.2-1b-instruct.Q4_K_M.gguf", done, total, state.STATE_RETRYING, detail="connection reset"
            )
            time.sleep(1)
        yield step("llama-3.2-1b-instruct.Q4_K_M.gguf", done, total, state.STATE_DOWNLOADING, resumed_bytes=600 * MIB)
    yield step("llama-3.2-1b-instruct.Q4_K_M.gguf", total, total, state.STATE_COMMITTING)
    time.sleep(0.5)
    yield step("llama-3.2-1b-instruct.Q4_K_M.gguf", total, total, state.STATE_DONE, resumed_bytes=600 * MIB)


def prepare(daemon: FakeDaemon) -> None:
    """Fill *daemon* with models, runners and slow answers."""
    info = daemon.add("llama3.2:latest", size_bytes=1_321_000_000, parameter_count=1_240_000_000, quantization="Q4_K_M")
    info.system = "You are a calm assistant."
    info.template = "{% for m in messages %}\n<|{{ m.role }}|>\n{{ m.content }}\n{% endfor %}\n" * 4
    info.licenses.append("Llama 3.2 Community License\n\nLong text.\nMore.\n")
    info.parameters.temperature = 0.6
    info.parameters.stop.extend(["<|eot_id|>", "<|end|>"])
    info.origin.ref = "hf.co/bartowski/Llama-3.2-1B-Instruct-GGUF:Q4_K_M"
    info.origin.commit = "067b946cf014b7c697f3654f621d577a3e3afd1c"
    info.origin.pulled_time.FromSeconds(int(time.time()) - 86400 * 3)
    daemon.add("hf.co/test/stories:latest", capabilities=("completion",), age_s=7200)
    daemon.chat = _chat

    def pull(request: Any, context: Any) -> Iterator[Any]:
        yield from _pull(request, context)
        yield model_pb.PullModelResponse(model=daemon.add(f"{request.ref}:latest", size_bytes=1900 * MIB).model)

    daemon.pull = pull
    runner = runtime_pb.Runner(
        name="llama3.2:latest",
        state=runtime_pb.Runner.STATE_READY,
        memory_bytes=1800 * MIB,
        device="cpu",
        context_length=4096,
        slots=4,
        slots_busy=1,
        pid=4711,
    )
    runner.expire_time.FromSeconds(int(time.time()) + 290)
    daemon.runners.append(runner)
    daemon.runners.append(
        runtime_pb.Runner(
            name="hf.co/test/stories:latest",
            state=runtime_pb.Runner.STATE_LOADING,
            memory_bytes=4 * MIB,
            device="cpu",
            context_length=512,
            slots=4,
            keep_forever=True,
        )
    )
