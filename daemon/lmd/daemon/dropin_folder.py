"""Makes the models of the store agree with the files of the drop-in folder."""

from __future__ import annotations

import asyncio
import math
import os
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import structlog

from lmd.daemon.dropin_files import RecipeFiles
from lmd.daemon.dropin_scan import Entry, mark_of, scan
from lmd.daemon.dropin_state import DropInState, Made, Marks
from lmd.daemon.errors import QuantizeFailed
from lmd.daemon.names import Names
from lmd.daemon.quantizer import Wanted
from lmd.daemon.settling import NotYet, Settling, Timing
from lmd.daemon.template_check import check_template
from lmd.registry.create import create_model, gather_parts
from lmd.registry.digest import Digest
from lmd.registry.errors import (
    FileChanged,
    FileInvalid,
    GgufInvalid,
    LmdError,
    ModelfileSyntax,
    ModelNotFound,
    PullCancelled,
)
from lmd.registry.modelfile import From, Modelfile, decode_modelfile, parse_modelfile
from lmd.registry.ref import DEFAULT_TAG, name_from_filename
from lmd.registry.store import Store, TagRecord

log = structlog.get_logger(__name__)

MAX_MODELFILE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Problem:
    """Why an entry is no model; it is logged once and not tried again before *retry_at* unless its files change."""

    message: str
    marks: Marks
    retry_at: float


@dataclass(frozen=True, slots=True)
class Obstacle:
    """What is in the way of a file in the folder, told to people.

    *since* is when that was first seen, in seconds since the epoch. One that is *waiting* goes on by itself.
    """

    file: str
    message: str
    since: float
    waiting: bool


#: Quantizes and publishes a model; called in the folder's thread. Raises PullCancelled when it has to stop.
Quantize = Callable[[Wanted, Collection[Digest]], TagRecord]


