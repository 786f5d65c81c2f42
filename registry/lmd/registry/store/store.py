"""The store: everything this machine keeps of models, behind one object."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, BinaryIO, Self, TypeVar

from lmd.registry.digest import Digest
from lmd.registry.errors import DiskFull, TagChanged
from lmd.registry.store import oci_view
from lmd.registry.store.blobs import Blobs
from lmd.registry.store.composing import Composer
from lmd.registry.store.durable import Buffer, free_bytes
from lmd.registry.store.gate import Gate
from lmd.registry.store.gc import Collection, Collector
from lmd.registry.store.importing import Importer, Progress
from lmd.registry.store.ingest import Ingest, Ingests
from lmd.registry.store.journal import read_boot_id
from lmd.registry.store.layout import Layout
from lmd.registry.store.leases import Lease, Leases
from lmd.registry.store.lock import StoreLock
from lmd.registry.store.manifests import ManifestStore
from lmd.registry.store.records import StoreUsage, TagChange, TagRecord, TagVersion
from lmd.registry.store.recovery import open_index
from lmd.registry.store.reservations import Reservation, Reservations, Space
from lmd.registry.store.tables import Facts, LeaseTable, Manifests, Tags, Verified

if TYPE_CHECKING:
    from lmd.registry.manifest import Manifest

log = logging.getLogger(__name__)
T = TypeVar("T")

DEFAULT_GRACE_S = 3600.0
DEFAULT_LEASE_TTL_S = 86400.0
DEFAULT_HISTORY_S = 0.0


class Store:
    """A content-addressed store of models. Thread-safe; one per directory and machine.

    It promises: a blob under a digest hashes to it; a manifest with a name refers only to blobs that are here; what was
    acknowledged, a tag or its removal, survives power loss; garbage collection never takes what a tag, a lease, a
    resident model or a running ingest needs; no partial is ever served; after any crash `open` needs no human.

    Every method may raise StoreError, and those that write DiskFull; other errors are named.
    """

    def __init__(
        self,
        layout: Layout,
        lock: StoreLock,
        grace_s: float,
        history_s: float,
        clock: Callable[[], float],
        boot_id: str,
    ) -> None:
        self._layout = layout
        self._lock = lock
        self._clock = clock
        self._gate = Gate()
        self._index = open_index(layout, clock())
        self._tags = Tags(self._index)
        self._facts = Facts(self._index)
        self._manifest_table = Manifests(self._index)
        self._verified = Verified(self._index)
        self._blobs = Blobs(layout, self._verified, self._gate, clock)
        self._manifests = ManifestStore(self._blobs, self._manifest_table, self._verified, self._gate, clock)
        self._ingests = Ingests(layout, self._blobs, self._gate, boot_id)
        self._leases = Leases(LeaseTable(self._index), self._gate, clock)
        self._reservations = Reservations(self._space, str(layout.root))
        self._importer = Importer(layout, self._blobs, self._facts, self._reservations)
        self._composer = Composer(layout, self._blobs, self._reservations)
        self._collector = Collector(
            layout,
            self._tags,
            self._manifest_table,
            self._verified,
            self._leases,
            self._ingests,
            self._gate,
            clock,
            grace_s,
            history_s,
        )

    @classmethod
    def open(
        cls,
        root: Path,
        *,
        grace_s: float = DEFAULT_GRACE_S,
        history_s: float = DEFAULT_HISTORY_S,
        clock: Callable[[], float] = time.time,
        boot_id: str | None = None,
    ) -> Store:
        """Open the store at *root*, creating it if need be, and put right whatever a crash has left.

        Garbage collection spares what nothing needs for *grace_s*, and a tag's superseded versions for *history_s*.
        *clock* tells the time in seconds since the epoch; *boot_id* names the present boot of the machine and is asked
        of the kernel unless given.

        Raises: StoreLocked naming the process that owns it.
        """
        layout = Layout(root.absolute())
        layout.create()
        lock = StoreLock(layout.lock)
        try:
            layout.settle()
            store = cls._open_with_room(layout, lock, grace_s, history_s, clock, boot_id or read_boot_id())
            store._recover()
        except BaseException:
            lock.release()
            raise
        return store

    @classmethod
    def _open_with_room(
        cls,
        layout: Layout,
        lock: StoreLock,
        grace_s: float,
        history_s: float,
        clock: Callable[[], float],
        boot_id: str,
    ) -> Store:
        try:
            return cls(layout, lock, grace_s, history_s, clock, boot_id)
        except DiskFull:
            if not layout.free_reserve():
                raise
            return cls(layout, lock, grace_s, history_s, clock, boot_id)

    def _recover(self) -> None:
        """Finish what a dead process began. Blobs are not read: their marks tell which ones to doubt."""
        try:
            # The view first: it must not name what the sweep removes.
            self._refresh_view()
            try:
                self._with_room(self._leases.renew)
                self.sweep_condemned()
            except DiskFull as error:
                log.warning("some of what deleted models left stays for now: %s", error)
            self._layout.hold_reserve()
        except BaseException:
            self._index.close()
            raise

    @property
    def root(self) -> Path:
        """The directory of the store, absolute."""
        return self._layout.root

    def close(self) -> None:
        """Let go of the store; ingests stay for resume. Harmless when repeated."""
        self._ingests.close()
        self._index.close()
        self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # Blobs

    def has_blob(self, digest: Digest, size_bytes: int | None) -> bool:
        """Tell whether a blob is here, whole, and of that size.

        A file without a valid mark is hashed first, which takes its time; one that does not hash to its name goes to
        quarantine.
        """
        return self._blobs.has(digest, size_bytes)

    def blob_path(self, digest: Digest) -> Path:
        """Give the path of a blob, for reading. Raises: BlobMissing, BlobCorrupt."""
        self._blobs.require(digest)
        return self._layout.blob(digest)

    def blob_size(self, digest: Digest) -> int:
        """Give the size of a blob in bytes. Raises: BlobMissing, BlobCorrupt."""
        return self._blobs.require(digest).st_size

    def open_blob(self, digest: Digest) -> BinaryIO:
        """Open a blob for reading. Raises: BlobMissing, BlobCorrupt."""
        return self._blobs.open(digest)

    def verify_blob(self, digest: Digest) -> None:
        """Hash a blob whatever its mark says; a damaged one goes to quarantine. Raises: BlobMissing, BlobCorrupt."""
        self._blobs.verify(digest)

    def put_bytes(self, data: Buffer) -> Digest:
        """Store a small blob; durable when it returns. Without a lease, only the grace period keeps it."""
        return self._blobs.put_bytes(data)

    def import_file(
        self,
        path: Path,
        *,
        digest: Digest | None = None,
        on_progress: Progress | None = None,
        cancelled: threading.Event | None = None,
    ) -> tuple[Digest, int]:
        """Store a file from outside; return its digest and size in bytes, durable when it returns.

        The bytes are shared or linked where that is safe, else copied, and hashed once; *digest* is what they have to
        hash to. *on_progress* gets the bytes done and in all, from this thread.

        Raises: FileInvalid, FileChanged, DigestMismatch, PullCancelled.
        """
        return self._importer.run(path, digest, on_progress, cancelled)

    def staging_path(self) -> Path:
        """Give a fresh path on the store's file system for a file that a process of ours will write.

        What lies there is dropped when the store is opened the next time; see `adopt`.
        """
        return self._layout.temporary()

    def flush(self, staged: Path) -> None:
        """Write the file at a *staging_path* to the disk, so that `adopt` need not wait for that; it may grow still.

        A failure is final: what could not be written must not be adopted. Raises: DiskFull, StoreError.
        """
        self._importer.flush(staged)

    def adopt(
        self,
        staged: Path,
        *,
        on_progress: Progress | None = None,
        cancelled: threading.Event | None = None,
    ) -> tuple[Digest, int]:
        """Make a blob of the file at a *staging_path*, without a copy; durable when it returns.

        On failure the file is gone. Raises: FileInvalid, FileChanged, PullCancelled, DiskFull, StoreError.
        """
        return self._importer.adopt(staged, on_progress, cancelled)

    def compose(
        self,
        pieces: Iterable[Buffer],
        size_bytes: int,
        what: str,
        *,
        on_progress: Progress | None = None,
        cancelled: threading.Event | None = None,
    ) -> Digest:
        """Store what *pieces* add up to, *size_bytes* together, hashed while it is written; durable when it returns.

        Nothing stays on failure. *what* says in an error what the room is for. Without a lease, only the grace period
        keeps the blob. Raises: PullCancelled, DiskFull before the first byte, and what *pieces* raises.
        """
        return self._composer.run(pieces, size_bytes, what, on_progress, cancelled)

    # Ingests

    def begin_ingest(self, key: str, *, total_bytes: int | None) -> Ingest:
        """Start the ingest *key*, or resume it where it stands.

        What was received for another *total_bytes* is thrown away. Raises: StoreError while it has another writer.
        """
        return self._ingests.begin(key, total_bytes)

    def reserve(self, nbytes: int, what: str) -> Reservation:
        """Promise *nbytes* of disk space to *what*, before its first byte. Raises: DiskFull."""
        return self._reservations.reserve(nbytes, what)

    # Manifests and tags

    def put_manifest(self, manifest_bytes: bytes) -> Digest:
        """Store a manifest; durable when it returns.

        Raises: InvalidRequest when it does not parse, BlobMissing when a blob of it is not here.
        """
        return self._manifests.put(manifest_bytes)

    def get_manifest(self, digest: Digest) -> Manifest:
        """Read a manifest. Raises: BlobMissing, BlobCorrupt."""
        return self._manifests.get(digest)

    def set_tag(self, name: str, manifest: Digest, *, note: str = "", expected: Digest | None = None) -> TagRecord:
        """Point *name* to a stored manifest; survives power loss when it returns.

        *note* says how this came about; the history begins with its first word. With *expected*, *name* must point to
        that manifest until now.

        Raises: InvalidRequest for a name the store cannot hold, BlobMissing when the manifest or a blob of it is gone,
        TagChanged when *name* is not at *expected*.
        """
        oci_view.check_name(name)
        self._manifests.verify(manifest)
        with self._gate.change():
            with self._index.write("set_tag"):
                self._manifests.check(manifest)
                if expected is not None:
                    self._expect(name, expected)
                record = self._tags.put(name, manifest, note, self._clock())
            self._refresh_view()
        return record

    def _expect(self, name: str, manifest: Digest) -> None:
        tag = self._tags.get(name)
        if tag is None or tag.manifest != manifest:
            raise TagChanged(name, expected=str(manifest), actual="" if tag is None else str(tag.manifest))

    def get_tag(self, name: str) -> TagRecord | None:
        """Find a tag, whatever its case."""
        return self._tags.get(name)

    def list_tags(self, prefix: str = "") -> list[TagRecord]:
        """List the tags whose name starts with *prefix*, whatever its case; the last modified first."""
        return self._tags.find(prefix)

    @property
    def generation(self) -> int:
        """A number that grows with every change of a tag: what was listed after reading it is true while it stays.

        It starts anew with each `open`.
        """
        return self._tags.generation

    def tag_history(self, name: str) -> list[TagChange]:
        """List what happened to a tag, oldest first; deleted ones have a history too."""
        return self._tags.history(name)

    def tag_versions(self, name: str) -> list[TagVersion]:
        """List the manifests that a tag has pointed to since it was made, oldest first; the last is the current one.

        Garbage collection may have taken what only an earlier one needed.
        """
        versions = self._tags.versions(name)
        tag = None if versions else self._tags.get(name)
        # A rebuilt index has tags without a history.
        return versions if tag is None else [TagVersion(1, tag.manifest, tag.modified_at, "", None)]

    @property
    def history_s(self) -> float:
        """For how many seconds garbage collection spares the superseded versions of tags."""
        return self._collector.history_s

    def spared_versions(self) -> set[tuple[str, Digest]]:
        """List the superseded versions that garbage collection spares: the name of the tag and the manifest of each."""
        return self._collector.spared_versions()

    def delete_tag(self, name: str) -> TagRecord | None:
        """Remove a tag, also from a full disk; return what it was. It stays removed when this returns.

        What only this tag and its earlier versions needed is condemned: `sweep_condemned` removes it without a grace
        period.
        """
        with self._gate.change():
            record = self._with_room(lambda: self._delete_tag(name))
            if record is not None:
                self._refresh_view()
        return record

    def _delete_tag(self, name: str) -> TagRecord | None:
        with self._index.write("delete_tag"):
            versions = self._tags.versions(name)
            record = self._tags.delete(name, self._clock())
            if record is not None:
                for manifest in {record.manifest, *(version.manifest for version in versions)}:
                    facts = self._manifest_table.get(manifest)
                    self._verified.condemn([manifest, *(facts.blobs if facts else ())])
            return record

    # Garbage

    def lease(self, owner: str, ttl_s: float = DEFAULT_LEASE_TTL_S) -> Lease:
        """Start a lease; take it before asking for the blobs it is to protect."""
        return self._leases.new(owner, ttl_s)

    def set_resident_roots(self, provider: Callable[[], Iterable[Digest]]) -> None:
        """Say where to ask for the manifests of resident and starting models.

        *provider* is called with the store locked, from any thread: it must be quick and must not call back.
        """
        self._collector.residents = provider

    def sweep_condemned(self) -> int:
        """Remove what deleted tags needed and nothing else does, also from a full disk; return the bytes freed.

        What a resident model or a lease still needs is left for a later call.
        """
        freed_bytes = self._with_room(self._collector.sweep_condemned)
        if freed_bytes:
            self._layout.hold_reserve()
        return freed_bytes

    def collect(
        self, *, dry_run: bool = False, grace_s: float | None = None, history_s: float | None = None
    ) -> Collection:
        """Remove, or only list, what nothing needs and neither the grace period nor the history of a tag spares.

        Returns an iterator of GarbageItem that removes as it goes, and tells `spared_items`. Others may use the store
        meanwhile, and the iterator may change threads.
        """
        return self._with_room(lambda: self._collector.collect(dry_run, grace_s, history_s))

    def usage(self) -> StoreUsage:
        """Add up what is stored."""
        sizes = {digest: status.st_size for digest, status in self._layout.list_blobs()}
        only_versions = self._collector.only_versions()
        ingests = [status.st_size for _, status in self._layout.list_parts()]
        quarantined = [status.st_size for _, status in self._layout.list_quarantined()]
        return StoreUsage(
            models=len(self._tags.find()),
            blobs=len(sizes),
            blob_bytes=sum(sizes.values()),
            ingests=len(ingests),
            ingest_bytes=sum(ingests),
            quarantined=len(quarantined),
            quarantined_bytes=sum(quarantined),
            free_bytes=free_bytes(self.root),
            version_bytes=sum(sizes.get(digest, 0) for digest in only_versions),
        )

    # Facts

    def recall(self, kind: str, key: str) -> str | None:
        """Find what was remembered."""
        return self._facts.recall(kind, key)

    def remember(self, kind: str, key: str, value: str) -> None:
        """Keep a small measured fact."""
        self._facts.remember(kind, key, value)

    def _space(self) -> Space:
        status = os.statvfs(self.root)
        return Space(status.f_bavail * status.f_frsize, status.f_blocks * status.f_frsize)

    def _with_room(self, operation: Callable[[], T]) -> T:
        """Run *operation*; when the disk is full, give it the reserve and run it once more."""
        try:
            return operation()
        except DiskFull:
            if not self._layout.free_reserve():
                raise
            log.warning("the disk is full; using the reserve")
            return operation()

    def _refresh_view(self) -> None:
        """Bring the derived view up to date; it may lag behind on a full disk, the index is what counts."""
        with self._gate.hold():
            content = oci_view.render(self._tags.find(), self._manifest_table.described())
            try:
                oci_view.refresh(self._layout, content)
            except OSError as error:
                log.warning("the OCI view is out of date: %s", error)
