"""What the index knows, table by table; every method is one transaction, or part of the caller's."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import groupby

from lmd.registry.digest import Digest
from lmd.registry.store.descriptors import ManifestFacts
from lmd.registry.store.index import Index
from lmd.registry.store.records import TagChange, TagRecord, TagVersion


class Tags:
    """Names, compared without regard to case, and their history."""

    def __init__(self, index: Index) -> None:
        self._index = index
        #: Grows inside of every transaction that writes tags. This process is the only one that writes, and readers
        #: wait for the transaction, so whoever reads this first and the tags next has tags at least that new.
        self.generation = 0

    def put(self, name: str, manifest: Digest, note: str, now: float) -> TagRecord:
        """Point *name* to *manifest*."""
        with self._index.write("set_tag"):
            old = self.get(name)
            moved = old is None or old.manifest != manifest
            record = TagRecord(name, manifest, now if old is None or moved else old.modified_at, now)
            self.restore(record)
            if moved:
                if old is not None and not self.versions(name):
                    # A rebuilt index knows what the name pointed to, but not since when or why.
                    self._note(name, old.manifest, old.modified_at, "")
                self._note(name, manifest, now, note)
            return record

    def _note(self, name: str, manifest: Digest | None, now: float, note: str) -> None:
        with self._index.write("set_tag") as db:
            db.execute(
                "INSERT INTO tag_history (key, name, manifest, changed_at, note) VALUES (?, ?, ?, ?, ?)",
                (name.lower(), name, manifest.hex if manifest is not None else None, now, note),
            )

    def restore(self, record: TagRecord) -> None:
        """Write *record* as it is, without an entry in the history."""
        with self._index.write("set_tag") as db:
            self.generation += 1
            db.execute(
                "INSERT OR REPLACE INTO tags (key, name, manifest, modified_at, pulled_at) VALUES (?, ?, ?, ?, ?)",
                (record.name.lower(), record.name, record.manifest.hex, record.modified_at, record.pulled_at),
            )

    def get(self, name: str) -> TagRecord | None:
        """Find a tag."""
        with self._index.read("get_tag") as db:
            row = db.execute(
                "SELECT name, manifest, modified_at, pulled_at FROM tags WHERE key = ?", (name.lower(),)
            ).fetchone()
        return TagRecord(row[0], Digest(row[1]), row[2], row[3]) if row else None

    def find(self, prefix: str = "") -> list[TagRecord]:
        """List the tags whose name starts with *prefix*, the last modified first."""
        with self._index.read("list_tags") as db:
            rows = db.execute(
                "SELECT name, manifest, modified_at, pulled_at FROM tags WHERE substr(key, 1, ?) = ?"
                " ORDER BY modified_at DESC, key",
                (len(prefix), prefix.lower()),
            ).fetchall()
        return [TagRecord(name, Digest(manifest), modified, pulled) for name, manifest, modified, pulled in rows]

    def delete(self, name: str, now: float) -> TagRecord | None:
        """Remove a tag; return what it was."""
        with self._index.write("delete_tag") as db:
            record = self.get(name)
            if record is not None:
                self.generation += 1
                db.execute("DELETE FROM tags WHERE key = ?", (name.lower(),))
                self._note(record.name, None, now, "")
            return record

    def history(self, name: str) -> list[TagChange]:
        """List what happened to a tag, oldest first."""
        with self._index.read("tag_history") as db:
            rows = db.execute(
                "SELECT name, manifest, changed_at, note FROM tag_history WHERE key = ? ORDER BY id", (name.lower(),)
            ).fetchall()
        return [TagChange(row[0], Digest(row[1]) if row[1] else None, row[2], row[3]) for row in rows]

    def versions(self, name: str) -> list[TagVersion]:
        """List what a tag has pointed to since it was last made, oldest first; nothing for a deleted one."""
        return number_versions(self.history(name))

    def superseded(self) -> Iterator[tuple[str, TagVersion]]:
        """Find the versions of all tags that are no longer the current one, each with the tag's name."""
        with self._index.read("collect") as db:
            rows = db.execute(
                "SELECT key, name, manifest, changed_at, note FROM tag_history ORDER BY key, id"
            ).fetchall()
        for _, group in groupby(rows, key=lambda row: str(row[0])):
            changes = [TagChange(row[1], Digest(row[2]) if row[2] else None, row[3], row[4]) for row in group]
            yield from ((changes[-1].name, version) for version in number_versions(changes)[:-1])


def number_versions(changes: Iterable[TagChange]) -> list[TagVersion]:
    """Number the versions of one tag's history, oldest first; deleting the tag ends them, and numbers start anew."""
    versions: list[TagVersion] = []
    for change in changes:
        if versions:
            versions[-1] = replace(versions[-1], superseded_at=change.changed_at)
        if change.manifest is None:
            versions = []
        else:
            versions.append(TagVersion(len(versions) + 1, change.manifest, change.changed_at, change.note, None))
    return versions


