"""Which models are pinned, also over restarts, and which are loaded when the daemon starts."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing

import structlog

from lmd.daemon.errors import NotPinned
from lmd.daemon.residency.facts import FactStore, Pool
from lmd.daemon.residency.residency import Residency
from lmd.daemon.residency.values import Loadable, RunnerStatus, Waiting
from lmd.registry.errors import LmdError, ModelNotFound
from lmd.registry.ref import parse_ref

log = structlog.get_logger(__name__)

#: Where the store keeps them, as one JSON object: canonical name → the parameters that were asked for.
KIND, KEY = "residency", "pins"


class Pins:
    """Pins models by name: after a new version of the name, that is what is pinned.

    A pin is on disk before the load begins, and taken back when the load fails. Of two calls for one name the later
    one counts. Use it from the event loop only.
    """

    def __init__(
        self,
        residency: Residency,
        resolve: Callable[[str], Awaitable[Loadable]],
        store: FactStore,
        pool: Pool,
        preload: Sequence[str] = (),
    ) -> None:
        self._residency = residency
        self._resolve = resolve
        self._store = store
        self._pool = pool
        self._preload = preload
        self._pins: dict[str, dict[str, object]] = {}
        #: One write at a time, each of everything: the last one written is the last one decided.
        self._writing = asyncio.Lock()
        self._loading: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Read the pins, and begin to load them and what the configuration names, without waiting for it.

        Raises:
            LmdError: the store cannot be read.
        """
        self._pins = _parsed(await self._pool.run(self._store.recall, KIND, KEY))
        if self._pins or self._preload:
            self._loading = asyncio.create_task(self._load_all(), name="preload")

    async def stop(self) -> None:
        """End what `start` began."""
        if self._loading is not None:
            self._loading.cancel()
            await asyncio.wait([self._loading])

    async def pin(
        self, text: str, parameters: Mapping[str, object], *, caller: str = ""
    ) -> AsyncGenerator[Waiting | RunnerStatus, None]:
        """Load a model and keep it: yield what it waits for, and last the ready runner.

        Closing undoes neither the load nor the pin.

        Raises:
            InvalidRef, ModelNotFound, InvalidRequest: there is no such model, or a parameter is out of range.
            DeviceMemoryShort: it does not fit beside the models that may not leave.
            LmdError: as `Residency.load`.
        """
        model = await self._resolve(text)
        before = self._pins.get(model.name)
        wanted = dict(parameters)
        self._residency.pin(model, wanted)
        self._pins[model.name] = wanted
        try:
            await self._save()
            async with aclosing(self._residency.load(model, wanted, caller=caller)) as events:
                async for event in events:
                    yield event
        except LmdError:
            if self._pins.get(model.name) is wanted:
                await self._take_back(model, before)
            raise

    async def unpin(self, text: str) -> str:
        """Let a model leave like any other, and return its full name; it need not be in the store any more.

        Raises:
            InvalidRef: *text* is no model reference.
            NotPinned: it is not pinned.
        """
        ref = parse_ref(text)
        name = str(ref.name)
        if name not in self._pins:
            # An alias, or a digest: what it means only the catalog knows.
            try:
                name = (await self._resolve(text)).name
            except LmdError:
                name = ""
        if name not in self._pins:
            raise NotPinned(text, pinned=sorted(self._pins))
        del self._pins[name]
        self._residency.unpin(name)
        await self._save()
        return name

    async def _take_back(self, model: Loadable, before: dict[str, object] | None) -> None:
        if before is None:
            del self._pins[model.name]
            self._residency.unpin(model.name)
        else:
            self._pins[model.name] = before
            self._residency.pin(model, before)
        await self._save()

    async def _save(self) -> None:
        async with self._writing:
            await self._pool.run(self._store.remember, KIND, KEY, json.dumps(self._pins, sort_keys=True))

    async def _load_all(self) -> None:
        """Load one after the other: side by side they would only fight for the disk."""
        for name, parameters in list(self._pins.items()):
            await self._load_pinned(name, parameters)
        for name in self._preload:
            await self._load(name, {})

    async def _load_pinned(self, name: str, parameters: dict[str, object]) -> None:
        try:
            self._residency.pin(await self._resolve(name), parameters)
        except ModelNotFound:
            log.warning("pinned_model_gone", model=name)
            if self._pins.get(name) is parameters:
                del self._pins[name]
                await self._save()
            return
        except LmdError as error:
            log.warning("pinned_model_not_loaded", model=name, error=error.message)
            return
        await self._load(name, parameters)

    async def _load(self, name: str, parameters: Mapping[str, object]) -> None:
        try:
            async with aclosing(self._residency.load(await self._resolve(name), parameters)) as events:
                async for _ in events:
                    pass
        except LmdError as error:
            log.warning("model_not_preloaded", model=name, error=error.message)


def _parsed(text: str | None) -> dict[str, dict[str, object]]:
    """Return the pins that were saved; a record that another version wrote counts as none."""
    try:
        saved = json.loads(text or "{}")
    except ValueError:
        saved = None
    if not isinstance(saved, dict) or not all(isinstance(parameters, dict) for parameters in saved.values()):
        log.warning("pins_unreadable")
        return {}
    return saved
