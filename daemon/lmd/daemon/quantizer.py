"""Makes quantized weights of weights, and measures models, in child processes, one at a time."""

from __future__ import annotations

import asyncio
import importlib.metadata
import re
import shutil
import threading
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import structlog

from lmd.daemon.blocking import BlockingPool
from lmd.daemon.devices import main_memory
from lmd.daemon.errors import DeviceMemoryShort, Draining, QuantizeFailed
from lmd.daemon.quantize_process import QUANTIZE_COMMAND, QuantizeJob, run_job
from lmd.daemon.tasks import give_up, to_the_end
from lmd.registry.digest import Digest
from lmd.registry.errors import DiskFull
from lmd.registry.gguf import GgufHeader, combine
from lmd.registry.gguf_types import FILE_TYPES
from lmd.registry.imatrix import ImatrixEntry, imatrix_entries
from lmd.registry.lm_config import LmConfig
from lmd.registry.manifest import FileLayer
from lmd.registry.model_store import read_blob_header
from lmd.registry.quantization import QuantizePlan, parse_quant_type, plan_quantization
from lmd.registry.shards import in_shard_order
from lmd.registry.store import Lease, Store

log = structlog.get_logger(__name__)

WAITING = "waiting for another quantization"

#: What the engine keeps of one tensor's rows at most; its own default.
_MOST_BUFFER_BYTES = 8 << 30
#: With less for its buffers a quantization would crawl.
_LEAST_BUFFER_BYTES = 256 << 20

_KIND = "quantized"

_SHARD = re.compile(r"-\d{5}-of-\d{5}$")
_LABELS = frozenset({kind.name.lower() for kind in FILE_TYPES.values()} | {"fp16", "fp32", "mxfp4_moe"})


@dataclass(frozen=True, slots=True)
class Wanted:
    """What to quantize to what: the files and settings of a model, and the type's name as given.

    With *may_be* a model that is of the type already is the result as it is, and no mistake.
    """

    name: str
    files: Sequence[FileLayer]
    lm: LmConfig
    quantize: str
    requantize: bool = False
    imatrix: Digest | None = None
    may_be: bool = False


@dataclass(frozen=True, slots=True)
class WorkProgress:
    """How far a step is that works through some bytes: of weights, or of a text."""

    label: str
    completed_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True)
class Quantized:
    """The files and settings of the quantized model; its new blob is held until the iterator is closed."""

    files: tuple[FileLayer, ...]
    lm: LmConfig


@dataclass(frozen=True, slots=True)
class Measured:
    """How well and how fast a model reads a text; *tokens* of it were scored."""

    perplexity: float
    tokens: int
    prompt_tokens_per_s: float
    answer_tokens_per_s: float


@dataclass(frozen=True, slots=True)
class _Prepared:
    weights: tuple[FileLayer, ...]
    header: GgufHeader
    plan: QuantizePlan
    imatrix: tuple[ImatrixEntry, ...]


