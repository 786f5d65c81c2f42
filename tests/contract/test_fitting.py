"""Whether models fit: what is said of them before they are loaded or pulled, and that saying it changes nothing."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType

import pytest

from lmd.daemon.blocking import BlockingPool
from lmd.daemon.callers import Caller
from lmd.daemon.errors import UploadRequired
from lmd.daemon.fitting import CONTEXT_STEP, Fit, Fitting
from lmd.daemon.residency.plans import Placement, Share
from lmd.daemon.residency.values import RunnerState
from lmd.registry.digest import Digest
from lmd.registry.errors import InvalidRequest, ModelNotFound, PullCancelled
from lmd.registry.gguf import GgufHeader, TensorInfo
from lmd.registry.peek import PeekedModel
from lmd.registry.ref import ModelRef
from tests.support.residents import Model, World

GIB = 1 << 30
ME = Caller(uid=os.geteuid(), pid=None, user="me")
SOMEBODY = Caller(uid=os.geteuid() + 1, pid=None, user="somebody")

LAYERS, WIDTH, VOCABULARY, TRAINED = 32, 4096, 32_000, 131_072


def large_header(*, experts: int = 0, used: int = 0) -> GgufHeader:
    """The header of an 8 B model in F16, or of a mixture whose experts are as large as its one would be."""
    metadata: dict[str, object] = {
        "general.architecture": "llama",
        "llama.block_count": LAYERS,
        "llama.embedding_length": WIDTH,
        "llama.context_length": TRAINED,
        "llama.feed_forward_length": 4 * WIDTH,
        "llama.attention.head_count": 32,
        "llama.attention.head_count_kv": 8,
    }
    tensors = [_tensor("token_embd.weight", WIDTH, VOCABULARY), _tensor("output.weight", WIDTH, VOCABULARY)]
    for layer in range(LAYERS):
        tensors.append(_tensor(f"blk.{layer}.attn_q.weight", WIDTH, WIDTH))
        if experts:
            tensors.append(_tensor(f"blk.{layer}.ffn_up_exps.weight", WIDTH, 4 * WIDTH, experts))
        else:
            tensors.append(_tensor(f"blk.{layer}.ffn_up.weight", WIDTH, 4 * WIDTH))
    if experts:
        metadata |= {"llama.expert_count": experts, "llama.expert_used_count": used}
    return GgufHeader(3, 32, MappingProxyType(metadata), tuple(tensors), 0, sum(t.size_bytes for t in tensors))  # type: ignore[arg-type]


def _tensor(name: str, *shape: int) -> TensorInfo:
    items = 1
    for size in shape:
        items *= size
    return TensorInfo(name, shape, "F16", 0, 2 * items)


@dataclass
class Shelf:
    """Models that are in the store, and models that are elsewhere."""

    stored: dict[str, Model] = field(default_factory=dict)
    elsewhere: dict[str, PeekedModel] = field(default_factory=dict)
    tokens: list[str | None] = field(default_factory=list)
    slow: threading.Event | None = None
    left: threading.Event = field(default_factory=threading.Event)

    async def resolve(self, text: str) -> Model:
        if text not in self.stored:
            raise ModelNotFound(text)
        return self.stored[text]

    def peek(self, ref: ModelRef, *, token: str | None, cancelled: threading.Event) -> PeekedModel:
        self.tokens.append(token)
        if self.slow is not None:
            self.slow.set()
            assert cancelled.wait(30)
            self.left.set()
            raise PullCancelled
        if ref.name not in self.elsewhere:
            raise ModelNotFound(ref.name)
        return self.elsewhere[ref.name]


class Bench:
    """Asks whether models fit on a machine."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.shelf = Shelf()
        self._pool = BlockingPool(2, "peek")

    def add(self, name: str, header: GgufHeader, *, gpu: bool = False) -> Model:
        model = replace(self.world.model(name, gpu=gpu), header=header)
        self.shelf.stored[name] = model
        return model

    async def fit(self, name: str, parameters: Mapping[str, object] | None = None, *, caller: Caller = ME) -> Fit:
        fitting = Fitting(self.shelf, self.shelf, self.world.residency, self._pool)
        async with asyncio.timeout(30):
            return await fitting.fit(name, parameters or {}, caller=caller, token="hf_x")

    def close(self) -> None:
        self._pool.close()


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    world = World(tmp_path, free_bytes=64 * GIB)
    world.memory.measured = False
    made = Bench(world)
    yield made
    made.close()
    await world.close()