class DropInFolder:
    """The folder, its models, and what stands in the way of the others.

    Each `reconcile` compares everything, so lost events cost time and nothing else. For one thread at a time.
    """

    def __init__(
        self,
        store: Store,
        names: Names,
        folder: Path,
        timing: Timing,
        quantize: Quantize,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._quantize = quantize
        self._store = store
        self._names = names
        self._folder = folder
        self._timing = timing
        self._clock = clock
        self._state = DropInState(store, folder)
        self._settling = Settling(timing, clock)
        self._files = RecipeFiles(folder, timing.rescan_s)
        self._absent: dict[str, float] = {}
        self._problems: dict[str, Problem] = {}
        #: Why entries are no models, and what others wait for, by their path below the folder. Replaced as a whole
        #: at the end of a look, so any thread may read them.
        self.problems: Mapping[str, str] = {}
        self.waiting: Mapping[str, str] = {}
        self.obstacles: Sequence[Obstacle] = ()

    def reconcile(self, cancelled: threading.Event) -> float:
        """Make, replace and remove models; return after how many seconds to look again.

        New files come before removals, so that a renamed file's bytes are never dropped and taken in again.
        """
        try:
            inode = self._folder.stat().st_ino
            entries = scan(self._folder)
        except OSError as error:
            log.warning("dropin_folder_unreadable", folder=str(self._folder), error=error.strerror)
            return self._timing.rescan_s
        wait_s = self._timing.rescan_s
        makers: dict[str, str] = {}
        waiting: dict[str, str] = {}
        for entry in entries:
            try:
                self._look_at(entry, inode, makers, cancelled)
            except NotYet as why:
                waiting[entry.key] = str(why)
                wait_s = min(wait_s, why.wait_s)
            except PullCancelled:
                return wait_s
        keys = {entry.key for entry in entries}
        wait_s = min([wait_s, *self._remove_gone(keys, inode)])
        self._forget_all_but(keys)
        self._tell(waiting)
        return wait_s

    def _tell(self, waiting: Mapping[str, str]) -> None:
        """Make public what is in the way of which entries."""
        self.waiting = waiting
        self.problems = {key: problem.message for key, problem in self._problems.items()}
        known = {(obstacle.file, obstacle.message): obstacle.since for obstacle in self.obstacles}
        now = time.time()
        # An entry that waits is looked at anew, so what was wrong with it before does not count any more.
        told = {key: (message, False) for key, message in self.problems.items()}
        told |= {key: (message, True) for key, message in waiting.items()}
        self.obstacles = [
            Obstacle(key, message, known.get((key, message), now), waits)
            for key, (message, waits) in sorted(told.items())
        ]

    def _look_at(self, entry: Entry, inode: int, makers: dict[str, str], cancelled: threading.Event) -> None:
        if entry.problem:
            self._report(entry, {}, entry.problem)
            return
        name = f"{name_from_filename(entry.stem)}:{DEFAULT_TAG}"
        maker = makers.setdefault(name, entry.key)
        if maker != entry.key:
            if self._state.made.get(maker) is not None:
                # Until then the model that this entry made before is there, and the folder's to replace.
                self._state.drop(entry.key)
            self._report(entry, {}, f"`{maker}` makes the model `{name}`")
            return
        try:
            self._make_if_new(entry, name, inode, cancelled)
        except FileChanged as error:
            raise NotYet("it changed while it was read", self._timing.settle_s) from error

    def _make_if_new(self, entry: Entry, name: str, inode: int, cancelled: threading.Event) -> None:
        made = self._state.made.get(entry.key)
        if made is not None and self._is_current(made):
            self._problems.pop(entry.key, None)
            self._state.put(entry.key, replace(made, folder_inode=inode))
            return
        marks = self._marks(entry.files)
        try:
            files, recipe = self._recipe(entry)
            paths = list(files.values())
            marks |= self._marks(paths)
            problem = self._problems.get(entry.key)
            if problem is not None and problem.marks == marks and self._clock() < problem.retry_at:
                return
            self._settling.check(paths)
            tag = self._make(entry, name, inode, recipe, files, cancelled)
        except (PullCancelled, FileChanged):
            raise
        except LmdError as error:
            # Quantizing takes minutes; what failed once fails again until a file changes.
            lasting = isinstance(error, GgufInvalid | ModelfileSyntax | QuantizeFailed)
            self._report(entry, marks, _told(error), may_pass=not lasting)
            return
        except OSError as error:
            self._report(entry, marks, f"cannot read it: {error.strerror}", may_pass=True)
            return
        self._problems.pop(entry.key, None)
        self._state.put(entry.key, Made(tag.name, str(tag.manifest), marks, inode))
        log.info("dropin_model_made", file=entry.key, name=tag.name, digest=str(tag.manifest))

    def _is_current(self, made: Made) -> bool:
        return all(mark_of(self._folder / path) == mark for path, mark in made.marks.items()) and bool(made.marks)

    def _recipe(self, entry: Entry) -> tuple[dict[str, Path], Modelfile]:
        """Return the GGUF files of an entry by what names them, and the Modelfile it is or, for bare files, means."""
        if entry.is_modelfile:
            self._settling.check(entry.files)
            recipe = self._read(entry.files[0])
        else:
            recipe = Modelfile(from_=tuple(From(path.name, 1, 1) for path in entry.files))
        return self._files.of(entry, recipe), recipe

    def _make(
        self,
        entry: Entry,
        name: str,
        inode: int,
        recipe: Modelfile,
        files: Mapping[str, Path],
        cancelled: threading.Event,
    ) -> TagRecord:
        existing = self._store.get_tag(name)
        if existing is not None and not self._owns(entry, existing):
            raise FileInvalid(entry.key, f"the name `{name}` belongs to a model from elsewhere; rename the file")
        # This is a thread of its own, which may have a loop of its own.
        asyncio.run(check_template(recipe.template or ""))
        digests: dict[str, Digest] = {}
        for argument, path in files.items():
            digests[argument], _ = self._store.import_file(path, on_progress=None, cancelled=cancelled)
        base, draft = self._named(recipe.from_, recipe), self._named(recipe.drafts or (), recipe)
        before = self._state.made.get(entry.key)
        self._state.put(entry.key, Made(name, "", {}, inode))
        try:
            if recipe.quantize:
                parts, lm = gather_parts(self._store, recipe, files=digests, base=base, draft=draft)
                wanted = Wanted(name, parts, lm, recipe.quantize, may_be=True)
                return self._quantize(wanted, set(digests.values()))
            return create_model(
                self._store,
                name,
                recipe,
                files=digests,
                base=base,
                draft=draft,
                note="folder",
                cancelled=cancelled,
            )
        except LmdError:
            if before is None:
                self._state.drop(entry.key)
            else:
                self._state.put(entry.key, before)
            raise

    def _owns(self, entry: Entry, tag: TagRecord) -> bool:
        """Tell whether the folder may replace what a name points to.

        That is what it made itself, and what came of it since by an edit or a rollback: the last who writes wins, and
        what was before can be gone back to. A model that took the place of one that was removed is from elsewhere.
        """
        if self._state.owns(tag.name, str(tag.manifest)):
            return True
        made = self._state.made.get(entry.key)
        if made is None or made.name != tag.name:
            return False
        return any(str(version.manifest) == made.manifest for version in self._store.tag_versions(tag.name))

    def _named(self, sources: Sequence[From], recipe: Modelfile) -> TagRecord | None:
        """Return the model among the arguments of FROM or DRAFT, which must be in the store already."""
        names = [
            source.value for source in sources if not self._files.is_file(source, recipe) and source.digest is None
        ]
        return self._names.find(names[-1]) if names else None

    def _read(self, path: Path) -> Modelfile:
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            data = file.read(MAX_MODELFILE_BYTES + 1)
        if len(data) > MAX_MODELFILE_BYTES:
            raise FileInvalid(path.name, "a Modelfile has at most 1 MiB")
        return parse_modelfile(decode_modelfile(data))

    def _marks(self, paths: Sequence[Path]) -> Marks:
        marks: Marks = {}
        for path in paths:
            mark = mark_of(path)
            if mark is None:
                raise NotYet(f"{path.name} is not there", self._timing.settle_s)
            marks[str(path.relative_to(self._folder))] = mark
        return marks

    def _remove_gone(self, keys: set[str], inode: int) -> Iterator[float]:
        """Remove the models of entries that are gone for good; yield the waits for those that may come back.

        Editors replace a file by moving the old one away first; that is an edit, not a removal.
        """
        now = self._clock()
        for key, made in list(self._state.made.items()):
            if key in keys or made.folder_inode != inode:
                continue
            left_s = self._absent.setdefault(key, now) + self._timing.settle_s - now
            if left_s > 0:
                yield left_s
                continue
            tag = self._store.get_tag(made.name)
            if tag is not None and str(tag.manifest) == made.manifest:
                self._remove(tag, key)
            self._state.drop(key)
            del self._absent[key]

    def _remove(self, tag: TagRecord, key: str) -> None:
        try:
            self._names.remove(tag)
        except ModelNotFound:
            log.debug("dropin_model_gone_already", file=key, name=tag.name)
        else:
            log.info("dropin_model_removed", file=key, name=tag.name)

    def _forget_all_but(self, keys: set[str]) -> None:
        for key in self._problems.keys() - keys:
            del self._problems[key]
        for key in self._absent.keys() & keys:
            del self._absent[key]
        self._settling.forget_missing()

    def _report(self, entry: Entry, marks: Marks, message: str, *, may_pass: bool = False) -> None:
        known = self._problems.get(entry.key)
        retry_at = self._clock() + self._timing.rescan_s if may_pass else math.inf
        self._problems[entry.key] = Problem(message, marks, retry_at)
        if known is None or known.message != message or known.marks != marks:
            log.warning("dropin_file_refused", file=entry.key, reason=message)


def _told(error: LmdError) -> str:
    """Return what is wrong; of a Modelfile every mistake, with its line and column."""
    if not isinstance(error, ModelfileSyntax) or len(error.problems) == 1:
        return error.message
    return "; ".join(f"line {problem.line}:{problem.column}: {problem.message}" for problem in error.problems)
