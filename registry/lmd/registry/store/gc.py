"""Garbage collection: mark from the roots, spare the young, sweep the rest.

Roots are the manifests that tags point to, those that they pointed to until recently, what leases protect, the
manifests of resident models, and manifests put so recently that their tag may be on its way. Ingests with a writer, or
whose key is a protected digest, stay too. The lock order and the reason why nothing becomes needed between mark and
sweep are described at `Gate`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from lmd.registry.digest import Digest
from lmd.registry.store.durable import disk_errors, fsync_dir
from lmd.registry.store.gate import Gate
from lmd.registry.store.ingest import Ingests, part_paths, read_key
from lmd.registry.store.layout import Layout
from lmd.registry.store.leases import Leases
from lmd.registry.store.records import GarbageItem
from lmd.registry.store.tables import Manifests, Tags, Verified

# What is removed before others get a turn at the gate.
BATCH_ITEMS = 64
BATCH_BYTES = 4 << 30

Node = TypeVar("Node", bound=Hashable)


def mark(roots: Iterable[Node], references: Callable[[Node], Iterable[Node]]) -> set[Node]:
    """Find every node that can be reached from *roots*; cycles are fine."""
    reached: set[Node] = set()
    waiting = list(roots)
    while waiting:
        node = waiting.pop()
        if node not in reached:
            reached.add(node)
            waiting.extend(references(node))
    return reached


def sweep_order(garbage: Iterable[Node], references: Callable[[Node], Iterable[Node]]) -> list[Node]:
    """Order *garbage* so that a node goes before what it refers to: whatever is left after a kill is whole."""
    waiting = dict.fromkeys(garbage, False)
    finished: list[Node] = []
    for start in list(waiting):
        stack = [(start, iter(references(start)))] if not waiting[start] else []
        waiting[start] = True
        while stack:
            node, following = stack[-1]
            following_node = next((other for other in following if waiting.get(other) is False), None)
            if following_node is None:
                finished.append(node)
                stack.pop()
            else:
                waiting[following_node] = True
                stack.append((following_node, iter(references(following_node))))
    return finished[::-1]


def is_young(stamp: float, now: float, grace_s: float) -> bool:
    """Tell whether the grace period spares what was put at *stamp*; a stamp in the future is young."""
    return grace_s > 0 and now - stamp < grace_s


@dataclass(frozen=True, slots=True)
class _Target:
    """Something that may be removed."""

    item: GarbageItem
    paths: tuple[Path, ...]
    digest: Digest | None = None


@dataclass(frozen=True, slots=True)
class _Plan:
    """What one marking found, and the state of the store it holds for."""

    targets: list[_Target]
    spared_items: int
    generation: int
    residents: frozenset[Digest]


class Collection(Iterator[GarbageItem]):
    """The items of a collection, each removed before it is handed out; abandoning it early is harmless.

    *spared_items* counts what only the grace period kept.
    """

    def __init__(self, items: Iterator[GarbageItem], spared_items: int) -> None:
        self._items = items
        self.spared_items = spared_items

    def __next__(self) -> GarbageItem:
        return next(self._items)


class Collector:
    """Removes from a store what nothing needs."""

    def __init__(
        self,
        layout: Layout,
        tags: Tags,
        manifests: Manifests,
        verified: Verified,
        leases: Leases,
        ingests: Ingests,
        gate: Gate,
        clock: Callable[[], float],
        grace_s: float,
        history_s: float,
    ) -> None:
        self._layout = layout
        self._tags = tags
        self._manifests = manifests
        self._verified = verified
        self._leases = leases
        self._ingests = ingests
        self._gate = gate
        self._clock = clock
        self._grace_s = grace_s
        #: For how long a tag's superseded versions are roots.
        self.history_s = history_s
        self.residents: Callable[[], Iterable[Digest]] = tuple

    def spared_versions(self, history_s: float | None = None) -> set[tuple[str, Digest]]:
        """Find the superseded versions that are still young enough to be kept: the name and the manifest of each."""
        now = self._clock()
        history_s = self.history_s if history_s is None else history_s
        return {
            (name, version.manifest)
            for name, version in self._tags.superseded()
            if version.superseded_at is not None and is_young(version.superseded_at, now, history_s)
        }

    def only_versions(self) -> set[Digest]:
        """Find what no tag needs, and a superseded version of one does."""
        references = self._manifests.references()

        def reached(manifests: set[Digest]) -> set[Digest]:
            return mark(manifests, lambda node: references.get(node, ()))

        versions = reached({manifest for _, manifest in self.spared_versions()})
        return versions - reached({tag.manifest for tag in self._tags.find()})

    def collect(self, dry_run: bool, grace_s: float | None, history_s: float | None) -> Collection:
        """Mark now, and remove as the result is iterated."""
        grace_s = self._grace_s if grace_s is None else grace_s
        history_s = self.history_s if history_s is None else history_s
        self._leases.renew()
        if not dry_run:
            self._forget_absent()
        plan = self._plan(grace_s, history_s)
        items = (target.item for target in plan.targets) if dry_run else self._sweep(plan, grace_s, history_s)
        return Collection(iter(items), plan.spared_items)

    def _plan(self, grace_s: float, history_s: float) -> _Plan:
        now = self._clock()
        with self._gate.hold():
            residents = frozenset(self.residents())
            roots = residents | {manifest for _, manifest in self.spared_versions(history_s)}
            references = self._manifests.references()
            needed = self._needed(roots, references, now, grace_s, condemned=set())
            strictly_needed = self._needed(roots, references, now, 0, condemned=set())
            verified_at = self._verified.added()
            targets: dict[Digest, _Target] = {}
            spared_items = 0
            for digest, status in self._layout.list_blobs():
                if digest in strictly_needed:
                    continue
                if digest in needed or is_young(verified_at.get(digest, status.st_mtime), now, grace_s):
                    spared_items += 1
                    continue
                item = GarbageItem("blob", str(digest), status.st_size, status.st_mtime)
                targets[digest] = _Target(item, (self._layout.blob(digest),), digest)
            ordered = [targets[digest] for digest in sweep_order(targets, lambda node: references.get(node, ()))]
            for target, stamp in [*self._idle_ingests(needed), *self._quarantined()]:
                if is_young(stamp, now, grace_s):
                    spared_items += 1
                else:
                    ordered.append(target)
            return _Plan(ordered, spared_items, self._gate.generation, residents)

    def _needed(
        self,
        held: Iterable[Digest],
        references: dict[Digest, list[Digest]],
        now: float,
        grace_s: float,
        condemned: set[Digest],
    ) -> set[Digest]:
        roots = {tag.manifest for tag in self._tags.find()}
        roots |= self._leases.protected()
        roots |= set(held)
        roots |= {
            manifest
            for manifest, added_at in self._manifests.added().items()
            if manifest not in condemned and is_young(added_at, now, grace_s)
        }
        return mark(roots, lambda node: references.get(node, ()))

    def _idle_ingests(self, needed: set[Digest]) -> Iterator[tuple[_Target, float]]:
        protected = {str(digest) for digest in needed}
        for name, status in self._layout.list_parts():
            key = read_key(self._layout, name)
            if self._ingests.has_writer(name) or key in protected:
                continue
            item = GarbageItem("ingest", key or name, status.st_size, status.st_mtime)
            # The journal goes first: without its part it would never be listed again.
            yield _Target(item, part_paths(self._layout, name)[::-1]), status.st_mtime

    def _quarantined(self) -> Iterator[tuple[_Target, float]]:
        for name, status in self._layout.list_quarantined():
            item = GarbageItem("quarantined", name, status.st_size, status.st_mtime)
            # The time it was moved there: a rename shows in the change time.
            yield _Target(item, (self._layout.quarantine / name,)), status.st_ctime

    def _sweep(self, plan: _Plan, grace_s: float, history_s: float) -> Iterator[GarbageItem]:
        waiting = plan.targets[::-1]
        while waiting:
            with self._gate.hold():
                if (plan.generation, plan.residents) != (self._gate.generation, frozenset(self.residents())):
                    plan = self._plan(grace_s, history_s)
                    still = {target.paths for target in plan.targets}
                    waiting = [target for target in waiting if target.paths in still]
                batch: list[_Target] = []
                while waiting and len(batch) < BATCH_ITEMS and sum(t.item.size_bytes for t in batch) < BATCH_BYTES:
                    batch.append(waiting.pop())
                self._remove(batch)
            yield from (target.item for target in batch)

    def sweep_condemned(self) -> int:
        """Remove what deleted tags needed and nothing else does; return the bytes that came free."""
        with self._gate.hold():
            condemned = self._verified.condemned()
            if not condemned:
                return 0
            references = self._manifests.references()
            residents = set(self.residents())
            versions = {manifest for _, manifest in self.spared_versions()}
            named = versions | {tag.manifest for tag in self._tags.find()}
            tagged = mark(named, lambda node: references.get(node, ()))
            needed = self._needed(residents | versions, references, self._clock(), self._grace_s, condemned)
            freed_bytes = 0
            batch = []
            for digest in sweep_order(condemned - needed, lambda node: references.get(node, ())):
                path = self._layout.blob(digest)
                with suppress(FileNotFoundError):
                    status = path.lstat()
                    # The bytes of a hard-linked file stay with its other name.
                    freed_bytes += status.st_size if status.st_nlink == 1 else 0
                    item = GarbageItem("blob", str(digest), status.st_size, status.st_mtime)
                    batch.append(_Target(item, (path,), digest))
            self._remove(batch)
            # What a resident model or a lease still needs stays condemned and goes when they end.
            self._verified.pardon((condemned - needed) | (condemned & tagged))
            return freed_bytes

    def _remove(self, batch: list[_Target]) -> None:
        """Unlink, then forget; what a kill leaves in between is noticed and harmless."""
        with ExitStack() as stack, disk_errors("collect", self._layout.root):
            gone: list[Digest] = []
            stack.callback(self._forget, gone)
            for target in batch:
                for path in target.paths:
                    with suppress(FileNotFoundError):
                        os.unlink(path)
                if target.digest is not None:
                    gone.append(target.digest)
            for directory in {path.parent for target in batch for path in target.paths}:
                fsync_dir(directory)

    def _forget_absent(self) -> None:
        """Forget blobs that vanished without us, but never what a manifest with a name refers to."""
        with self._gate.change():
            known = self._verified.added().keys() | self._manifests.added().keys()
            present = {digest for digest, _ in self._layout.list_blobs()}
            named = {tag.manifest for tag in self._tags.find()}
            self._forget(list(known - present - named))

    def _forget(self, gone: Sequence[Digest]) -> None:
        if gone:
            self._verified.forget(gone)
            self._manifests.forget(gone)
