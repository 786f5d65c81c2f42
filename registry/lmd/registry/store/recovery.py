"""Opening the index, and making a new one when it is gone or damaged: no human is needed after a crash.

The new index comes from the derived view (``index.json``) and the manifests among the blobs. What only the old one knew
is lost: the history of tags, leases, memory sizes; verified marks come back as blobs are hashed on first use.
"""

from __future__ import annotations

import logging
from contextlib import suppress
from pathlib import Path

from lmd.registry.digest import Digest
from lmd.registry.errors import InvalidRequest
from lmd.registry.store import oci_view
from lmd.registry.store.descriptors import MANIFEST_MAX_BYTES, ManifestFacts, read_manifest_facts
from lmd.registry.store.durable import disk_errors, fsync_dir
from lmd.registry.store.index import Index, IndexDamaged
from lmd.registry.store.layout import Layout
from lmd.registry.store.tables import Facts, LeaseTable, Manifests, Tags

log = logging.getLogger(__name__)

# How long manifests are kept when nothing tells their names any more: time enough for somebody to look.
NAMELESS_TTL_S = 7 * 86400.0
# The fact that says that an index is complete.
BUILT = ("index", "built")


def open_index(layout: Layout, now: float) -> Index:
    """Open the index, or make it. Raises: StoreError, DiskFull."""
    try:
        index = Index(layout.index_db, now)
    except IndexDamaged as error:
        aside = _move_aside(layout)
        log.warning("the index was damaged (%s) and is kept as %s; rebuilding it", error, aside.name)
        index = Index(layout.index_db, now)
    try:
        if Facts(index).recall(*BUILT) is None:
            _rebuild(layout, index, now)
    except BaseException:
        index.close()
        raise
    return index


def _move_aside(layout: Layout) -> Path:
    aside = layout.root / "index.db.damaged"
    with disk_errors("rebuild", layout.root):
        # The log first: it must never be taken for that of the new database.
        for suffix in ("-wal", "-shm", "-journal", ""):
            with suppress(FileNotFoundError):
                aside.with_name(f"{aside.name}{suffix}").unlink()
            with suppress(FileNotFoundError):
                layout.index_db.with_name(f"index.db{suffix}").rename(aside.with_name(f"{aside.name}{suffix}"))
        fsync_dir(layout.root)
    return aside


def _rebuild(layout: Layout, index: Index, now: float) -> None:
    """Fill an empty index with what the store has; one transaction, so that after a crash the next start repeats it."""
    manifests = {digest: facts for digest, facts in _find_manifests(layout).items() if _complete(layout, facts)}
    view = oci_view.read(layout)
    tags = None if view is None else oci_view.parse(view)
    restored = 0
    with index.write("rebuild"):
        for digest, facts in manifests.items():
            Manifests(index).add(digest, facts, now)
        for tag in tags or ():
            if tag.manifest in manifests:
                Tags(index).restore(tag)
                restored += 1
            else:
                log.warning("%s is lost: its manifest %s or a blob of it is missing", tag.name, tag.manifest)
        if tags is None and manifests:
            # Without names everything would be garbage an hour from now.
            leases = LeaseTable(index)
            leases.add("nameless", "recovery", now + NAMELESS_TTL_S)
            leases.hold("nameless", manifests)
        Facts(index).remember(*BUILT, "1")
    if manifests or tags:
        log.warning("rebuilt the index: %d manifests, %d names", len(manifests), restored)


def _find_manifests(layout: Layout) -> dict[Digest, ManifestFacts]:
    """Find the manifests among the small blobs; they are hashed, as nothing vouches for them."""
    found = {}
    for digest, status in layout.list_blobs():
        if status.st_size > MANIFEST_MAX_BYTES:
            continue
        with suppress(OSError), layout.blob(digest).open("rb") as file:
            data = file.read(MANIFEST_MAX_BYTES + 1)
            # Most small blobs are configurations and licences.
            if b'"layers"' in data and Digest.of(data) == digest:
                with suppress(InvalidRequest):
                    found[digest] = read_manifest_facts(data)
    return found


def _complete(layout: Layout, facts: ManifestFacts) -> bool:
    """Tell whether every blob is there in its size; their bytes are hashed before anybody gets them."""
    for blob, size_bytes in facts.blobs.items():
        try:
            if layout.blob(blob).lstat().st_size != size_bytes:
                return False
        except OSError:
            return False
    return True
