"""Pulling models: from a reference to a tag whose blobs are all in the store.

The order keeps the store's promises at every step: a lease before the first look at what is there, space reserved
before the first byte, every blob verified and durable before the manifest, the tag last. Blobs are shared between
callers by digest: who may read a name may read its blobs, whoever pulled them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from lmd.registry.cancel import CancelScope
from lmd.registry.create import build_from_files
from lmd.registry.digest import Digest
from lmd.registry.errors import BlobMissing, ModelNotFound, PullCancelled, SourceDenied, SourceError
from lmd.registry.flights import FlightProgress, Flights, FlightState, Ticket
from lmd.registry.gguf import GgufHeader, combine, read_header
from lmd.registry.http import Http, HttpOptions
from lmd.registry.lm_config import LmConfig, Origin
from lmd.registry.manifest import FileLayer
from lmd.registry.model_store import read_blob_header
from lmd.registry.peek import PeekedModel, peek_plan
from lmd.registry.planning import PlannedFile, PullPlan, plan_hub, plan_url
from lmd.registry.ref import FileRef, HubRef, ModelRef, NameRef, UrlRef
from lmd.registry.retry import RetryPolicy, with_retries
from lmd.registry.sidecars import TextKind, Texts, fetch_text, read_texts
from lmd.registry.sources import hub_env
from lmd.registry.sources.file import ImportedFile, import_files, read_file_headers, shards_of
from lmd.registry.sources.hub import HubSource
from lmd.registry.sources.url import UrlSource
from lmd.registry.transfer import TransferOptions

if TYPE_CHECKING:
    from lmd.registry.aliases import AliasTable
    from lmd.registry.store import Lease, Store, TagRecord

T = TypeVar("T")

#: Small facts that the store remembers: the digest that a source's file had.
_FACT = "source"


class PullState(Enum):
    """The state of one step of a pull; the names are those of PullProgress.State on the wire."""

    RESOLVING = "resolving"
    DOWNLOADING = "downloading"
    RETRYING = "retrying"
    COMMITTING = "committing"
    DONE = "done"
    PRESENT = "present"


_STATES = {
    FlightState.DOWNLOADING: PullState.DOWNLOADING,
    FlightState.RETRYING: PullState.RETRYING,
    FlightState.COMMITTING: PullState.COMMITTING,
    FlightState.DONE: PullState.DONE,
}


@dataclass(frozen=True, slots=True)
class PullEvent:
    """Progress of one blob, with absolute values.

    digest: "" while resolving, or when the source does not announce one.
    total_bytes: 0 when not known.
    resumed_bytes: what was there when this pull came to the blob.
    detail: more in words, such as the error that is being retried.
    """

    digest: str
    filename: str
    completed_bytes: int
    total_bytes: int
    state: PullState
    resumed_bytes: int = 0
    detail: str = ""


@dataclass(frozen=True, slots=True)
class PullOptions:
    """How to pull.

    connections: ranges of one blob fetched at once.
    stall_timeout_s: silence of a connection before it is dropped.
    min_rate_bytes_per_s: a connection slower than this over that time counts as stalled.
    retry: when to try again; the budget counts failures without progress.
    resolve_tries: as retry.tries, while asking what there is: nobody wants to wait long for "no network".
    max_bytes: the largest file that is accepted.
    with_projector: whether to fetch the file for images that belongs to the weights, where there is one.
    proxies: "http", "https" and "all" to proxy URLs, "no" to a list of excepted hosts.
    join_after_s, join_below_bytes_per_s, step_bytes: see TransferOptions.
    """

    connections: int = 4
    stall_timeout_s: float = 30.0
    connect_timeout_s: float = 10.0
    min_rate_bytes_per_s: int = 512
    retry: RetryPolicy = field(default_factory=RetryPolicy)
    resolve_tries: int = 3
    max_bytes: int = 4 << 40
    with_projector: bool = False
    proxies: Mapping[str, str] = field(default_factory=dict)
    join_after_s: float = 0.25
    join_below_bytes_per_s: float = 200e6
    step_bytes: int | None = None


EventSink = Callable[[PullEvent], None]


class Puller:
    """Pulls models into one store. Thread-safe: pulls of the same blob share one transfer."""

    def __init__(
        self,
        store: Store,
        aliases: AliasTable,
        *,
        endpoint: str,
        user_agent: str,
        options: PullOptions | None = None,
    ) -> None:
        self._options = options or PullOptions()
        self._store = store
        self._aliases = aliases
        # For processes whose main did not: the first call decides.
        hub_env.prepare(store.root)
        self._http = Http(
            HttpOptions(
                user_agent=user_agent,
                connect_timeout_s=self._options.connect_timeout_s,
                read_timeout_s=self._options.stall_timeout_s,
                proxies=self._options.proxies,
            )
        )
        self._active = 0
        # Guards the count of running pulls.
        self._lock = threading.Lock()
        self._hub = HubSource(self._http, endpoint)
        self._url = UrlSource(self._http)
        self._flights = Flights(
            store,
            self._http,
            TransferOptions(
                connections=self._options.connections,
                stall_timeout_s=self._options.stall_timeout_s,
                min_rate_bytes_per_s=self._options.min_rate_bytes_per_s,
                max_bytes=self._options.max_bytes,
                step_bytes=self._options.step_bytes,
                join_after_s=self._options.join_after_s,
                join_below_bytes_per_s=self._options.join_below_bytes_per_s,
                retry=self._options.retry,
            ),
        )

    def resolve(
        self, ref: HubRef | UrlRef | NameRef, *, token: str | None = None, cancelled: threading.Event | None = None
    ) -> PullPlan:
        """Ask the source what a pull of *ref* would fetch; nothing is fetched.

        Raises:
            ModelNotFound: a plain name that no alias knows; with close names.
            SourceError, DigestMismatch, InvalidRequest, PullCancelled: as `pull`.
        """
        with CancelScope(cancelled or threading.Event()) as cancel:
            return self._resolve(ref, token, cancel, lambda _: None)

    def peek(self, ref: ModelRef, *, token: str | None = None, cancelled: threading.Event | None = None) -> PeekedModel:
        """Read the header of a model where it is now; nothing comes into the store.

        Raises:
            ModelNotFound, SourceError, DigestMismatch, InvalidRequest, PullCancelled: as `pull`.
            GgufInvalid: it is no model, or its header is larger than `peek.MAX_HEADER_BYTES`.
            FileInvalid: a local file cannot be read.
        """
        with self._counted(), CancelScope(cancelled or threading.Event()) as cancel:
            if isinstance(ref, FileRef):
                return PeekedModel(ref.name, combine(read_file_headers(shards_of(ref.path))), {}, 0)

            def quietly(_event: PullEvent) -> None:
                pass

            plan = self._resolve(ref, token, cancel, quietly)
            present = self._present(plan)
            header, missing_bytes = self._patiently(
                lambda: peek_plan(self._http, plan, cancel, present), cancel, quietly
            )
            settings = replace(plan, texts=tuple(text for text in plan.texts if text.kind is TextKind.PARAMETERS))
            texts = self._fetch_texts(settings, cancel, quietly)
            return PeekedModel(plan.name, header, dict(texts.parameters), missing_bytes)

    def pull(self, ref: ModelRef, *, token: str | None, on_event: EventSink, cancelled: threading.Event) -> TagRecord:
        """Bring *ref* into the store and point its tag at it.

        *on_event* is called from this thread. *cancelled* ends the pull within a tenth of a second; what arrived is
        kept for resume, as it is after any failure that does not discredit it.

        Raises:
            ModelNotFound: a plain name that no alias knows; with close names.
            SourceError: the source refuses, fails for the whole retry budget, or must not be trusted.
            DigestMismatch, GgufInvalid: the bytes are not what was announced, or no model; the tag stays as it was.
            FileInvalid, FileChanged: a local file cannot be imported.
            DiskFull, StoreError: there is no room for it, or the disk fails.
            PullCancelled: *cancelled* was set.
        """
        with self._counted(), CancelScope(cancelled) as cancel, self._store.lease(f"pull {ref.name}") as lease:
            cancel.check()
            if isinstance(ref, FileRef):
                return self._import(ref, lease, on_event, cancelled)
            on_event(PullEvent("", "", 0, 0, PullState.RESOLVING))
            plan = self._resolve(ref, token, cancel, on_event)
            layers = self._fetch(plan, lease, on_event, cancel)
            texts = self._fetch_texts(plan, cancel, on_event)
            cancel.check()
            return self._build(plan.name, layers, Origin(plan.origin, plan.commit), plan.license, texts)

    def close(self, timeout_s: float = 5.0) -> None:
        """Stop every transfer, keeping what arrived, and close the idle connections."""
        self._flights.close(timeout_s)
        self._http.close()

    @contextmanager
    def _counted(self) -> Iterator[None]:
        """Close idle connections when the last pull ends: servers hang up on them, and nobody would notice."""
        with self._lock:
            self._active += 1
        try:
            yield
        finally:
            with self._lock:
                self._active -= 1
                last = not self._active
            if last:
                self._http.close_idle()

    # Steps.

    def _resolve(
        self, ref: HubRef | UrlRef | NameRef, token: str | None, cancel: CancelScope, on_event: EventSink
    ) -> PullPlan:
        name = ref.name
        if isinstance(ref, NameRef):
            target = self._aliases.resolve(ref)
            if target is None:
                suggestions = self._aliases.suggest(name)
                hint = "" if suggestions else "name a repository of the Hub as `hf.co/org/repo`"
                raise ModelNotFound(name, suggestions=suggestions, hint=hint)
            ref = target
        source_ref = ref

        def attempt() -> PullPlan:
            if isinstance(source_ref, UrlRef):
                return plan_url(self._url, source_ref, hub_credentials=self._hub.credentials(token), cancel=cancel)
            return plan_hub(
                self._hub,
                source_ref,
                name,
                token=token,
                with_projector=self._options.with_projector,
                cancel=cancel,
            )

        return self._patiently(attempt, cancel, on_event)

    def _fetch(self, plan: PullPlan, lease: Lease, on_event: EventSink, cancel: CancelScope) -> list[FileLayer]:
        stored: dict[str, tuple[Digest, int]] = {}
        with ExitStack() as tickets:
            waiting: list[tuple[PlannedFile, Ticket]] = []
            # All of them are joined first, which reserves the space for all of them.
            for file in plan.files:
                found = self._find(file, lease)
                if found is None:
                    ticket = self._flights.join(file.key, file.remote, resumable=file.is_pinned, cancel=cancel)
                    if ticket is not None:
                        tickets.callback(ticket.leave)
                        waiting.append((file, ticket))
                        continue
                    found = self._find(file, lease)
                    if found is None:
                        raise PullCancelled("the blob went away while it was looked at")
                digest, size_bytes = found
                stored[file.key] = found
                on_event(PullEvent(str(digest), file.filename, size_bytes, size_bytes, PullState.PRESENT))
            for file, ticket in waiting:
                digest, size_bytes = self._wait(file, ticket, on_event, cancel)
                lease.add(digest)
                stored[file.key] = digest, size_bytes
                if file.digest is None and file.is_pinned:
                    self._store.remember(_FACT, file.key, str(digest))
        return [FileLayer(*stored[file.key], file.filename, file.role) for file in plan.files]

    def _present(self, plan: PullPlan) -> dict[str, GgufHeader]:
        """Return the headers of the planned files that the store has, by their key."""
        headers = {}
        for file in plan.files:
            digest = self._known_digest(file)
            if digest is not None and self._store.has_blob(digest, file.size_bytes):
                # It may be removed just now; then it is fetched like the others.
                with suppress(BlobMissing):
                    headers[file.key] = read_blob_header(self._store, digest)
        return headers

    def _known_digest(self, file: PlannedFile) -> Digest | None:
        """Return the digest that is announced, or that an earlier pull found."""
        if file.digest is not None or not file.is_pinned:
            return file.digest
        known = self._store.recall(_FACT, file.key)
        return Digest.parse(known) if known is not None else None

    def _find(self, file: PlannedFile, lease: Lease) -> tuple[Digest, int] | None:
        """Return a planned file that the store has."""
        digest = self._known_digest(file)
        if digest is None:
            return None
        lease.add(digest)
        if not self._store.has_blob(digest, file.size_bytes):
            return None
        return digest, self._store.blob_size(digest)

    def _wait(self, file: PlannedFile, ticket: Ticket, on_event: EventSink, cancel: CancelScope) -> tuple[Digest, int]:
        def report(progress: FlightProgress) -> None:
            on_event(
                PullEvent(
                    digest=str(file.digest) if file.digest is not None else "",
                    filename=file.filename,
                    completed_bytes=progress.received_bytes,
                    total_bytes=file.size_bytes or 0,
                    state=_STATES[progress.state],
                    resumed_bytes=progress.resumed_bytes,
                    detail=progress.detail,
                )
            )

        try:
            return ticket.wait(cancel, report)
        except SourceDenied:
            if ticket.leads:
                raise
        # The transfer used another caller's token, which says nothing about this one's.
        again = self._flights.join(file.key, file.remote, resumable=file.is_pinned, cancel=cancel)
        if again is None:
            assert file.digest is not None
            return file.digest, self._store.blob_size(file.digest)
        with again:
            return again.wait(cancel, report)

    def _fetch_texts(self, plan: PullPlan, cancel: CancelScope, on_event: EventSink) -> Texts:
        contents = []
        for text in plan.texts:
            data = self._patiently(partial(fetch_text, self._http, text, cancel), cancel, on_event)
            contents.append((text, data))
        return read_texts(contents)

    def _patiently(self, attempt: Callable[[], T], cancel: CancelScope, on_event: EventSink) -> T:
        policy = replace(self._options.retry, tries=self._options.resolve_tries)

        def report(error: SourceError) -> None:
            on_event(PullEvent("", "", 0, 0, PullState.RETRYING, detail=error.message))

        return with_retries(policy, cancel, attempt, report)

    def _import(self, ref: FileRef, lease: Lease, on_event: EventSink, cancelled: threading.Event) -> TagRecord:
        def report(path: Path, done: int, total: int) -> None:
            on_event(PullEvent("", path.name, done, total, PullState.DOWNLOADING))

        def stored(file: ImportedFile) -> None:
            lease.add(file.digest)
            size = file.size_bytes
            on_event(PullEvent(str(file.digest), file.filename, size, size, PullState.DONE))

        files = import_files(self._store, shards_of(ref.path), on_progress=report, on_done=stored, cancelled=cancelled)
        layers = [FileLayer(file.digest, file.size_bytes, file.filename, "weights") for file in files]
        return self._build(ref.name, layers, Origin(f"file:{ref.path}"), None, Texts())

    def _build(
        self,
        name: str,
        layers: list[FileLayer],
        origin: Origin,
        license_name: str | None,
        texts: Texts,
    ) -> TagRecord:
        headers = []
        for layer in layers:
            if layer.role == "weights":
                with self._store.open_blob(layer.digest) as blob:
                    headers.append(read_header(blob, layer.size_bytes))
        config = LmConfig(
            system=texts.system,
            parameters=dict(texts.parameters),
            licenses=tuple(text for text in (license_name, texts.license) if text is not None),
            origin=origin,
        )
        return build_from_files(self._store, name, layers, lm=config, headers=headers)
