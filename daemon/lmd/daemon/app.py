"""Puts the application together: store, catalog, pulls, residency, inference, and the services on top of them."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

import structlog

from lmd.daemon.blocking import BlockingPool
from lmd.daemon.catalog import Catalog
from lmd.daemon.config import Config
from lmd.daemon.devices import Device, Inventory
from lmd.daemon.dropin import DropIn
from lmd.daemon.embedding import Embedding
from lmd.daemon.fitting import Fitting
from lmd.daemon.http.services import Services
from lmd.daemon.inference import Inference
from lmd.daemon.metrics import Metrics
from lmd.daemon.model_calls import ModelCalls
from lmd.daemon.pulls import Pulls
from lmd.daemon.quantizer import Quantizer
from lmd.daemon.residency.pins import Pins
from lmd.daemon.residency.residency import Residency
from lmd.daemon.resident_metrics import Holdings
from lmd.daemon.saved_kv import SavedKv
from lmd.daemon.server import AddServicer, adder
from lmd.daemon.services.calls import InferenceCallsServicer
from lmd.daemon.services.devices import DeviceListing
from lmd.daemon.services.models import ModelServiceServicer
from lmd.daemon.services.plans import RuntimePlansServicer
from lmd.daemon.services.store import StoreServiceServicer
from lmd.daemon.services.system import engine_version
from lmd.daemon.tokenizing import Tokenizing
from lmd.registry.aliases import AliasTable
from lmd.registry.digest import Digest
from lmd.registry.errors import StoreLocked
from lmd.registry.peek import PeekedModel
from lmd.registry.pull import Puller, PullEvent, PullOptions
from lmd.registry.ref import ModelRef
from lmd.registry.sources import hub_env
from lmd.registry.store import Store, TagRecord
from lmd.v1.inference_service_pb2_grpc import add_InferenceServiceServicer_to_server
from lmd.v1.model_service_pb2_grpc import add_ModelServiceServicer_to_server
from lmd.v1.runtime_service_pb2_grpc import add_RuntimeServiceServicer_to_server
from lmd.v1.store_service_pb2_grpc import add_StoreServiceServicer_to_server
from lmd.v1.version import __version__

if TYPE_CHECKING:
    from lmd.daemon.http.gateway import HttpApplication

log = structlog.get_logger(__name__)

#: A daemon that was told to stop closes its socket first and its store last; the next one waits that long for it.
STORE_WAIT_S = 2.0
#: Models that are looked at where they are at the same time; more wait.
PEEKS = 4


class Application:
    """Everything the daemon does, in the order in which it is built; it is taken down in the opposite one."""

    def __init__(self, config: Config, pool: BlockingPool, metrics: Metrics) -> None:
        self._config = config
        self._pool = pool
        self._metrics = metrics
        self._inventory = self.make_inventory()
        self._servicers: list[AddServicer] = []
        self._exit = AsyncExitStack()
        self._draining = AsyncExitStack()
        self._make_http: Callable[[], HttpApplication] | None = None
        self._cut: Callable[[], None] = lambda: None

    def make_inventory(self) -> Inventory:
        """Return what knows the machine's devices; tests have machines of their own."""
        return Inventory()

    @property
    def servicers(self) -> Sequence[AddServicer]:
        """Return what adds each service to the server."""
        return self._servicers

    def devices(self) -> Sequence[Device]:
        """Return the devices as they are now, main memory first; blocks for milliseconds, thread-safe."""
        return self._inventory.devices()

    def http(self) -> HttpApplication:
        """Return what the HTTP gateway serves; asked after `start`, and only when there is a gateway."""
        assert self._make_http is not None, "http() before start()"
        return self._make_http()

    async def start(self) -> None:
        """Open the store and build what works on it.

        Raises:
            StoreLocked: when another daemon has the store.
            LmdError: when the store or the aliases cannot be read.
        """
        config, pool, started_at = self._config, self._pool, time.time()
        aliases = await pool.run(AliasTable.load, config.aliases_file)
        store = await self._open_store()
        self._exit.callback(store.close)

        catalog = Catalog(store, aliases, pool)
        self._exit.push_async_callback(catalog.stop)

        saved_kv = SavedKv(store.root / "kv", config.runtime.kv_disk_bytes, engine_version(), pool)
        self._exit.push_async_callback(saved_kv.stop)
        residency = Residency(config, store, config.dirs.log, pool, saved_kv=saved_kv, device_source=self._inventory)
        self._inventory.held = lambda: {
            device: seen_bytes for device, (_, seen_bytes) in residency.tally(leases=False).items()
        }
        self._inventory.start()
        self._exit.push_async_callback(self._inventory.stop)
        saved_kv.named = lambda: {tag.manifest for tag in store.list_tags()}
        saved_kv.resident = residency.resident_manifests

        def note_released(manifest: Digest) -> None:
            catalog.model_released(manifest)
            saved_kv.tidy_soon()

        async def unload_unnamed(manifest: Digest) -> None:
            await residency.unload_if_resident(manifest)
            saved_kv.tidy_soon()

        residency.on_released = note_released
        catalog.unload_unnamed = unload_unnamed
        store.set_resident_roots(residency.resident_manifests)
        await residency.start()
        saved_kv.tidy_soon()
        self._exit.push_async_callback(residency.stop)
        self._cut = residency.cut
        pins = Pins(residency, catalog.resolve, store, pool, config.runtime.preload)
        work = self._metrics.work
        calls = ModelCalls(catalog, residency, config, work)
        inference = Inference(catalog, residency, config, work)
        embedding, tokenizing = Embedding(calls), Tokenizing(calls)

        hub_env.prepare(config.dirs.state)
        puller = Puller(
            store,
            aliases,
            endpoint=config.pull.endpoint,
            user_agent=f"lmd/{__version__}",
            options=PullOptions(
                connections=config.pull.connections,
                stall_timeout_s=config.pull.stall_timeout.total_seconds(),
                proxies=config.pull.proxies,
            ),
        )
        self._exit.push_async_callback(pool.run, puller.close)
        token = config.pull.token
        source = _OwnToken(puller, token.get_secret_value()) if token else puller
        pulls = Pulls(source)
        peek_pool = BlockingPool(PEEKS, "peek")
        self._draining.callback(peek_pool.close)
        fitting = Fitting(catalog, source, residency, peek_pool)
        self._draining.push_async_callback(pulls.stop)
        self._metrics.look = lambda: Holdings(
            runners=residency.list(),
            pulls_running=pulls.running,
            pulls_ended=dict(pulls.ended),
            pull_received_bytes=pulls.received_bytes,
            tasks=len(asyncio.all_tasks()),
        )

        quantizer = Quantizer(store, pool, config.dirs.runtime / "quantize")
        await quantizer.start()
        self._draining.callback(quantizer.stop)

        if config.dropin.enabled:
            # Imports take as long as the files are large; they get a thread of their own.
            dropin_pool = BlockingPool(1, "dropin")
            self._draining.callback(dropin_pool.close)
            dropin = DropIn(store, catalog.names, dropin_pool, config.dropin.path)
            await dropin.start()
            self._draining.push_async_callback(dropin.stop)

        await pins.start()
        self._draining.push_async_callback(pins.stop)
        # First of all, and at once: whoever waits for a model is told to go elsewhere.
        self._draining.callback(residency.drain)
        self._servicers = [
            adder(
                "ModelService",
                add_ModelServiceServicer_to_server,
                ModelServiceServicer(catalog, pulls, quantizer),
            ),
            adder("StoreService", add_StoreServiceServicer_to_server, StoreServiceServicer(store, pool, saved_kv)),
            adder(
                "RuntimeService",
                add_RuntimeServiceServicer_to_server,
                RuntimePlansServicer(
                    catalog,
                    residency,
                    pins,
                    fitting,
                    DeviceListing(
                        self._inventory, residency.tally, pool, residency.speeds.bandwidth, residency.leases.look
                    ),
                ),
            ),
            adder(
                "InferenceService",
                add_InferenceServiceServicer_to_server,
                InferenceCallsServicer(inference, embedding, tokenizing),
            ),
        ]
        self._make_http = lambda: _http_application(
            Services(
                config=config,
                catalog=catalog,
                pulls=pulls,
                quantizer=quantizer,
                residency=residency,
                inference=inference,
                embedding=embedding,
                tokenizing=tokenizing,
                store=store,
                saved_kv=saved_kv,
                pool=pool,
                version=__version__,
                started_at=started_at,
                metrics=self._metrics,
            )
        )

    async def drain(self) -> None:
        """Refuse who waits for a model; stop pulls, which keep what arrived, and the drop-in folder."""
        await self._draining.aclose()

    def cut(self) -> None:
        """End the answers that still run, with DRAINING."""
        self._cut()

    async def stop(self) -> None:
        """End the runners, and close the store."""
        async with self._exit:
            await self.drain()

    async def _open_store(self) -> Store:
        deadline = time.monotonic() + STORE_WAIT_S
        config = self._config.store
        grace_s, history_s = config.grace_period.total_seconds(), config.history.total_seconds()
        while True:
            with contextlib.suppress(StoreLocked):
                return await self._pool.run(Store.open, config.path, grace_s=grace_s, history_s=history_s)
            if time.monotonic() > deadline:
                return await self._pool.run(Store.open, config.path, grace_s=grace_s, history_s=history_s)
            await asyncio.sleep(0.1)


def _http_application(services: Services) -> HttpApplication:
    # Imported only when there is a gateway: it costs time and memory.
    from lmd.daemon.http.app import make_http

    return make_http(services)


class _OwnToken:
    """A puller that uses the daemon's own token for callers who bring none."""

    def __init__(self, puller: Puller, token: str) -> None:
        self._puller = puller
        self._token = token

    def pull(
        self,
        ref: ModelRef,
        *,
        token: str | None,
        on_event: Callable[[PullEvent], None],
        cancelled: threading.Event,
    ) -> TagRecord:
        """Pull *ref*; blocks."""
        return self._puller.pull(ref, token=token or self._token, on_event=on_event, cancelled=cancelled)

    def peek(self, ref: ModelRef, *, token: str | None, cancelled: threading.Event) -> PeekedModel:
        """Read the header of *ref* at its source; blocks."""
        return self._puller.peek(ref, token=token or self._token, cancelled=cancelled)
