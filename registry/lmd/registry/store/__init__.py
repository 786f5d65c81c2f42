"""The content-addressed store: blobs, manifests, tags, ingests, leases and their garbage collection."""

from __future__ import annotations

from lmd.registry.store.gc import Collection
from lmd.registry.store.ingest import Ingest
from lmd.registry.store.leases import Lease
from lmd.registry.store.records import GarbageItem, GarbageKind, StoreUsage, TagChange, TagRecord, TagVersion
from lmd.registry.store.reservations import Reservation
from lmd.registry.store.store import Store

__all__ = [
    "Collection",
    "GarbageItem",
    "GarbageKind",
    "Ingest",
    "Lease",
    "Reservation",
    "Store",
    "StoreUsage",
    "TagChange",
    "TagRecord",
    "TagVersion",
]
