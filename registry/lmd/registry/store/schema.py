"""The index's schema, as the ordered list of steps that led to it.

Rules: a released step never changes, a new one goes to the end, and each has a test. The steps that a database has seen
are recorded in its table ``migrations``.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass

from lmd.registry.errors import StoreError


@dataclass(frozen=True, slots=True)
class Migration:
    """One step: its name and its statements."""

    name: str
    statements: tuple[str, ...]


MIGRATIONS: tuple[Migration, ...] = (
    Migration(
        "m001_names_and_blobs",
        (
            # A manifest and what it refers to; the key of a tag is its lower-cased name.
            """CREATE TABLE manifests (
                 digest TEXT PRIMARY KEY, size_bytes INTEGER NOT NULL, media_type TEXT NOT NULL,
                 artifact_type TEXT NOT NULL, added_at REAL NOT NULL) WITHOUT ROWID""",
            """CREATE TABLE manifest_refs (
                 manifest TEXT NOT NULL, blob TEXT NOT NULL, size_bytes INTEGER NOT NULL,
                 PRIMARY KEY (manifest, blob)) WITHOUT ROWID""",
            """CREATE TABLE tags (
                 key TEXT PRIMARY KEY, name TEXT NOT NULL, manifest TEXT NOT NULL,
                 modified_at REAL NOT NULL, pulled_at REAL NOT NULL) WITHOUT ROWID""",
            """CREATE TABLE tag_history (
                 id INTEGER PRIMARY KEY, key TEXT NOT NULL, name TEXT NOT NULL, manifest TEXT,
                 changed_at REAL NOT NULL, note TEXT NOT NULL)""",
            "CREATE INDEX tag_history_by_key ON tag_history (key, id)",
            # What a blob's file looked like right after it was hashed.
            """CREATE TABLE verified (
                 digest TEXT PRIMARY KEY, size_bytes INTEGER NOT NULL, mtime_ns INTEGER NOT NULL,
                 inode INTEGER NOT NULL, added_at REAL NOT NULL, verified_at REAL NOT NULL) WITHOUT ROWID""",
            # What deleted tags needed: goes without a grace period once nothing else needs it.
            "CREATE TABLE condemned (digest TEXT PRIMARY KEY) WITHOUT ROWID",
        ),
    ),
    Migration(
        "m002_leases",
        (
            "CREATE TABLE leases (id TEXT PRIMARY KEY, owner TEXT NOT NULL, expires_at REAL NOT NULL) WITHOUT ROWID",
            """CREATE TABLE lease_digests (
                 lease TEXT NOT NULL REFERENCES leases (id) ON DELETE CASCADE, digest TEXT NOT NULL,
                 PRIMARY KEY (lease, digest)) WITHOUT ROWID""",
        ),
    ),
    Migration(
        "m003_facts",
        (
            # Small measured facts, and the digests of files outside that were imported once.
            """CREATE TABLE facts (
                 kind TEXT NOT NULL, key TEXT NOT NULL, value TEXT NOT NULL, PRIMARY KEY (kind, key)) WITHOUT ROWID""",
            """CREATE TABLE imports (
                 device INTEGER NOT NULL, inode INTEGER NOT NULL, size_bytes INTEGER NOT NULL,
                 mtime_ns INTEGER NOT NULL, ctime_ns INTEGER NOT NULL, digest TEXT NOT NULL,
                 PRIMARY KEY (device, inode)) WITHOUT ROWID""",
        ),
    ),
)


def applied(db: sqlite3.Connection) -> list[str]:
    """List the steps that *db* has seen, in order; none for a new database."""
    known = db.execute("SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = 'migrations'").fetchone()
    if known is None:
        return []
    return [row[0] for row in db.execute("SELECT name FROM migrations ORDER BY position")]


def migrate(db: sqlite3.Connection, now: float, migrations: Sequence[Migration] = MIGRATIONS) -> list[str]:
    """Apply the steps that *db* lacks, all or none of them; return their names.

    Raises: StoreError when *db* has seen a step that this release does not know.
    """
    seen = applied(db)
    expected = [migration.name for migration in migrations]
    if seen != expected[: len(seen)]:
        raise StoreError(
            f"the store's index is at step `{seen[-1]}`, which this release does not know",
            operation="migrate",
            hint="use the release that wrote it, or a newer one",
        )
    missing = list(enumerate(migrations))[len(seen) :]
    if not missing:
        return []
    db.execute("BEGIN IMMEDIATE")
    try:
        db.execute(
            "CREATE TABLE IF NOT EXISTS migrations (position INTEGER PRIMARY KEY, name TEXT NOT NULL, applied_at REAL)"
        )
        for position, migration in missing:
            for statement in migration.statements:
                db.execute(statement)
            db.execute("INSERT INTO migrations VALUES (?, ?, ?)", (position, migration.name, now))
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise
    return expected[len(seen) :]
