"""Quantizing with the installed engine in real children, and children that misbehave."""

from __future__ import annotations

import asyncio
import ctypes
import math
import os
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lmd.daemon import quantizer as quantizer_module
from lmd.daemon.blocking import BlockingPool
from lmd.daemon.devices import Device
from lmd.daemon.errors import DeviceMemoryShort, Draining, QuantizeFailed
from lmd.daemon.quantizer import WAITING, Measured, Quantized, Quantizer, Wanted, WorkProgress
from lmd.registry.digest import Digest
from lmd.registry.errors import BlobMissing, DiskFull, GgufInvalid, InvalidRequest
from lmd.registry.gguf import GgufHeader
from lmd.registry.lm_config import LmConfig
from lmd.registry.manifest import FileLayer
from lmd.registry.model_store import read_blob_header
from lmd.registry.quantization import QUANT_TYPES, parse_quant_type
from lmd.registry.store import Store
from lmd.runner.native import load_bindings
from tests.support.imatrices import make_imatrix
from tests.support.leaks import nothing_left_in, until
from tests.support.shared_models import STORIES
from tests.support.tiny_models import make_tiny_llama, split_model

TEXT = "Once upon a time there was a little girl named Lily. She liked to play in the park with her friends. " * 20

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store.open(tmp_path / "store")
    yield store
    store.close()


@pytest.fixture
def pool() -> Iterator[BlockingPool]:
    pool = BlockingPool(3)
    yield pool
    pool.close()


@pytest.fixture
async def quantizer(store: Store, pool: BlockingPool, tmp_path: Path) -> AsyncIterator[Quantizer]:
    quantizer = Quantizer(store, pool, tmp_path / "views")
    with nothing_left_in(tmp_path / "views", more_descriptors=10):
        yield quantizer
    assert staged(store) == []


@pytest.fixture
def wide(store: Store, tmp_path: Path) -> FileLayer:
    """A model whose rows suit every type."""
    return stored(store, make_wide(tmp_path))


def make_wide(folder: Path) -> Path:
    return make_tiny_llama(folder / "wide-F32.gguf", n_embd=256, n_ff=512)


def stored(store: Store, path: Path) -> FileLayer:
    digest, size_bytes = store.import_file(path)
    return FileLayer(digest, size_bytes, path.name)


def staged(store: Store) -> list[Path]:
    return list((store.root / "ingest").iterdir())


def wanted(*files: FileLayer, quantize: str = "Q4_K_M", **options: Any) -> Wanted:
    return Wanted("mine:latest", files, LmConfig(system="Be brief."), quantize, **options)


async def result_of(quantizer: Quantizer, what: Wanted) -> Quantized:
    made = None
    async with aclosing(quantizer.quantize(what)) as steps:
        async for step in steps:
            if isinstance(step, Quantized):
                made = step
    assert made is not None
    return made


async def rest_of(steps: AsyncIterator[object]) -> None:
    async for _ in steps:
        pass


async def read(quantizer: Quantizer, path: Path, text: str = TEXT) -> Measured:
    steps = [step async for step in quantizer.measure("mine:latest", [path], "F32", text)]
    assert steps[0] == "measuring F32"
    assert isinstance(steps[-1], Measured)
    return steps[-1]


def child(tmp_path: Path, body: str) -> tuple[str, ...]:
    """Return the command of a child that reads its job and does *body*."""
    script = tmp_path / "child.py"
    script.write_text(
        "import json, os, signal, sys, time\njob = json.loads(sys.stdin.readline())\n"
        "def tell(**event):\n    print(json.dumps(event), flush=True)\n" + body
    )
    return (sys.executable, str(script))


