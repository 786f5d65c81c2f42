"""How much of the store each name accounts for by itself, and how much it shares with others."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping

import structlog

from lmd.registry.digest import Digest
from lmd.registry.errors import BlobCorrupt, BlobMissing
from lmd.registry.store import Store

log = structlog.get_logger(__name__)


class Footprints:
    """Counts bytes by name. Thread-safe; manifests never change, so each is read once."""

    def __init__(self, store: Store) -> None:
        self._store = store
        # Protects what is remembered; held while manifests are read, so that two lists do not read them twice.
        self._lock = threading.Lock()
        self._blobs: dict[Digest, Mapping[Digest, int]] = {}
        self._own: Mapping[str, int] = {}
        self._generation = -1

    def own_bytes(self) -> Mapping[str, int]:
        """Return, by name, the bytes of the blobs that no other name needs: what removing the name would free."""
        with self._lock:
            generation = self._store.generation
            if generation != self._generation:
                self._own = self._count()
                self._generation = generation
            return self._own

    def _count(self) -> Mapping[str, int]:
        tags = self._store.list_tags()
        known = {tag.manifest: self._blobs.get(tag.manifest) or self._read(tag.manifest) for tag in tags}
        self._blobs = known
        users = Counter(digest for tag in tags for digest in known[tag.manifest])
        return {
            tag.name: sum(size for digest, size in known[tag.manifest].items() if users[digest] == 1) for tag in tags
        }

    def _read(self, digest: Digest) -> Mapping[Digest, int]:
        try:
            manifest = self._store.get_manifest(digest)
        except (BlobMissing, BlobCorrupt) as error:
            log.warning("manifest_unreadable", digest=str(digest), error=error.message)
            return {}
        # Not the manifest itself, which the size of a model leaves out as well.
        return {layer.digest: layer.size_bytes for layer in (manifest.config, *manifest.layers)}
