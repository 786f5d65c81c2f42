"""The index: its migrations, its transactions, and what it does with errors."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from lmd.registry.errors import StoreError
from lmd.registry.store.index import Index, IndexDamaged
from lmd.registry.store.schema import MIGRATIONS, Migration, applied, migrate


@pytest.fixture
def db() -> Iterator[sqlite3.Connection]:
    connection = sqlite3.connect(":memory:", isolation_level=None)
    connection.execute("PRAGMA foreign_keys = ON")
    yield connection
    connection.close()


@pytest.fixture
def index(tmp_path: Path) -> Iterator[Index]:
    opened = Index(tmp_path / "index.db", now=1.0)
    yield opened
    opened.close()


def tables(db: sqlite3.Connection) -> set[str]:
    return {row[0] for row in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}


def columns(db: sqlite3.Connection, table: str) -> list[str]:
    return [row[1] for row in db.execute(f"PRAGMA table_info({table})")]


def test_every_migration_has_a_test_below() -> None:
    tested = {name.removeprefix("test_") for name in globals() if name.startswith("test_m0")}
    assert [migration.name for migration in MIGRATIONS] == sorted(tested)


def test_m001_names_and_blobs(db: sqlite3.Connection) -> None:
    assert migrate(db, 1.0, MIGRATIONS[:1]) == ["m001_names_and_blobs"]
    assert tables(db) == {
        "migrations",
        "manifests",
        "manifest_refs",
        "tags",
        "tag_history",
        "verified",
        "condemned",
    }
    assert columns(db, "tags") == ["key", "name", "manifest", "modified_at", "pulled_at"]
    db.execute("INSERT INTO tags VALUES ('a', 'A', 'x', 1, 1)")
    with pytest.raises(sqlite3.IntegrityError):
        db.execute("INSERT INTO tags VALUES ('a', 'a', 'y', 1, 1)")


def test_m002_leases(db: sqlite3.Connection) -> None:
    migrate(db, 1.0, MIGRATIONS[:1])
    assert migrate(db, 2.0, MIGRATIONS[:2]) == ["m002_leases"]
    db.execute("INSERT INTO leases VALUES ('l', 'pull', 9)")
    db.execute("INSERT INTO lease_digests VALUES ('l', 'x')")
    with pytest.raises(sqlite3.IntegrityError):
        db.execute("INSERT INTO lease_digests VALUES ('unknown', 'x')")
    db.execute("DELETE FROM leases")
    assert db.execute("SELECT count(*) FROM lease_digests").fetchone() == (0,)


def test_m003_facts(db: sqlite3.Connection) -> None:
    migrate(db, 1.0, MIGRATIONS[:2])
    assert migrate(db, 3.0, MIGRATIONS[:3]) == ["m003_facts"]
    db.execute("INSERT INTO facts VALUES ('memory', 'k', 'v')")
    db.execute("INSERT INTO imports VALUES (-1, 2, 3, 4, 5, 'x')")
    assert applied(db) == ["m001_names_and_blobs", "m002_leases", "m003_facts"]
    assert [row[0] for row in db.execute("SELECT applied_at FROM migrations ORDER BY position")] == [1.0, 1.0, 3.0]


def test_migrating_twice_changes_nothing(db: sqlite3.Connection) -> None:
    migrate(db, 1.0)
    before = list(db.iterdump())
    assert migrate(db, 2.0) == []
    assert list(db.iterdump()) == before


def test_a_failing_migration_leaves_the_database_as_it_was(db: sqlite3.Connection) -> None:
    migrate(db, 1.0)
    before = list(db.iterdump())
    broken = (
        *MIGRATIONS,
        Migration("m098_good", ("CREATE TABLE more (a)",)),
        Migration("m099_bad", ("CREATE NONSENSE",)),
    )
    with pytest.raises(sqlite3.OperationalError):
        migrate(db, 2.0, broken)
    assert list(db.iterdump()) == before
    assert migrate(db, 2.0, broken[:-1]) == ["m098_good"]


@pytest.mark.parametrize("recorded", [["m001_names_and_blobs", "m002_else"], ["m000"], ["m001_names_and_blobs"] * 2])
def test_an_unknown_past_is_refused(db: sqlite3.Connection, recorded: list[str]) -> None:
    db.execute("CREATE TABLE migrations (position INTEGER PRIMARY KEY, name TEXT NOT NULL, applied_at REAL)")
    db.executemany("INSERT INTO migrations VALUES (?, ?, 0)", list(enumerate(recorded)))
    with pytest.raises(StoreError, match="does not know"):
        migrate(db, 1.0)


def test_commits_are_synced(index: Index) -> None:
    """A commit in write-ahead mode survives a power cut only with synchronous=FULL (2)."""
    with index.read("test") as db:
        assert db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert db.execute("PRAGMA synchronous").fetchone() == (2,)


def test_a_transaction_is_all_or_nothing(index: Index) -> None:
    def fail_half_way() -> None:
        with index.write("outer") as db:
            db.execute("INSERT INTO facts VALUES ('a', 'b', '1')")
            with index.write("inner") as same:
                same.execute("INSERT INTO facts VALUES ('a', 'c', '1')")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_half_way()
    with index.read("test") as db:
        assert db.execute("SELECT count(*) FROM facts").fetchone() == (0,)
    with index.write("outer"), index.write("inner") as db:
        db.execute("INSERT INTO facts VALUES ('a', 'b', '1')")
    with index.read("test") as db:
        assert db.execute("SELECT count(*) FROM facts").fetchone() == (1,)


def test_a_misuse_of_sql_is_a_defect_and_not_a_damaged_index(index: Index) -> None:
    with pytest.raises(StoreError, match="no such table"), index.read("test") as db:
        db.execute("SELECT * FROM nowhere")
    with pytest.raises(sqlite3.ProgrammingError), index.read("test") as db:
        db.execute("SELECT ?")


def test_a_closed_index_says_so(index: Index) -> None:
    index.close()
    index.close()
    with pytest.raises(StoreError, match="closed"), index.read("test"):
        pass


@pytest.mark.parametrize("content", [b"no database at all" * 300, b"SQLite format 3\0" + b"\xff" * 5000])
def test_damage_is_told_from_other_errors(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "index.db"
    path.write_bytes(content)
    with pytest.raises(IndexDamaged):
        Index(path, now=1.0)
    with pytest.raises(StoreError):
        Index(tmp_path / "missing" / "index.db", now=1.0)


def test_threads_take_turns(index: Index) -> None:
    def work(name: int) -> None:
        for number in range(20):
            with index.write("test") as db:
                db.execute("INSERT INTO facts VALUES (?, ?, '')", (str(name), str(number)))

    threads = [threading.Thread(target=work, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with index.read("test") as db:
        assert db.execute("SELECT count(*) FROM facts").fetchone() == (80,)
