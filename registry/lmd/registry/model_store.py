"""What creating and describing models needs of a store; `lmd.registry.store.Store` has it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import BinaryIO, Protocol, TypeVar

from lmd.registry.digest import Digest
from lmd.registry.gguf import GgufHeader, read_header
from lmd.registry.manifest import Manifest


class Tag(Protocol):
    """A name and the manifest it points to; times in seconds since the epoch."""

    @property
    def name(self) -> str:
        """The canonical name."""

    @property
    def manifest(self) -> Digest:
        """The digest of the manifest."""

    @property
    def modified_at(self) -> float:
        """When the name was last pointed at another manifest."""

    @property
    def pulled_at(self) -> float:
        """When the name was last set."""


TagT = TypeVar("TagT", bound=Tag)
TagT_co = TypeVar("TagT_co", bound=Tag, covariant=True)


#: Gets the bytes done and in all.
Progress = Callable[[int, int], None]


class HeldBlobs(Protocol):
    """A lease that is held: what is added to it is not collected."""

    def add(self, *digests: Digest) -> None:
        """Protect *digests*, which need not exist yet."""


class ModelStore(Protocol[TagT_co]):
    """The part of a store that deals with blobs, manifests and tags. Thread-safe."""

    def blob_size(self, digest: Digest) -> int:
        """The size of a blob in bytes. Raises BlobMissing."""

    def open_blob(self, digest: Digest) -> BinaryIO:
        """Open a blob for reading. Raises BlobMissing."""

    def put_bytes(self, data: bytes) -> Digest:
        """Store a small blob."""

    def compose(
        self,
        pieces: Iterable[bytes | memoryview],
        size_bytes: int,
        what: str,
        *,
        on_progress: Progress | None = None,
        cancelled: threading.Event | None = None,
    ) -> Digest:
        """Store what *pieces* add up to, *size_bytes*. Raises PullCancelled, DiskFull, and what *pieces* raises."""

    def recall(self, kind: str, key: str) -> str | None:
        """Find what was remembered."""

    def remember(self, kind: str, key: str, value: str) -> None:
        """Keep a small measured fact."""

    def put_manifest(self, manifest_bytes: bytes) -> Digest:
        """Store a manifest all of whose blobs are there. Raises BlobMissing."""

    def get_manifest(self, digest: Digest) -> Manifest:
        """Read a manifest. Raises BlobMissing, BlobCorrupt."""

    def set_tag(self, name: str, manifest: Digest, *, note: str = "", expected: Digest | None = None) -> TagT_co:
        """Point *name* at a manifest, durably. Raises TagChanged when it is at another one than *expected*."""

    def get_tag(self, name: str) -> TagT_co | None:
        """Look a name up, ignoring case."""

    def lease(self, owner: str, ttl_s: float = 86400) -> AbstractContextManager[HeldBlobs]:
        """Hold blobs for the time of a with block."""


def read_blob_header(store: ModelStore[Tag], digest: Digest) -> GgufHeader:
    """Read the GGUF header of a blob.

    Raises:
        GgufInvalid: when the blob is no GGUF.
        BlobMissing: when there is no such blob.
    """
    with store.open_blob(digest) as file:
        return read_header(file, store.blob_size(digest))
