"""The versions of a name: what it has pointed to since it was made, and the way back."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import structlog

from lmd.daemon.blocking import BlockingPool
from lmd.daemon.names import Names
from lmd.registry.differences import summarize
from lmd.registry.errors import BlobCorrupt, BlobMissing, VersionNotFound
from lmd.registry.manifest import Manifest
from lmd.registry.store import Store, TagRecord, TagVersion

log = structlog.get_logger(__name__)

#: The versions of one list: what a person may look through, and what fits into a message.
MAX_LISTED = 1000
_ROLLBACK = "rollback to version "


class VersionState(Enum):
    """Whether a version can be had."""

    CURRENT = "current"
    KEPT = "kept"
    GONE = "gone"


@dataclass(frozen=True, slots=True)
class ListedVersion:
    """A version and what can be told about it.

    *change* is what differs from the version before, in one line. *spared_until* is when garbage collection may take
    what only this version needs, in seconds since the epoch; None for the current version.
    """

    version: TagVersion
    state: VersionState
    change: str
    spared_until: float | None


@dataclass(frozen=True, slots=True)
class Rollback:
    """A name at an earlier version again, and the number of that version."""

    tag: TagRecord
    version: int


class Versions:
    """Lists the versions of names and goes back to them. For use on one event loop."""

    def __init__(self, store: Store, names: Names, pool: BlockingPool) -> None:
        self._store = store
        self._names = names
        self._pool = pool

    async def of(self, text: str) -> tuple[str, list[ListedVersion]]:
        """Return the canonical name and its newest versions, newest first. Raises: InvalidRef, ModelNotFound."""
        return await self._pool.run(self._list, text)

    async def rollback(self, text: str, number: int = 0) -> Rollback:
        """Point a name at an earlier version again; 0 is the one before.

        After a rollback, the one before is that before the version gone back to: rolling back twice goes two versions
        back and not to and fro.

        Raises: InvalidRef, ModelNotFound, VersionNotFound, TagChanged when the name is changed at the same time.
        """
        return await self._pool.run(self._rollback, text, number)

    def tag_at(self, text: str, number: int) -> TagRecord:
        """Return a version of a name as if it were current; 0 is the current one. Blocks.

        Raises: InvalidRef, ModelNotFound, VersionNotFound.
        """
        tag = self._names.find(text)
        if number == 0:
            return tag
        versions = self._store.tag_versions(tag.name)
        version = self._pick(tag.name, versions, number)
        return TagRecord(tag.name, version.manifest, version.changed_at, version.changed_at)

    def _list(self, text: str) -> tuple[str, list[ListedVersion]]:
        tag = self._names.find(text)
        # One more than is listed: the oldest of those tells what it changed, too.
        versions = self._store.tag_versions(tag.name)[-MAX_LISTED - 1 :]
        manifests = [self._manifest(version) for version in versions]
        listed = []
        for place, (version, manifest) in enumerate(zip(versions, manifests, strict=True)):
            before = manifests[place - 1] if place else None
            change = summarize(before, manifest) if before is not None and manifest is not None else ""
            state = VersionState.KEPT if manifest is not None else VersionState.GONE
            spared_until = None
            if version.superseded_at is None:
                state = VersionState.CURRENT
            elif manifest is not None:
                spared_until = version.superseded_at + self._store.history_s
            listed.append(ListedVersion(version, state, change, spared_until))
        return tag.name, listed[-MAX_LISTED:][::-1]

    def _manifest(self, version: TagVersion) -> Manifest | None:
        """Read the manifest of a version; None when it or something that it names is gone."""
        try:
            manifest = self._store.get_manifest(version.manifest)
            for digest in manifest.blob_digests():
                self._store.blob_size(digest)
        except (BlobMissing, BlobCorrupt):
            return None
        return manifest

    def _pick(self, name: str, versions: list[TagVersion], number: int) -> TagVersion:
        if not 1 <= number <= len(versions):
            raise VersionNotFound(
                f"`{name}` has no version {number}", name=name, version=number, hint=f"see `lm history {name}`"
            )
        version = versions[number - 1]
        if self._manifest(version) is None:
            raise VersionNotFound(
                f"version {number} of `{name}` is no longer kept",
                name=name,
                version=number,
                hint="`store.history` in the configuration says how long versions are kept",
            )
        return version

    def _rollback(self, text: str, number: int) -> Rollback:
        tag = self._names.find(text)
        versions = self._store.tag_versions(tag.name)
        target = self._pick(tag.name, versions, number or _one_before(tag.name, versions))
        if target.manifest != tag.manifest:
            note = f"{_ROLLBACK}{target.number}"
            tag = self._store.set_tag(tag.name, target.manifest, note=note, expected=tag.manifest)
            log.info("model_rolled_back", name=tag.name, version=target.number, digest=str(tag.manifest))
        return Rollback(tag, target.number)


def _one_before(name: str, versions: list[TagVersion]) -> int:
    """Find the number of the version that a rollback without one goes back to. Raises: VersionNotFound."""
    current = versions[-1]
    place = current
    while place.note.startswith(_ROLLBACK):
        # The number is that of an earlier version, so this ends.
        place = versions[int(place.note.removeprefix(_ROLLBACK)) - 1]
    earlier = [version for version in versions[: place.number - 1] if version.manifest != current.manifest]
    if not earlier:
        raise VersionNotFound(
            f"`{name}` has no version before this one", name=name, version=0, hint=f"see `lm history {name}`"
        )
    return earlier[-1].number


def how_and_detail(note: str) -> tuple[str, str]:
    """Split a note of the store into the word that says how a version came about, and the rest."""
    how, _, detail = note.partition(" ")
    return how, detail