async def test_a_model_is_quantized(quantizer: Quantizer, store: Store, wide: FileLayer) -> None:
    steps = [step async for step in quantizer.quantize(wanted(wide))]
    words = [step for step in steps if isinstance(step, str)]
    assert words == ["quantizing F32 to Q4_K_M", "checking the result", "writing to disk"]
    progress = [step for step in steps if isinstance(step, WorkProgress)]
    assert [step.completed_bytes for step in progress] == sorted(step.completed_bytes for step in progress)
    assert (
        progress[-1].completed_bytes == progress[-1].total_bytes == read_blob_header(store, wide.digest).weights_bytes
    )
    made = steps[-1]
    assert isinstance(made, Quantized)
    [weights] = made.files
    assert (weights.filename, weights.role) == ("wide-Q4_K_M.gguf", "weights")
    assert read_blob_header(store, weights.digest).quantization == "Q4_K_M"
    assert store.blob_size(weights.digest) == weights.size_bytes < wide.size_bytes // 4
    assert os.stat(store.blob_path(weights.digest)).st_mode & 0o222 == 0
    assert made.lm.system == "Be brief."
    assert (made.lm.origin.quantize, made.lm.origin.quantized_from) == ("Q4_K_M", str(wide.digest))


async def test_everything_but_the_weights_stays(quantizer: Quantizer, store: Store, wide: FileLayer) -> None:
    other = FileLayer(store.put_bytes(b"draft"), 5, "d.gguf", "draft")
    assert (await result_of(quantizer, wanted(wide, other))).files[1:] == (other,)


async def test_the_same_gives_the_same_digest(quantizer: Quantizer, store: Store, wide: FileLayer) -> None:
    first = await result_of(quantizer, wanted(wide))
    # What is there still would not be made again.
    await asyncio.to_thread(lambda: [*store.collect(grace_s=0)])
    again = stored(store, make_wide(store.root.parent))
    assert again == wide
    assert await result_of(quantizer, wanted(again)) == first


async def test_what_was_quantized_before_is_not_quantized_again(
    quantizer: Quantizer, store: Store, wide: FileLayer
) -> None:
    """A Modelfile that says QUANTIZE is created anew for each change of its prompt."""
    first = await result_of(quantizer, wanted(wide))
    changed = replace(wanted(wide), lm=LmConfig(system="Be long."))
    steps = [step async for step in quantizer.quantize(changed)]
    assert steps == ["quantized to Q4_K_M before", Quantized(first.files, replace(first.lm, system="Be long."))]
    other = [step async for step in quantizer.quantize(wanted(wide, quantize="Q4_0"))]
    assert isinstance(other[-1], Quantized)
    assert other[-1].files != first.files
    await asyncio.to_thread(lambda: [*store.collect(grace_s=0)])
    assert not store.has_blob(first.files[0].digest, None)
    again = stored(store, make_wide(store.root.parent))
    assert (await result_of(quantizer, wanted(again))).files == first.files
    assert store.has_blob(first.files[0].digest, None), "it was gone, so it is made again"


@pytest.mark.parametrize("name", ["F16", "BF16", "Q8_0", "Q5_K_S", "Q3_K_L", "IQ4_XS", "TQ1_0", "MXFP4_MOE"])
async def test_types(quantizer: Quantizer, store: Store, wide: FileLayer, name: str) -> None:
    made = await result_of(quantizer, wanted(wide, quantize=name))
    kind = parse_quant_type(name)
    found = read_blob_header(store, made.files[0].digest)
    assert found.metadata["general.file_type"] == kind.number
    assert kind.main in {tensor.type_name for tensor in found.tensors}


@pytest.mark.slow
async def test_every_type_that_is_offered(quantizer: Quantizer, store: Store, wide: FileLayer, tmp_path: Path) -> None:
    """The table holds what the engine does: each type is made, and only those need a matrix that say so."""
    header: GgufHeader = read_blob_header(store, wide.digest)
    matrix = make_imatrix(tmp_path / "i.gguf", header)
    imatrix, _ = store.import_file(matrix)
    for kind in QUANT_TYPES:
        if kind.name == header.quantization:
            continue
        given = imatrix if kind.needs_imatrix else None
        made = await result_of(quantizer, wanted(wide, quantize=kind.name, imatrix=given))
        found = read_blob_header(store, made.files[0].digest)
        assert found.metadata["general.file_type"] == kind.number, kind.name
        assert kind.main in {tensor.type_name for tensor in found.tensors}, kind.name
        assert made.lm.origin.imatrix == ("" if given is None else str(given))


