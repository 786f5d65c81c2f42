"""A process that works on a store, to be killed, starved and cut off: ``python -m tests.support.store_scenario``.

It says what the store has acknowledged, one line each on standard output, through writev(2): fault injection aims at
the other calls, so what is said here always arrives. It ends with status 3 when the store raised one of its own errors.
"""

from __future__ import annotations

import os
import stat
import sys
import time
from collections.abc import Callable
from pathlib import Path

from lmd.registry.errors import LmdError
from lmd.registry.store import Store
from tests.support.stored_models import ModelBytes, assert_store_is_right, make_model, put_model

PULLED = make_model(bytes(range(256)) * 800, b"second shard", lm=b'{"system": "pulled"}')
KEPT = make_model(b"second shard", b"only kept", lm=b'{"system": "kept"}')
REMOVED = make_model(b"second shard", b"only removed", lm=b'{"system": "removed"}')
BOOT = "the boot of the scenario"
FAILED = 3


def say(*words: object) -> None:
    os.writev(1, [(" ".join(map(str, words)) + "\n").encode()])


def prepare(root: Path) -> None:
    """Make the store that every scenario starts from, and files to import beside it."""
    for number, mode in enumerate((0o600, 0o400)):
        source = root.parent / f"source-{number}"
        source.write_bytes(PULLED.blobs[number])
        source.chmod(mode)
    with Store.open(root, boot_id=BOOT) as store:
        store.set_tag("kept", put_model(store, KEPT))
        store.set_tag("removed", put_model(store, REMOVED))


def pull(root: Path) -> None:
    """Pull a model in pieces: some received before, some now."""
    with Store.open(root, boot_id=BOOT) as store, store.lease("pull") as lease:
        lease.add(*PULLED.blob_digests)
        data, digest = PULLED.blobs[0], PULLED.blob_digests[0]
        if not store.has_blob(digest, len(data)):
            with store.begin_ingest(str(digest), total_bytes=len(data)) as ingest:
                assert all(os.pread(ingest.fd, end - at, at) == data[at:end] for at, end in ingest.received())
                half = len(data) // 2
                for start, end in ((half, len(data)), (0, half)):
                    ingest.write(start, data[start:end])
                    ingest.note(start, end - start)
                    ingest.checkpoint()
                ingest.commit(digest, len(data))
        for blob in PULLED.blobs[1:]:
            store.put_bytes(blob)
        manifest = store.put_manifest(PULLED.manifest)
        store.set_tag("pulled", manifest)
        say("tagged", "pulled")


def copy_and_remove(root: Path) -> None:
    """Copy a tag, remove one, take out the garbage."""
    with Store.open(root, boot_id=BOOT) as store:
        store.set_tag("copy", KEPT.digest)
        say("tagged", "copy")
        if store.delete_tag("removed") is not None:
            say("deleted", "removed")
        store.sweep_condemned()
        store.put_bytes(b"an orphan")
        list(store.collect(grace_s=0))


def take_in(root: Path) -> None:
    """Import a file that is copied and one that is linked."""
    with Store.open(root, boot_id=BOOT) as store:
        for number in range(2):
            store.import_file(root.parent / f"source-{number}")
        for blob in PULLED.blobs[2:]:
            store.put_bytes(blob)
        store.set_tag("pulled", store.put_manifest(PULLED.manifest))
        say("tagged", "pulled")


def rebuild(root: Path) -> None:
    """Open a store whose index is garbage."""
    index = root / "index.db"
    if not (root / "index.db.damaged").exists() and index.stat().st_size > 100:
        os.truncate(index, 100)
    with Store.open(root, boot_id=BOOT) as store:
        assert {tag.name for tag in store.list_tags()} == {"kept", "removed"}


def put_without_sync(root: Path) -> None:
    """The negative control: store bytes as if files needed no sync."""
    real_fsync = os.fsync

    def fsync(fd: int) -> None:
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            real_fsync(fd)

    os.fsync = fsync  # type: ignore[assignment]  # the store passes numbers only
    pull(root)


SCENARIOS: dict[str, Callable[[Path], None]] = {
    "pull": pull,
    "copy_and_remove": copy_and_remove,
    "take_in": take_in,
    "rebuild": rebuild,
    "put_without_sync": put_without_sync,
}
MODELS: dict[str, ModelBytes] = {"pulled": PULLED, "kept": KEPT, "copy": KEPT, "removed": REMOVED}


def check(root: Path, said: list[str], boot_id: str, *, days_later: int = 0) -> None:
    """Check every promise of the store after whatever happened to the scenario that *said* this.

    Days later, when the leases of dead processes have expired, nothing may be left over.
    """
    with Store.open(root, boot_id=boot_id, clock=lambda: time.time() + days_later * 86400) as store:
        tags = {tag.name: tag.manifest for tag in store.list_tags()}
        assert "kept" in tags
        for name, manifest in tags.items():
            assert manifest == MODELS[name].digest
        for line in said:
            action, name = line.split()
            if action in ("tagged", "deleted"):
                assert (name in tags) == (action == "tagged"), line
        assert_store_is_right(root, store)
        list(store.collect(grace_s=0))
        assert {tag.name: tag.manifest for tag in store.list_tags()} == tags
        assert_store_is_right(root, store)
        for name in tags:
            for digest in (MODELS[name].digest, *MODELS[name].blob_digests):
                assert store.has_blob(digest, None), "collected although needed"
        assert store.usage().quarantined == 0
        if days_later:
            needed = {each for name in tags for each in (MODELS[name].digest, *MODELS[name].blob_digests)}
            usage = store.usage()
            assert (usage.blobs, usage.ingests) == (len(needed), 0), "something is left over"


def main() -> None:
    root, name = Path(sys.argv[1]), sys.argv[2]
    try:
        SCENARIOS[name](root)
    except LmdError as error:
        say("failed", type(error).__name__)
        sys.exit(FAILED)


if __name__ == "__main__":
    main()