async def test_a_model_in_the_store(bench: Bench) -> None:
    header = large_header()
    bench.add("large", header)
    fit = await bench.fit("large", {"num_ctx": 8192})
    assert fit.fits
    assert (fit.stored, fit.measured, fit.download_bytes) == (True, False, 0)
    assert fit.weights_bytes == header.weights_bytes
    assert fit.kv_bytes == 8192 * 2 * LAYERS * 8 * (128 + 128) * 2
    assert fit.total_bytes == fit.weights_bytes + fit.kv_bytes + fit.compute_bytes + fit.beside_bytes
    assert fit.shares == (("cpu", fit.total_bytes),)
    assert (fit.gpu_layers, fit.layers) == (0, LAYERS + 1)
    assert (fit.context_length, fit.trained_context_length, fit.slots) == (8192, TRAINED, 2)


async def test_it_goes_to_the_accelerator_first(bench: Bench) -> None:
    bench.world.gpu_free_bytes = 32 * GIB
    bench.add("large", large_header())
    fit = await bench.fit("large")
    assert fit.shares[0][0] == "cuda0"
    assert fit.gpu_layers == fit.layers == LAYERS + 1
    assert sum(size for _, size in fit.shares) == fit.total_bytes


async def test_asking_changes_nothing(bench: Bench) -> None:
    old = bench.add("old", large_header())
    await bench.world.ask(old, "hi")
    bench.add("large", large_header())
    for _ in range(2):
        await bench.fit("large", {"num_ctx": 8192})
    assert bench.world.state(old) is RunnerState.READY
    assert [status.name for status in bench.world.residency.list()] == ["old:latest"]
    assert bench.world.residency.loader.ledger.waiting() == []


async def test_who_would_leave_is_named(bench: Bench) -> None:
    old = bench.world.model("old", memory_bytes=58 * GIB)
    await bench.world.ask(old, "hi")
    bench.add("large", large_header())
    fit = await bench.fit("large", {"num_ctx": 8192})
    assert fit.fits
    assert fit.evicted == ("old:latest",)
    assert "`old:latest` leaves" in fit.reason


async def test_what_is_said_is_what_happens(bench: Bench) -> None:
    bench.world.gpu_free_bytes = 4 * GIB
    old = bench.world.model("old", memory_bytes=6 * GIB, gpu=True)
    await bench.world.ask(old, "hi")
    assert bench.world.residency.list()[0].device == "gpu"
    model = bench.add("large", large_header(), gpu=True)
    fit = await bench.fit("large", {"num_ctx": 4096})
    assert (fit.evicted, fit.shares[0][0]) == (("old:latest",), "cuda0")
    await bench.world.ask(model, "hi", settings=bench.world.residency.settings(model, {"num_ctx": 4096}))
    assert bench.world.state(old) is None
    status = bench.world.status(model)
    assert status is not None
    assert status.device == "gpu"


async def test_a_busy_model_is_waited_for(bench: Bench) -> None:
    busy = bench.world.model("busy", memory_bytes=58 * GIB)
    answer = await bench.world.holding(busy)
    bench.add("large", large_header())
    fit = await bench.fit("large", {"num_ctx": 8192})
    assert (fit.fits, fit.evicted) == (True, ())
    assert "`busy:latest` holds" in fit.reason
    answer.cancel()


async def test_a_lease_is_nobody_who_leaves(bench: Bench) -> None:
    bench.add("large", large_header())
    holding = bench.world.residency.leases.hold(60 * GIB)
    await anext(holding)
    assert not (await bench.fit("large")).fits
    await holding.aclose()
    assert (await bench.fit("large")).fits


async def test_what_does_not_fit_is_told_with_numbers(bench: Bench) -> None:
    bench.world.free_bytes = 4 * GIB
    bench.add("large", large_header())
    fit = await bench.fit("large")
    assert not fit.fits
    assert fit.total_bytes > 4 * GIB
    assert "4.0 GiB can be freed" in fit.reason
    assert (fit.evicted, fit.largest_context_length, fit.tokens_per_second) == ((), 0, 0.0)


async def test_the_largest_context_is_the_largest(bench: Bench) -> None:
    bench.world.free_bytes = 24 * GIB
    bench.add("large", large_header())
    largest = (await bench.fit("large")).largest_context_length
    assert 8192 < largest < TRAINED
    assert (await bench.fit("large", {"num_ctx": largest})).fits
    beyond = await bench.fit("large", {"num_ctx": largest + CONTEXT_STEP})
    assert not beyond.fits
    assert beyond.largest_context_length == largest