async def test_an_importance_matrix_changes_the_result(
    quantizer: Quantizer, store: Store, wide: FileLayer, tmp_path: Path
) -> None:
    header = read_blob_header(store, wide.digest)
    digests = set()
    for seed in (0, 1, 2):
        imatrix: Digest | None = None
        if seed:
            imatrix, _ = store.import_file(make_imatrix(tmp_path / f"{seed}.gguf", header, seed=seed))
        made = await result_of(quantizer, wanted(wide, quantize="Q4_0", imatrix=imatrix))
        digests.add(made.files[0].digest)
    assert len(digests) == 3


async def test_shards_become_one_file(quantizer: Quantizer, store: Store, wide: FileLayer, tmp_path: Path) -> None:
    whole = await result_of(quantizer, wanted(wide))
    shards = [stored(store, path) for path in split_model(tmp_path / "wide-F32.gguf", 3)]
    made = await result_of(quantizer, wanted(*reversed(shards)))
    assert len(made.files) == 1
    assert read_blob_header(store, made.files[0].digest).split_count == 1
    tensors = [read_blob_header(store, m.files[0].digest).tensors for m in (whole, made)]
    assert {t.name: t.type_name for t in tensors[0]} == {t.name: t.type_name for t in tensors[1]}


async def test_quantizing_again_needs_to_be_asked_for(quantizer: Quantizer, wide: FileLayer) -> None:
    [small] = (await result_of(quantizer, wanted(wide))).files
    with pytest.raises(InvalidRequest, match=r"quantized already \(Q4_K_M\)") as caught:
        await result_of(quantizer, wanted(small, quantize="Q3_K_S"))
    assert "--requantize" in caught.value.hint
    steps = [step async for step in quantizer.quantize(wanted(small, quantize="Q3_K_S", requantize=True))]
    assert steps[0] == "warning: quantizing Q4_K_M again loses more than quantizing the original would"
    with pytest.raises(InvalidRequest, match="the model is Q4_K_M already"):
        await result_of(quantizer, wanted(small))
    assert (await result_of(quantizer, wanted(small, may_be=True))).files == (small,)