class Quantizer:
    """Runs one quantization or measurement at a time; they take all processors there are. For one event loop."""

    def __init__(
        self, store: Store, pool: BlockingPool, views_dir: Path, *, command: Sequence[str] = QUANTIZE_COMMAND
    ) -> None:
        self._store = store
        self._pool = pool
        self._views_dir = views_dir
        self._command = command
        self._turn = asyncio.Lock()
        self._closing = False

    async def start(self) -> None:
        """Remove what a daemon that was killed left of its children's views."""
        await self._pool.run(shutil.rmtree, self._views_dir, ignore_errors=True)

    def stop(self) -> None:
        """Take no more work; what runs ends with the calls that wait for it."""
        self._closing = True

    async def check(self, wanted: Wanted) -> None:
        """Fail as `quantize` would before it begins. Raises: InvalidRequest, BlobMissing, GgufInvalid."""
        await self._pool.run(self._prepare, wanted)

    async def quantize(self, wanted: Wanted) -> AsyncGenerator[str | WorkProgress | Quantized]:
        """Quantize; yields steps in words, warnings among them, progress, and the result. Closing it kills the child.

        Nothing stays of a quantization that does not end.

        Raises: InvalidRequest, BlobMissing, GgufInvalid, DiskFull, DeviceMemoryShort, QuantizeFailed, Draining,
        StoreError.
        """
        lease = await self._pool.run(self._lease, wanted)
        try:
            prepared = await self._pool.run(self._prepare, wanted)
            if prepared is None:
                yield Quantized(tuple(wanted.files), wanted.lm)
                return
            plan = prepared.plan
            for warning in plan.warnings:
                yield f"warning: {warning}"
            if (before := await self._pool.run(self._made_before, wanted, prepared, lease)) is not None:
                yield f"quantized to {plan.kind.name} before"
                yield _quantized(wanted, prepared, before)
                return
            if self._turn.locked():
                yield WAITING
            async with self._my_turn():
                yield f"quantizing {plan.source} to {plan.kind.name}"
                async with aclosing(self._convert(wanted, prepared, lease)) as steps:
                    async for step in steps:
                        yield step
        finally:
            await to_the_end(self._pool.run(lease.release))

    async def measure(
        self, name: str, weights: Sequence[Path], label: str, text: str
    ) -> AsyncGenerator[str | WorkProgress | Measured]:
        """Have the model of these files, all shards in order, read *text*; yields what it does, and the result.

        Raises: BlobMissing, QuantizeFailed, Draining.
        """
        if self._turn.locked():
            yield WAITING
        async with self._my_turn():
            yield f"measuring {label}"
            job = QuantizeJob(name, tuple(weights), {"do": "measure", "text": text}, command=self._command)
            size_bytes = len(text.encode())
            async with aclosing(run_job(job, self._views_dir)) as events:
                async for event in events:
                    if event["event"] == "read":
                        yield WorkProgress(f"measuring {label}", size_bytes * event["done"] // event["of"], size_bytes)
                    elif event["event"] == "done":
                        yield WorkProgress(f"measuring {label}", size_bytes, size_bytes)
                        yield Measured(**{key: value for key, value in event.items() if key != "event"})

    @asynccontextmanager
    async def _my_turn(self) -> AsyncGenerator[None]:
        """Wait until nothing else runs. Raises: Draining."""
        async with self._turn:
            if self._closing:
                raise Draining
            yield

    def _lease(self, wanted: Wanted) -> Lease:
        lease = self._store.lease(f"quantize {wanted.name}")
        lease.add(*(file.digest for file in wanted.files))
        if wanted.imatrix is not None:
            lease.add(wanted.imatrix)
        return lease

    def _prepare(self, wanted: Wanted) -> _Prepared | None:
        """Read the headers and plan; None when there is nothing to do."""
        kind = parse_quant_type(wanted.quantize)
        weights = [file for file in wanted.files if file.role == "weights"]
        ordered = in_shard_order(weights, [read_blob_header(self._store, file.digest) for file in weights])
        header = combine([header for _, header in ordered])
        if wanted.may_be and header.quantization == kind.name:
            return None
        entries: tuple[ImatrixEntry, ...] = ()
        if wanted.imatrix is not None:
            entries = imatrix_entries(read_blob_header(self._store, wanted.imatrix), header)
        plan = plan_quantization(
            header,
            kind,
            header_bytes=sum(header.data_offset for _, header in ordered),
            requantize=wanted.requantize,
            with_imatrix=wanted.imatrix is not None,
        )
        return _Prepared(tuple(file for file, _ in ordered), header, plan, entries)

    async def _convert(
        self, wanted: Wanted, prepared: _Prepared, lease: Lease
    ) -> AsyncGenerator[str | WorkProgress | Quantized]:
        plan = prepared.plan
        buffer_bytes = await self._pool.run(_buffer_bytes, wanted.name, plan)
        reservation = await self._pool.run(self._store.reserve, plan.output_bytes, f"quantizing {wanted.name}")
        staged = self._store.staging_path()
        filename = _filename(prepared.weights[0].filename, plan.kind.name)
        what = {
            "do": "quantize",
            "ftype": plan.kind.number,
            "requantize": plan.requantizes,
            "buffer_bytes": buffer_bytes,
            "imatrix_entries": [asdict(entry) for entry in prepared.imatrix],
        }
        job = QuantizeJob(
            wanted.name,
            tuple(self._store.blob_path(file.digest) for file in prepared.weights),
            what,
            output=staged,
            imatrix=None if wanted.imatrix is None else self._store.blob_path(wanted.imatrix),
            command=self._command,
        )
        flushing: asyncio.Task[None] | None = None
        try:
            try:
                sizes = {tensor.name: tensor.size_bytes for tensor in prepared.header.tensors}
                begun: list[str] = []
                async with aclosing(run_job(job, self._views_dir)) as events:
                    async for event in events:
                        if event["event"] == "tensor":
                            yield WorkProgress(filename, sum(sizes.get(name, 0) for name in begun), plan.read_bytes)
                            begun.append(event["name"])
                            reservation.shrink(_size(staged) - (plan.output_bytes - reservation.size_bytes))
                        elif event["event"] == "checking":
                            # All bytes are there by now. The check takes the processor, this the disk.
                            flushing = asyncio.create_task(self._pool.run(self._store.flush, staged), name="flush")
                            yield WorkProgress(filename, plan.read_bytes, plan.read_bytes)
                            yield "checking the result"
            except QuantizeFailed:
                await self._pool.run(self._check_space, plan, staged)
                raise
            yield "writing to disk"
            if flushing is not None:
                await flushing
            cancelled = threading.Event()
            digest, size_bytes = await self._pool.run_cancellable(
                cancelled, self._store.adopt, staged, cancelled=cancelled
            )
            await self._pool.run(lease.add, digest)
        finally:
            if flushing is not None:
                await give_up(flushing)
            staged.unlink(missing_ok=True)
            await to_the_end(self._pool.run(reservation.release))
        await self._pool.run(self._store.remember, _KIND, _key(wanted, prepared), str(digest))
        log.info("weights_quantized", model=wanted.name, quantize=plan.kind.name, size_bytes=size_bytes)
        yield _quantized(wanted, prepared, FileLayer(digest, size_bytes, filename))

    def _made_before(self, wanted: Wanted, prepared: _Prepared, lease: Lease) -> FileLayer | None:
        """Find what the same weights became before; *lease* holds it. A changed prompt costs no second quantization."""
        known = self._store.recall(_KIND, _key(wanted, prepared))
        if known is None:
            return None
        digest = Digest.parse(known)
        lease.add(digest)
        if not self._store.has_blob(digest, None):
            return None
        filename = _filename(prepared.weights[0].filename, prepared.plan.kind.name)
        return FileLayer(digest, self._store.blob_size(digest), filename)

    def _check_space(self, plan: QuantizePlan, staged: Path) -> None:
        """Say so when a full disk is why a quantization failed: the engine just says that it could not write."""
        missing_bytes = plan.output_bytes - _size(staged)
        try:
            self._store.reserve(max(missing_bytes, 0), f"quantizing to {plan.kind.name}").release()
        except DiskFull as error:
            log.warning("quantize_without_space", needed_bytes=missing_bytes)
            raise error from None


def _key(wanted: Wanted, prepared: _Prepared) -> str:
    """Return what decides which bytes come out."""
    plan = prepared.plan
    return " ".join(
        (
            importlib.metadata.version("llama-cpp-python"),
            f"{plan.kind.name}{' of quantized' if plan.requantizes else ''}",
            str(wanted.imatrix or "-"),
            *(file.digest.hex for file in prepared.weights),
        )
    )


def _quantized(wanted: Wanted, prepared: _Prepared, weights: FileLayer) -> Quantized:
    """Return the model that *weights* make in the place of those it had."""
    others = (file for file in wanted.files if file.role != "weights")
    origin = replace(
        wanted.lm.origin,
        quantize=prepared.plan.kind.name,
        quantized_from=str(prepared.weights[0].digest),
        imatrix="" if wanted.imatrix is None else str(wanted.imatrix),
    )
    return Quantized((weights, *others), replace(wanted.lm, origin=origin))


def _buffer_bytes(name: str, plan: QuantizePlan) -> int:
    """Return what the engine may use for its buffers. Raises: DeviceMemoryShort."""
    device = main_memory()
    half_bytes = device.free_bytes // 2
    needed_bytes = min(plan.work_bytes, _LEAST_BUFFER_BYTES)
    if half_bytes < needed_bytes:
        raise DeviceMemoryShort(
            name,
            needed_bytes=2 * needed_bytes,
            free_bytes=device.free_bytes,
            device=device.id,
            hint="stop a model with `lm stop`, or try again when other programs have ended",
        )
    return min(_MOST_BUFFER_BYTES, half_bytes)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _filename(source: str, kind: str) -> str:
    """Return the name of a quantized file: that of its source with the type in place of the one there."""
    stem = _SHARD.sub("", source.removesuffix(".gguf"))
    head, separator, last = stem.rpartition("-")
    if separator and last.lower() in _LABELS:
        stem = head
    return f"{stem}-{kind}.gguf"


def quant_label(text: str) -> bool:
    """Tell whether *text* is the name of a quantization, in any case."""
    return text.lower() in _LABELS
