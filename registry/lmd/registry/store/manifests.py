"""Manifests: blobs that name other blobs. None is visible before all it refers to is there."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from lmd.registry.digest import Digest
from lmd.registry.errors import BlobMissing, InvalidRequest, StoreError
from lmd.registry.store.blobs import Blobs
from lmd.registry.store.descriptors import MANIFEST_MAX_BYTES, ManifestFacts, read_manifest_facts
from lmd.registry.store.gate import Gate
from lmd.registry.store.tables import Manifests, Verified

if TYPE_CHECKING:
    from lmd.registry.manifest import Manifest


class ManifestStore:
    """Puts and reads manifests; thread-safe."""

    def __init__(
        self, blobs: Blobs, table: Manifests, verified: Verified, gate: Gate, clock: Callable[[], float]
    ) -> None:
        self._blobs = blobs
        self._table = table
        self._verified = verified
        self._gate = gate
        self._clock = clock

    def put(self, data: bytes) -> Digest:
        """Store a manifest whose blobs are all here; durable when it returns.

        Raises: InvalidRequest, BlobMissing, DiskFull, StoreError.
        """
        facts = read_manifest_facts(data)
        if facts.lm_config is not None and facts.blobs[facts.lm_config] > MANIFEST_MAX_BYTES:
            raise InvalidRequest(f"the manifest's lmd.json is larger than {MANIFEST_MAX_BYTES} bytes", field="manifest")
        self._verify(facts)
        digest = self._blobs.put_bytes(data)
        with self._gate.change():
            self._require(facts)
            self._table.add(digest, facts, self._clock())
            self._verified.pardon([digest, *facts.blobs])
        return digest

    def verify(self, digest: Digest) -> None:
        """Hash what bears no valid mark of a manifest and its blobs, before the gate is taken. Raises: BlobMissing."""
        facts = self._table.get(digest)
        if facts is None or not self._blobs.has(digest, facts.size_bytes):
            raise BlobMissing(str(digest))
        self._verify(facts)

    def check(self, digest: Digest) -> None:
        """Make sure, with the gate held, that a manifest and all it refers to is here. Raises: BlobMissing."""
        facts = self._table.get(digest)
        if facts is None or self._blobs.peek(digest) is None:
            raise BlobMissing(str(digest))
        self._require(facts)
        self._verified.pardon([digest, *facts.blobs])

    def get(self, digest: Digest) -> Manifest:
        """Read a manifest and its ``lmd.json``, hashing both.

        Raises: BlobMissing, BlobCorrupt, StoreError.
        """
        data = self._blobs.read(digest, MANIFEST_MAX_BYTES)
        try:
            facts = read_manifest_facts(data)
        except InvalidRequest as error:
            raise StoreError(f"blob {digest} is no manifest: {error.message}", operation="get_manifest") from error
        if facts.lm_config is None:
            raise StoreError(f"the manifest {digest} has no lmd.json", operation="get_manifest")
        lm_config = self._blobs.read(facts.lm_config, MANIFEST_MAX_BYTES)
        # Imported late: everything else here works without the parser, and so do the store's own tests.
        from lmd.registry.manifest import Manifest

        try:
            return Manifest.parse(data, lm_config)
        except InvalidRequest as error:
            raise StoreError(f"{digest} cannot be read: {error.message}", operation="get_manifest") from error

    def _verify(self, facts: ManifestFacts) -> None:
        for blob, size_bytes in facts.blobs.items():
            if not self._blobs.has(blob, size_bytes):
                raise BlobMissing(str(blob))

    def _require(self, facts: ManifestFacts) -> None:
        for blob, size_bytes in facts.blobs.items():
            status = self._blobs.peek(blob)
            if status is None or status.st_size != size_bytes:
                raise BlobMissing(str(blob))