async def test_a_file_cut_short(quantizer: Quantizer, store: Store, wide: FileLayer, tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes((tmp_path / "wide-F32.gguf").read_bytes()[:-100_000])
    with pytest.raises(GgufInvalid, match="but the file has"):
        await result_of(quantizer, wanted(stored(store, path)))


async def test_weights_that_are_gone(quantizer: Quantizer) -> None:
    with pytest.raises(BlobMissing):
        await result_of(quantizer, wanted(FileLayer(Digest("a" * 64), 100, "x.gguf")))


async def test_a_disk_without_room(
    quantizer: Quantizer, store: Store, wide: FileLayer, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = store.reserve(10**6, "x")
    full.release()

    def reserve(size_bytes: int, what: str) -> Any:
        raise DiskFull(needed_bytes=size_bytes, free_bytes=1000, where=what)

    monkeypatch.setattr(store, "reserve", reserve)
    with pytest.raises(DiskFull) as caught:
        await result_of(quantizer, wanted(wide))
    assert int(caught.value.metadata["needed_bytes"]) > 10**6


async def test_a_disk_that_fills_up_meanwhile(
    store: Store, pool: BlockingPool, wide: FileLayer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine then says that it could not write, and no more."""
    command = child(tmp_path, "tell(event='failed', message='basic_ios::clear: iostream error', out_of_memory=False)\n")
    calls = []
    really = store.reserve

    def reserve(size_bytes: int, what: str) -> Any:
        calls.append(size_bytes)
        if len(calls) == 1:
            return really(size_bytes, what)
        raise DiskFull(needed_bytes=size_bytes, free_bytes=1000, where=what)

    monkeypatch.setattr(store, "reserve", reserve)
    with pytest.raises(DiskFull):
        await result_of(Quantizer(store, pool, tmp_path / "views", command=command), wanted(wide))
    assert staged(store) == []


async def test_a_machine_without_memory(quantizer: Quantizer, wide: FileLayer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantizer_module, "main_memory", lambda: Device("cpu", "main memory", 1 << 30, 1 << 20))
    with pytest.raises(DeviceMemoryShort, match="does not fit in the memory of cpu"):
        await result_of(quantizer, wanted(wide))


async def test_the_engine_s_own_words_reach_the_user(
    store: Store, pool: BlockingPool, wide: FileLayer, tmp_path: Path
) -> None:
    command = child(
        tmp_path,
        "print('some log', file=sys.stderr, flush=True)\ntell(event='failed', message='no such luck')\n",
    )
    quantizer = Quantizer(store, pool, tmp_path / "views", command=command)
    with pytest.raises(QuantizeFailed, match="the engine fails on model `mine:latest`: no such luck") as caught:
        await result_of(quantizer, wanted(wide))
    assert caught.value.metadata["log"] == "some log"


@pytest.mark.parametrize(
    ("ending", "cause"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "SIGKILL, most likely by the kernel because memory ran out"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", "SIGSEGV"),
        ("sys.exit(3)", "exit status 3"),
    ],
)
async def test_a_child_that_dies(
    store: Store, pool: BlockingPool, wide: FileLayer, tmp_path: Path, ending: str, cause: str
) -> None:
    command = child(tmp_path, f"open(job['output'], 'wb').write(b'x' * 1000)\n{ending}\n")
    quantizer = Quantizer(store, pool, tmp_path / "views", command=command)
    with nothing_left_in(tmp_path / "views", more_descriptors=10), pytest.raises(QuantizeFailed) as caught:
        await result_of(quantizer, wanted(wide))
    assert f"its process died ({cause})" in caught.value.message
    assert staged(store) == []


@pytest.mark.parametrize("line", ["{", "[]", "1", "{}", '{"event": "x"}', '{"event": "tensor"}', "x" * 100_000])
async def test_a_child_that_talks_nonsense(
    store: Store, pool: BlockingPool, wide: FileLayer, tmp_path: Path, line: str
) -> None:
    command = child(tmp_path, f"print({line!r}, flush=True)\ntime.sleep(600)\n")
    with nothing_left_in(tmp_path / "views", more_descriptors=10), pytest.raises(QuantizeFailed, match="nonsense"):
        await result_of(Quantizer(store, pool, tmp_path / "views", command=command), wanted(wide))
    assert staged(store) == []


async def test_a_child_that_is_killed_leaves_nothing_and_the_next_one_works(
    quantizer: Quantizer, store: Store, wide: FileLayer, tmp_path: Path
) -> None:
    import psutil

    steps = quantizer.quantize(wanted(wide, quantize="IQ3_S"))
    async with aclosing(steps):
        async for step in steps:
            if isinstance(step, WorkProgress):
                break
        [process] = psutil.Process().children()
        process.send_signal(signal.SIGKILL)
        with pytest.raises(QuantizeFailed, match="SIGKILL"):
            await rest_of(steps)
    assert staged(store) == []
    assert (await result_of(quantizer, wanted(wide))).files


async def test_leaving_kills_the_child_and_nothing_stays(
    store: Store, pool: BlockingPool, wide: FileLayer, tmp_path: Path
) -> None:
    command = child(
        tmp_path, "open(job['output'], 'wb').write(b'x' * 1000)\ntell(event='tensor', name='a')\ntime.sleep(600)\n"
    )
    quantizer = Quantizer(store, pool, tmp_path / "views", command=command)
    reserved = store._reservations.outstanding_bytes
    with nothing_left_in(tmp_path / "views", more_descriptors=10):
        task = asyncio.create_task(result_of(quantizer, wanted(wide)))
        await until(lambda: any(path.stat().st_size == 1000 for path in staged(store)))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert staged(store) == []
    assert store._reservations.outstanding_bytes == reserved


async def test_one_at_a_time(store: Store, pool: BlockingPool, wide: FileLayer, tmp_path: Path) -> None:
    command = child(tmp_path, "tell(event='tensor', name='a')\ntime.sleep(600)\n")
    quantizer = Quantizer(store, pool, tmp_path / "views", command=command)
    async with aclosing(quantizer.quantize(wanted(wide))) as first:
        assert await anext(first) == "quantizing F32 to Q4_K_M"
        async with aclosing(quantizer.quantize(wanted(wide))) as second:
            assert await anext(second) == WAITING
    quantizer.stop()
    with pytest.raises(Draining):
        await result_of(quantizer, wanted(wide))


async def test_a_child_sees_its_files_and_no_secrets(
    store: Store, pool: BlockingPool, wide: FileLayer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    command = child(
        tmp_path,
        "seen = sorted(os.listdir()) + sorted(os.environ)\ntell(event='failed', message=' '.join(seen))\n",
    )
    with pytest.raises(QuantizeFailed) as caught:
        await result_of(Quantizer(store, pool, tmp_path / "views", command=command), wanted(wide))
    assert "model.gguf out.gguf" in caught.value.message
    assert "HF_TOKEN" not in caught.value.message


async def test_perplexity_is_that_of_a_plain_reading(quantizer: Quantizer) -> None:
    found = await read(quantizer, STORIES)
    assert found.perplexity == pytest.approx(_reference_perplexity(STORIES, TEXT, window=480), rel=1e-3)
    assert found.tokens > 200
    assert found.prompt_tokens_per_s > found.answer_tokens_per_s > 0


async def test_what_quantizing_costs_shows(quantizer: Quantizer, store: Store) -> None:
    plain = stored(store, STORIES)
    perplexities = []
    for kind in ("Q8_0", "Q2_0"):
        made = await result_of(quantizer, wanted(plain, quantize=kind))
        perplexities.append((await read(quantizer, store.blob_path(made.files[0].digest))).perplexity)
    original = (await read(quantizer, STORIES)).perplexity
    assert abs(perplexities[0] / original - 1) < 0.02
    assert perplexities[1] > 1.5 * original


async def test_a_text_too_short_to_measure(quantizer: Quantizer) -> None:
    with pytest.raises(QuantizeFailed, match="at least 16 are needed"):
        await read(quantizer, STORIES, "Hello.")


def _reference_perplexity(path: Path, text: str, *, window: int) -> float:
    """Have the engine read the windows token by token, and score the tokens of the second halves."""
    import numpy as np

    llama = load_bindings()
    model = llama.llama_model_load_from_file(str(path).encode(), llama.llama_model_default_params())
    vocab = llama.llama_model_get_vocab(model)
    size, data = llama.llama_vocab_n_tokens(vocab), text.encode()
    tokens = (ctypes.c_int32 * len(data))()
    count = llama.llama_tokenize(vocab, data, len(data), tokens, len(data), True, False)
    surprise = []
    for start in range(0, count - window + 1, window):
        chunk = [llama.llama_vocab_bos(vocab), *tokens[start + 1 : start + window]]
        context = llama.llama_init_from_model(model, llama.llama_context_default_params())
        for position, token in enumerate(chunk[:-1]):
            assert llama.llama_decode(context, llama.llama_batch_get_one((ctypes.c_int32 * 1)(token), 1)) == 0
            scores = np.ctypeslib.as_array(llama.llama_get_logits(context), (size,)).astype(np.float64)
            if position >= window // 2:
                surprise.append(np.log(np.exp(scores).sum()) - scores[chunk[position + 1]])
        llama.llama_free(context)
    llama.llama_model_free(model)
    return math.exp(sum(surprise) / len(surprise))
