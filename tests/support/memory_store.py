"""A model store in memory: enough of one to create and describe models."""

from __future__ import annotations

import io
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO

from lmd.registry.digest import Digest
from lmd.registry.errors import BlobMissing
from lmd.registry.manifest import Manifest, lm_config_digest
from lmd.registry.model_store import Progress


@dataclass(frozen=True)
class MemoryTag:
    name: str
    manifest: Digest
    modified_at: float
    pulled_at: float


class MemoryLease:
    def __init__(self) -> None:
        self.held: set[Digest] = set()

    def add(self, *digests: Digest) -> None:
        self.held.update(digests)


class MemoryStore:
    """Keeps blobs in a dictionary and, as the real store does, refuses manifests whose blobs are not there.

    It also insists that whatever is written is held by a lease, which the real store cannot check.
    """

    def __init__(self) -> None:
        self.blobs: dict[Digest, bytes] = {}
        self.tags: dict[str, MemoryTag] = {}
        self.notes: list[str] = []
        self.leases: list[MemoryLease] = []
        self.opened: list[Digest] = []
        self.facts: dict[tuple[str, str], str] = {}

    def add(self, data: bytes) -> Digest:
        """Put a file in, as a pull or an upload would."""
        digest = Digest.of(data)
        self.blobs[digest] = data
        return digest

    def _blob(self, digest: Digest) -> bytes:
        if digest not in self.blobs:
            raise BlobMissing(str(digest))
        return self.blobs[digest]

    def blob_size(self, digest: Digest) -> int:
        return len(self._blob(digest))

    def open_blob(self, digest: Digest) -> BinaryIO:
        self.opened.append(digest)
        return io.BytesIO(self._blob(digest))

    def put_bytes(self, data: bytes) -> Digest:
        digest = Digest.of(data)
        assert any(digest in lease.held for lease in self.leases), "written without a lease"
        self.blobs[digest] = data
        return digest

    def compose(
        self,
        pieces: Iterable[bytes | memoryview],
        size_bytes: int,
        what: str,
        *,
        on_progress: Progress | None = None,
        cancelled: threading.Event | None = None,
    ) -> Digest:
        data = b"".join(bytes(piece) for piece in pieces)
        assert len(data) == size_bytes, "another size than announced"
        return self.add(data)

    def recall(self, kind: str, key: str) -> str | None:
        return self.facts.get((kind, key))

    def remember(self, kind: str, key: str, value: str) -> None:
        self.facts[kind, key] = value

    def put_manifest(self, manifest_bytes: bytes) -> Digest:
        lm = self._blob(lm_config_digest(manifest_bytes))
        for digest in Manifest.parse(manifest_bytes, lm).blob_digests():
            self._blob(digest)
        return self.put_bytes(manifest_bytes)

    def get_manifest(self, digest: Digest) -> Manifest:
        data = self._blob(digest)
        return Manifest.parse(data, self._blob(lm_config_digest(data)))

    def set_tag(self, name: str, manifest: Digest, *, note: str = "", expected: Digest | None = None) -> MemoryTag:
        now = float(len(self.notes))
        tag = MemoryTag(name, manifest, now, now)
        self.tags[name.lower()] = tag
        self.notes.append(note)
        return tag

    def get_tag(self, name: str) -> MemoryTag | None:
        return self.tags.get(name.lower())

    @contextmanager
    def lease(self, owner: str, ttl_s: float = 86400) -> Iterator[MemoryLease]:
        lease = MemoryLease()
        self.leases.append(lease)
        try:
            yield lease
        finally:
            self.leases.remove(lease)
