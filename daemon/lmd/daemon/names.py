"""Finds the model a text means, and takes names away. Synchronous: it reads the index and manifests."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass

import structlog

from lmd.registry.aliases import AliasTable
from lmd.registry.digest import Digest
from lmd.registry.errors import BlobCorrupt, BlobMissing, DiskFull, InvalidRequest, ModelNotFound, StoreError
from lmd.registry.ref import FileRef, ModelRef, NameRef, parse_ref
from lmd.registry.removed import remember_removed
from lmd.registry.store import Store, TagRecord

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Removal:
    """What came of a removal: bytes that are free now, and those that follow when the model stops."""

    freed_bytes: int
    pending_bytes: int


def new_name(text: str, field: str) -> str:
    """Return the canonical form of a name for something new.

    Raises: InvalidRef, InvalidRequest for references to other places and for ones with a digest.
    """
    ref = parse_ref(text)
    if not isinstance(ref, NameRef) or ref.digest is not None:
        raise InvalidRequest(
            f"`{text[:200]}` is no name for a new model",
            field=field,
            hint="a name looks like `my-model`, `my-model:v2` or `me/my-model`",
        )
    return ref.name


class Names:
    """The names of the store as people write them. Thread-safe, as the store is."""

    def __init__(self, store: Store, aliases: AliasTable) -> None:
        self._store = store
        self._aliases = aliases
        self._remembering = threading.Lock()  # protects what is noted of removed models

    def find(self, text: str) -> TagRecord:
        """Return the tag that *text* means: the name itself, or the repository it is an alias of.

        Raises:
            InvalidRef: *text* is no model reference.
            ModelNotFound: there is no such model, or it has another digest than the one asserted.
        """
        ref = parse_ref(text)
        for name in self._equivalents(ref):
            tag = self._store.get_tag(name)
            if tag is not None and self._comes_from(ref, tag):
                self._check_digest(ref, tag)
                return tag
        raise self._not_found(ref, may_pull=True)

    def find_exactly(self, text: str) -> TagRecord:
        """Return the tag of this very name: what is changed or removed is never an equivalent.

        Raises: as `find`.
        """
        ref = parse_ref(text)
        tag = self._store.get_tag(ref.name)
        if tag is None or not self._comes_from(ref, tag):
            raise self._not_found(ref, may_pull=False)
        self._check_digest(ref, tag)
        return tag

    def exclusive_blobs(self, tag: TagRecord) -> dict[Digest, int]:
        """Return the blobs that only this name and its earlier versions need, with their sizes in bytes."""
        manifests = {tag.manifest, *(version.manifest for version in self._store.tag_versions(tag.name))}
        own = set[Digest]().union(*(self._blobs(tag.name, manifest) for manifest in manifests))
        kept = {(other.name, other.manifest) for other in self._store.list_tags() if other.name != tag.name}
        kept |= {(other, manifest) for other, manifest in self._store.spared_versions() if other != tag.name}
        for other, manifest in kept:
            if own:
                own -= self._blobs(other, manifest)
        return {digest: self._size_if_there(digest) for digest in own}

    def remove(self, tag: TagRecord) -> bool:
        """Remove a name, and at once the bytes that nothing needs; return whether its manifest has another name.

        Raises: ModelNotFound when the name has gone meanwhile.
        """
        self._remember(tag)
        if self._store.delete_tag(tag.name) is None:
            raise ModelNotFound(tag.name)
        self._store.sweep_condemned()
        return any(other.manifest == tag.manifest for other in self._store.list_tags())

    def _remember(self, tag: TagRecord) -> None:
        """Note what the model and its versions were made of; a convenience that must not stand in the way."""
        manifests = []
        for digest in {tag.manifest, *(version.manifest for version in self._store.tag_versions(tag.name))}:
            with suppress(BlobMissing, BlobCorrupt, StoreError):
                manifests.append(self._store.get_manifest(digest))
        try:
            with self._remembering:
                remember_removed(self._store, manifests)
        except (DiskFull, StoreError) as error:
            log.info("removed_model_not_remembered", name=tag.name, error=error.message)

    def removal(self, blobs: Mapping[Digest, int]) -> Removal:
        """Return how much of *blobs*, as `exclusive_blobs` had them, is free by now."""
        self._store.sweep_condemned()
        pending_bytes = sum(self._size_if_there(digest) for digest in blobs)
        return Removal(sum(blobs.values()) - pending_bytes, pending_bytes)

    def _equivalents(self, ref: ModelRef) -> Iterator[str]:
        yield ref.name
        if isinstance(ref, NameRef):
            target = self._aliases.resolve(ref)
            if target is not None:
                yield target.name

    def _comes_from(self, ref: ModelRef, tag: TagRecord) -> bool:
        """Of the files called x.gguf only one made the model `x`."""
        if not isinstance(ref, FileRef):
            return True
        return self._store.get_manifest(tag.manifest).lm.origin.ref == f"file:{ref.path}"

    def _check_digest(self, ref: ModelRef, tag: TagRecord) -> None:
        """A digest asserts the manifest or, as a pull understands it, the only weights file."""
        if ref.digest is None or ref.digest == tag.manifest:
            return
        weights = self._store.get_manifest(tag.manifest).weights
        if len(weights) == 1 and weights[0].digest == ref.digest:
            return
        raise ModelNotFound(
            f"{ref.name}@{ref.digest}", hint=f"`{tag.name}` is at {tag.manifest}; leave the digest out, or pull again"
        )

    def _not_found(self, ref: ModelRef, *, may_pull: bool) -> ModelNotFound:
        stored = [tag.name for tag in self._store.list_tags()]
        shown = ref.name.removesuffix(":latest") if isinstance(ref, NameRef) else ref.name
        shown = f"file:{ref.path}" if isinstance(ref, FileRef) else shown
        can_pull = not isinstance(ref, NameRef) or self._aliases.resolve(ref) is not None
        hint = f"get it with `lm pull {shown}`" if may_pull and can_pull else ""
        suggestions = [name for name in self._aliases.suggest(shown, extra=stored) if name not in (shown, ref.name)]
        return ModelNotFound(shown, suggestions=suggestions, hint=hint)

    def _blobs(self, name: str, manifest: Digest) -> set[Digest]:
        try:
            return {manifest, *self._store.get_manifest(manifest).blob_digests()}
        except (BlobMissing, BlobCorrupt) as error:
            # A damaged model can still be removed; its bytes are then garbage for the collector. That earlier versions
            # are gone is as it should be.
            tag = self._store.get_tag(name)
            tell = log.warning if tag is not None and tag.manifest == manifest else log.debug
            tell("manifest_unreadable", name=name, digest=str(manifest), error=error.message)
            return set()

    def _size_if_there(self, digest: Digest) -> int:
        try:
            return self._store.blob_size(digest)
        except BlobMissing:
            return 0