class Manifests:
    """The blobs that are manifests, and what they refer to."""

    def __init__(self, index: Index) -> None:
        self._index = index

    def add(self, digest: Digest, facts: ManifestFacts, now: float) -> None:
        """Note a manifest; its grace period starts."""
        with self._index.write("put_manifest") as db:
            db.execute(
                "INSERT INTO manifests VALUES (?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET added_at = excluded.added_at",
                (digest.hex, facts.size_bytes, facts.media_type, facts.artifact_type, now),
            )
            db.executemany(
                "INSERT OR REPLACE INTO manifest_refs VALUES (?, ?, ?)",
                [(digest.hex, blob.hex, size_bytes) for blob, size_bytes in facts.blobs.items()],
            )

    def get(self, digest: Digest) -> ManifestFacts | None:
        """Find a manifest."""
        with self._index.read("get_manifest") as db:
            row = db.execute(
                "SELECT size_bytes, media_type, artifact_type FROM manifests WHERE digest = ?", (digest.hex,)
            ).fetchone()
            if row is None:
                return None
            refs = db.execute("SELECT blob, size_bytes FROM manifest_refs WHERE manifest = ?", (digest.hex,)).fetchall()
        return ManifestFacts(row[0], row[1], row[2], {Digest(blob): size for blob, size in refs})

    def described(self) -> dict[Digest, ManifestFacts]:
        """Describe every manifest, leaving out its blobs."""
        with self._index.read("list_manifests") as db:
            rows = db.execute("SELECT digest, size_bytes, media_type, artifact_type FROM manifests").fetchall()
        return {Digest(row[0]): ManifestFacts(row[1], row[2], row[3], {}) for row in rows}

    def added(self) -> dict[Digest, float]:
        """Tell of every manifest when it was put."""
        with self._index.read("collect") as db:
            return {Digest(row[0]): row[1] for row in db.execute("SELECT digest, added_at FROM manifests")}

    def references(self) -> dict[Digest, list[Digest]]:
        """Give every manifest's blobs."""
        found: dict[Digest, list[Digest]] = {}
        with self._index.read("collect") as db:
            for manifest, blob in db.execute("SELECT manifest, blob FROM manifest_refs"):
                found.setdefault(Digest(manifest), []).append(Digest(blob))
        return found

    def forget(self, digests: Iterable[Digest]) -> None:
        """Drop manifests that are gone."""
        rows = [(digest.hex,) for digest in digests]
        with self._index.write("collect") as db:
            db.executemany("DELETE FROM manifest_refs WHERE manifest = ?", rows)
            db.executemany("DELETE FROM manifests WHERE digest = ?", rows)


@dataclass(frozen=True, slots=True)
class Mark:
    """What a blob's file looked like right after its bytes hashed to its name."""

    size_bytes: int
    mtime_ns: int
    inode: int

    @classmethod
    def of(cls, status: os.stat_result) -> Mark:
        """Take the mark of a file."""
        return cls(status.st_size, status.st_mtime_ns, _signed(status.st_ino))


class Verified:
    """The verified marks, and which blobs are condemned."""

    def __init__(self, index: Index) -> None:
        self._index = index

    def get(self, digest: Digest) -> Mark | None:
        """Find the mark of a blob."""
        with self._index.read("has_blob") as db:
            row = db.execute(
                "SELECT size_bytes, mtime_ns, inode FROM verified WHERE digest = ?", (digest.hex,)
            ).fetchone()
        return Mark(*row) if row else None

    def renew(self, digest: Digest, mark: Mark, now: float) -> None:
        """Note that a blob that lay there hashes to its name."""
        with self._index.write("has_blob") as db:
            db.execute(
                "INSERT INTO verified VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET size_bytes ="
                " excluded.size_bytes, mtime_ns = excluded.mtime_ns, inode = excluded.inode,"
                " verified_at = excluded.verified_at",
                (digest.hex, mark.size_bytes, mark.mtime_ns, mark.inode, mark.mtime_ns / 1e9, now),
            )

    def add(self, digest: Digest, mark: Mark, now: float) -> None:
        """Note a blob that was just put: its grace period starts, and an earlier removal no longer concerns it."""
        with self._index.write("put_blob") as db:
            db.execute(
                "INSERT OR REPLACE INTO verified VALUES (?, ?, ?, ?, ?, ?)",
                (digest.hex, mark.size_bytes, mark.mtime_ns, mark.inode, now, now),
            )
            self.pardon([digest])

    def added(self) -> dict[Digest, float]:
        """Tell of every marked blob when it was put."""
        with self._index.read("collect") as db:
            return {Digest(row[0]): row[1] for row in db.execute("SELECT digest, added_at FROM verified")}

    def forget(self, digests: Iterable[Digest]) -> None:
        """Drop the marks of blobs that are gone."""
        with self._index.write("collect") as db:
            db.executemany("DELETE FROM verified WHERE digest = ?", [(digest.hex,) for digest in digests])

    def condemn(self, digests: Iterable[Digest]) -> None:
        """Note blobs that go without a grace period once nothing needs them."""
        with self._index.write("delete_tag") as db:
            db.executemany("INSERT OR IGNORE INTO condemned VALUES (?)", [(digest.hex,) for digest in digests])

    def pardon(self, digests: Iterable[Digest]) -> None:
        """Undo `condemn`."""
        with self._index.write("put_blob") as db:
            db.executemany("DELETE FROM condemned WHERE digest = ?", [(digest.hex,) for digest in digests])

    def condemned(self) -> set[Digest]:
        """List what is condemned."""
        with self._index.read("sweep") as db:
            return {Digest(row[0]) for row in db.execute("SELECT digest FROM condemned")}


