"""What the drop-in folder has made so far, kept in the store's index over restarts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import structlog

from lmd.daemon.dropin_scan import FileMark
from lmd.registry.store import Store

log = structlog.get_logger(__name__)

_KIND = "dropin"
_VERSION = 1

#: The files an entry was made from, by their path below the folder.
Marks = dict[str, FileMark]


@dataclass(frozen=True, slots=True)
class Made:
    """The model an entry became.

    *manifest* is empty while the model is being made: after a crash in between, a model under *name* is ours.
    *folder_inode* tells a folder that was emptied from one that is not mounted: only the first removes models.
    """

    name: str
    manifest: str
    marks: Marks
    folder_inode: int


class DropInState:
    """The models made from one folder, by the key of their entry. Not thread-safe."""

    def __init__(self, store: Store, folder: Path) -> None:
        self._store = store
        self._key = str(folder)
        self._made = self._load()

    @property
    def made(self) -> Mapping[str, Made]:
        """All entries that became models."""
        return self._made

    def put(self, key: str, made: Made) -> None:
        """Remember *made* durably."""
        if self._made.get(key) != made:
            self._made[key] = made
            self._save()

    def drop(self, key: str) -> None:
        """Forget the entry durably."""
        if self._made.pop(key, None) is not None:
            self._save()

    def owns(self, name: str, manifest: str) -> bool:
        """Return whether *name* pointing at *manifest* is the folder's work."""
        return any(made.name == name and made.manifest in ("", manifest) for made in self._made.values())

    def _save(self) -> None:
        entries = {key: asdict(made) for key, made in self._made.items()}
        self._store.remember(_KIND, self._key, json.dumps({"version": _VERSION, "entries": entries}))

    def _load(self) -> dict[str, Made]:
        text = self._store.recall(_KIND, self._key)
        if text is None:
            return {}
        try:
            data = json.loads(text)
            if data["version"] != _VERSION:
                raise ValueError(f"version {data['version']}")
            return {key: _made(entry) for key, entry in data["entries"].items()}
        except (ValueError, KeyError, TypeError) as error:
            # The files are still there and become models again; only names the user gave up may come back.
            log.warning("dropin_state_unreadable", folder=self._key, error=str(error))
            return {}


def _made(entry: Mapping[str, Any]) -> Made:
    marks = {path: (int(inode), int(size), int(mtime)) for path, (inode, size, mtime) in entry["marks"].items()}
    return Made(str(entry["name"]), str(entry["manifest"]), marks, int(entry["folder_inode"]))
