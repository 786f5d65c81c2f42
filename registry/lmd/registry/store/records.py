"""Values that the store hands out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lmd.registry.digest import Digest


@dataclass(frozen=True, slots=True)
class TagRecord:
    """A name and the manifest it points to.

    *modified_at* is when the tag last moved to another manifest, *pulled_at* when it was last set, be it to the same
    one; both in seconds since the epoch.
    """

    name: str
    manifest: Digest
    modified_at: float
    pulled_at: float


@dataclass(frozen=True, slots=True)
class TagChange:
    """One entry of a tag's history; *manifest* is None where the tag was deleted."""

    name: str
    manifest: Digest | None
    changed_at: float
    note: str


@dataclass(frozen=True, slots=True)
class TagVersion:
    """One manifest that a tag has pointed to since it was made; the first has the number 1.

    *note* says how it came about: a word such as "pull" or "edit", and perhaps more. *superseded_at* is when the next
    version took its place; None for the current one. Times are in seconds since the epoch.
    """

    number: int
    manifest: Digest
    changed_at: float
    note: str
    superseded_at: float | None


GarbageKind = Literal["blob", "ingest", "quarantined"]


@dataclass(frozen=True, slots=True)
class GarbageItem:
    """One thing that nothing needs: a digest where it has one, else the name of its file."""

    kind: GarbageKind
    digest_or_name: str
    size_bytes: int
    modified_at: float


@dataclass(frozen=True, slots=True)
class StoreUsage:
    """Sums over what is stored; *free_bytes* is what the file system still offers this process.

    *version_bytes* is the part of *blob_bytes* that garbage collection spares only for earlier versions of tags.
    """

    models: int
    blobs: int
    blob_bytes: int
    ingests: int
    ingest_bytes: int
    quarantined: int
    quarantined_bytes: int
    free_bytes: int
    version_bytes: int = 0