class LeaseTable:
    """Leases as they are persisted."""

    def __init__(self, index: Index) -> None:
        self._index = index

    def together(self) -> AbstractContextManager[object]:
        """Make one transaction of what is done inside the block."""
        return self._index.write("lease")

    def add(self, lease: str, owner: str, expires_at: float) -> None:
        """Note a lease."""
        with self._index.write("lease") as db:
            db.execute("INSERT INTO leases VALUES (?, ?, ?)", (lease, owner, expires_at))

    def extend(self, expiries: Mapping[str, float]) -> None:
        """Move the expiry of leases."""
        with self._index.write("lease") as db:
            db.executemany("UPDATE leases SET expires_at = ? WHERE id = ?", [(at, id_) for id_, at in expiries.items()])

    def hold(self, lease: str, digests: Iterable[Digest]) -> None:
        """Note what a lease protects."""
        with self._index.write("lease") as db:
            db.executemany(
                "INSERT OR IGNORE INTO lease_digests VALUES (?, ?)", [(lease, digest.hex) for digest in digests]
            )

    def drop(self, lease: str) -> None:
        """Remove a lease."""
        with self._index.write("lease") as db:
            db.execute("DELETE FROM leases WHERE id = ?", (lease,))

    def drop_of_owner(self, owner: str, alive: Collection[str]) -> None:
        """Remove the leases of *owner*, except those in *alive*."""
        with self._index.write("lease") as db:
            left = [row[0] for row in db.execute("SELECT id FROM leases WHERE owner = ?", (owner,))]
            db.executemany("DELETE FROM leases WHERE id = ?", [(lease,) for lease in left if lease not in alive])

    def drop_expired(self, now: float, alive: Collection[str] = ()) -> None:
        """Remove the leases that expired before *now*, except those in *alive*."""
        with self._index.write("lease") as db:
            expired = [row[0] for row in db.execute("SELECT id FROM leases WHERE expires_at <= ?", (now,))]
            db.executemany("DELETE FROM leases WHERE id = ?", [(lease,) for lease in expired if lease not in alive])

    def protected(self, now: float, *, alive: Collection[str], ended: Collection[str]) -> set[Digest]:
        """List what unexpired leases, and those in *alive*, protect; those in *ended* protect nothing."""
        with self._index.read("collect") as db:
            rows = db.execute(
                "SELECT lease, digest, expires_at FROM lease_digests JOIN leases ON leases.id = lease_digests.lease"
            ).fetchall()
        return {
            Digest(digest)
            for lease, digest, expires_at in rows
            if lease in alive or (expires_at > now and lease not in ended)
        }


class Facts:
    """Small measured facts, and which file outside has which digest."""

    def __init__(self, index: Index) -> None:
        self._index = index

    def recall(self, kind: str, key: str) -> str | None:
        """Find a fact."""
        with self._index.read("recall") as db:
            row = db.execute("SELECT value FROM facts WHERE kind = ? AND key = ?", (kind, key)).fetchone()
        return row[0] if row else None

    def remember(self, kind: str, key: str, value: str) -> None:
        """Note a fact."""
        with self._index.write("remember") as db:
            db.execute("INSERT OR REPLACE INTO facts VALUES (?, ?, ?)", (kind, key, value))

    def imported(self, status: os.stat_result) -> Digest | None:
        """Find the digest of a file that has not changed since it was imported."""
        with self._index.read("import") as db:
            row = db.execute(
                "SELECT digest FROM imports WHERE device = ? AND inode = ? AND size_bytes = ? AND mtime_ns = ?"
                " AND ctime_ns = ?",
                (
                    _signed(status.st_dev),
                    _signed(status.st_ino),
                    status.st_size,
                    status.st_mtime_ns,
                    status.st_ctime_ns,
                ),
            ).fetchone()
        return Digest(row[0]) if row else None

    def note_import(self, status: os.stat_result, digest: Digest) -> None:
        """Note the digest of a file outside."""
        with self._index.write("import") as db:
            db.execute(
                "INSERT OR REPLACE INTO imports VALUES (?, ?, ?, ?, ?, ?)",
                (
                    _signed(status.st_dev),
                    _signed(status.st_ino),
                    status.st_size,
                    status.st_mtime_ns,
                    status.st_ctime_ns,
                    digest.hex,
                ),
            )


def _signed(number: int) -> int:
    """Fit a 64-bit number of the kernel into SQLite's signed integer."""
    return number - (1 << 64) if number >= 1 << 63 else number