async def test_the_largest_context_keeps_the_layers_where_they_are(bench: Bench) -> None:
    """In main memory there is room for all of it; but then it is another, slower model."""
    bench.world.gpu_free_bytes = 16 * GIB
    bench.add("large", large_header())
    fit = await bench.fit("large", {"num_ctx": 4096})
    assert fit.gpu_layers == LAYERS + 1
    assert 4096 <= fit.largest_context_length < TRAINED
    at_most = await bench.fit("large", {"num_ctx": fit.largest_context_length})
    assert at_most.gpu_layers == LAYERS + 1


async def test_a_context_beyond_what_the_model_was_trained_with(bench: Bench) -> None:
    bench.add("large", large_header())
    fit = await bench.fit("large", {"num_ctx": 2 * TRAINED})
    assert fit.context_length == TRAINED
    assert f"with a context of {TRAINED} tokens: it was trained with no more" in fit.reason


async def test_of_a_mixture_the_active_experts_count_for_the_speed(bench: Bench) -> None:
    dense, mixture = large_header(), large_header(experts=8, used=2)
    bench.add("dense", dense)
    bench.add("mixture", mixture)
    one, many = await bench.fit("dense"), await bench.fit("mixture")
    layer_bytes = LAYERS * 2 * WIDTH * WIDTH
    assert one.active_bytes == layer_bytes * 5 + 2 * WIDTH * VOCABULARY
    assert many.weights_bytes > 6 * one.weights_bytes
    assert many.active_bytes == layer_bytes * 9 + 2 * WIDTH * VOCABULARY


async def test_the_speed_is_what_was_measured_here(bench: Bench) -> None:
    bench.add("large", large_header())
    before = await bench.fit("large")
    assert (before.tokens_per_second, before.calibrated) == (0.0, False)
    # Another model of the same size ran at ten tokens a second.
    placement = Placement(4096, (Share("cpu", before.total_bytes, before.layers),))
    speeds = bench.world.residency.speeds
    speeds.note_soon(Digest.of(b"x"), placement, before.active_bytes, tokens=100, duration_ns=10_000_000_000)
    await speeds.stop()
    after = await bench.fit("large")
    assert after.tokens_per_second == pytest.approx(10.0)
    assert after.calibrated


async def test_a_model_that_is_in_memory(bench: Bench) -> None:
    model = bench.add("large", large_header())
    await bench.world.ask(model, "hi", settings=bench.world.residency.settings(model, {"num_ctx": 4096}))
    fit = await bench.fit("large", {"num_ctx": 4096})
    assert (fit.fits, fit.evicted, fit.reason) == (True, (), "is in memory already, on cpu")
    assert fit.measured
    bench.world.free_bytes = 24 * GIB
    larger = await bench.fit("large", {"num_ctx": 8192})
    assert larger.fits
    assert larger.reason.startswith("loads again with these settings: ")


async def test_a_model_elsewhere(bench: Bench) -> None:
    peeked = PeekedModel("hf.co/org/repo:latest", large_header(), {"num_ctx": 16_384}, 9 * GIB)
    bench.shelf.elsewhere[peeked.name] = peeked
    fit = await bench.fit("hf.co/org/repo")
    assert (fit.fits, fit.stored, fit.download_bytes, fit.context_length) == (True, False, 9 * GIB, 16_384)
    assert bench.shelf.tokens == ["hf_x"]
    assert (await bench.fit("hf.co/org/repo", {"num_ctx": 2048})).context_length == 2048


async def test_a_model_that_is_nowhere(bench: Bench) -> None:
    with pytest.raises(ModelNotFound):
        await bench.fit("hf.co/org/nothing")


async def test_files_of_others_are_not_opened(bench: Bench, tmp_path: Path) -> None:
    with pytest.raises(UploadRequired):
        await bench.fit(str(tmp_path / "secret.gguf"), caller=SOMEBODY)
    assert bench.shelf.tokens == []


async def test_a_parameter_that_is_not_legal(bench: Bench) -> None:
    bench.add("large", large_header())
    with pytest.raises(InvalidRequest):
        await bench.fit("large", {"num_ctx": 1})


async def test_hanging_up_leaves_the_source(bench: Bench) -> None:
    bench.shelf.slow = threading.Event()
    asking = asyncio.create_task(bench.fit("hf.co/org/repo"))
    assert await asyncio.to_thread(bench.shelf.slow.wait, 30)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    assert bench.shelf.left.is_set()


async def test_a_machine_that_must_not_use_main_memory_and_has_nothing_else(bench: Bench) -> None:
    bench.world.require_gpu = True
    bench.add("large", large_header())
    fit = await bench.fit("large")
    assert not fit.fits
    assert fit.total_bytes == fit.weights_bytes + fit.kv_bytes + fit.compute_bytes
    assert "require_gpu" in fit.reason
    assert (fit.shares, fit.largest_context_length) == ((), 0)
