"""Makes one file of the shards that a Modelfile names, so that the model is a single blob."""

from __future__ import annotations

import threading
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from lmd.registry.digest import Digest
from lmd.registry.errors import BlobCorrupt, BlobMissing
from lmd.registry.gguf_merge import merged_bytes, plan_merge
from lmd.registry.lm_config import FileRole
from lmd.registry.manifest import FileLayer
from lmd.registry.model_store import HeldBlobs, ModelStore, Progress, Tag, read_blob_header
from lmd.registry.shards import Paired, in_shard_order, whole_name

_MERGED_ROLES: tuple[FileRole, ...] = ("weights", "draft")
_KIND = "merged"
#: Part of what is remembered: another layout of the merged file would give other bytes.
_LAYOUT = 1


@dataclass(frozen=True, slots=True)
class ShardSet:
    """The shards of one model in order, and the name of the file that they make."""

    role: FileRole
    shards: tuple[Paired, ...]
    filename: str

    @property
    def size_bytes(self) -> int:
        """Bytes of the shards, about those of the merged file."""
        return sum(file.size_bytes for file, _ in self.shards)


def shard_sets(store: ModelStore[Tag], files: Sequence[FileLayer], given: Collection[Digest]) -> list[ShardSet]:
    """Find the models among *files* whose weights are several files, all of them *given* as files.

    Files that a model of the store has, or that were named by their digests, stay as they are: their digests are what
    others know them by.

    Raises:
        GgufInvalid: when several files are not one whole model.
        BlobMissing: when a file is not in the store.
    """
    found = []
    for role in _MERGED_ROLES:
        several = [file for file in files if file.role == role]
        if len(several) > 1 and all(file.digest in given for file in several):
            headers = [read_blob_header(store, file.digest) for file in several]
            ordered = in_shard_order(several, headers)
            found.append(ShardSet(role, tuple(ordered), whole_name(ordered[0][0].filename)))
    return found


def merge(
    store: ModelStore[Tag],
    shards: ShardSet,
    lease: HeldBlobs,
    *,
    on_progress: Progress | None = None,
    cancelled: threading.Event | None = None,
) -> FileLayer:
    """Write the file that *shards* make; *lease* holds it. Shards that were merged before are not written again.

    Raises:
        GgufInvalid: a shard is not well-formed.
        BlobMissing: a shard is not in the store.
        PullCancelled: *cancelled* was set.
        DiskFull: there is no room for the file; nothing was written.
    """
    key = f"{_LAYOUT} {' '.join(file.digest.hex for file, _ in shards.shards)}"
    known = store.recall(_KIND, key)
    if known is not None:
        digest = Digest.parse(known)
        lease.add(digest)
        try:
            return FileLayer(digest, store.blob_size(digest), shards.filename, shards.role)
        except (BlobMissing, BlobCorrupt):
            pass  # it was removed since
    with ExitStack() as stack:
        files = [stack.enter_context(store.open_blob(file.digest)) for file, _ in shards.shards]
        plan = plan_merge(files[0], [header for _, header in shards.shards])
        digest = store.compose(
            merged_bytes(plan, files),
            plan.size_bytes,
            f"merging {shards.filename}",
            on_progress=on_progress,
            cancelled=cancelled,
        )
    lease.add(digest)
    store.remember(_KIND, key, str(digest))
    return FileLayer(digest, plan.size_bytes, shards.filename, shards.role)


def with_merged(files: Sequence[FileLayer], merged: Sequence[FileLayer]) -> list[FileLayer]:
    """Return *files* with the *merged* ones in the place of all of the same role."""
    roles = {file.role for file in merged}
    return [*merged, *(file for file in files if file.role not in roles)]
