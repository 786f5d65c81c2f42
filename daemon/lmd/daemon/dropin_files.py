"""The files that a Modelfile in the drop-in folder names: single ones, shards, and folders of one model's files."""

from __future__ import annotations

import os
from pathlib import Path

from lmd.daemon.dropin_scan import SHARD, Entry, irregular
from lmd.daemon.settling import NotYet
from lmd.registry.errors import FileInvalid
from lmd.registry.modelfile import From, Modelfile

_PREFIXES = ("/", "./", "../", "file:")


class RecipeFiles:
    """Finds what Modelfiles name, inside of the folder and nowhere else.

    The daemon opens files with its own rights, which may be more than those of who wrote the Modelfile.
    """

    def __init__(self, folder: Path, rescan_s: float) -> None:
        self._folder = folder
        self._rescan_s = rescan_s

    def of(self, entry: Entry, recipe: Modelfile) -> dict[str, Path]:
        """Return the files of a recipe by what names them, as `create_model` takes them: for an argument that stands
        for several, a folder or the first of the shards that lie beside it, ``ARGUMENT/NAME`` for each.

        Raises: FileInvalid, and NotYet for what is still missing.
        """
        found: dict[str, Path] = {}
        named = {source.value for source in recipe.sources}
        for source in recipe.sources:
            if not self.is_file(source, recipe):
                continue
            path = self._inside(entry, source.value)
            if path.is_dir() and not path.is_symlink():
                several = self._below(path, source.value)
            else:
                several = self._shards(self._regular(path, source.value), source.value)
                several = [] if any(other.name in _names(named - {source.value}) for other in several) else several
                if not several:
                    found[source.value] = path
            found |= {f"{source.value.rstrip('/')}/{each.name}": each for each in several}
        return found

    @staticmethod
    def is_file(source: From, recipe: Modelfile) -> bool:
        """Tell whether an argument names a file or folder, and no model and no digest."""
        if source.digest is not None:
            return False
        value = source.value
        looks_like_file = value.startswith(_PREFIXES) or ("/" not in value and value.lower().endswith(".gguf"))
        return looks_like_file or value in (".", "..") or source in recipe.file_sources

    def _inside(self, entry: Entry, value: str) -> Path:
        """Return the path that is meant: beside the Modelfile or elsewhere in the folder, not outside."""
        path = Path(os.path.normpath(entry.files[0].parent / value.removeprefix("file:")))
        parent = path.parent
        inside = parent == self._folder or (parent.parent == self._folder and not parent.is_symlink())
        if not inside:
            raise FileInvalid(value, "the Modelfile names a file outside of the drop-in folder")
        return path

    def _regular(self, path: Path, value: str) -> Path:
        if why := irregular(path):
            raise FileInvalid(value, why)
        if not path.exists():
            raise NotYet(f"{value} is not there yet", self._rescan_s)
        return path

    def _below(self, folder: Path, value: str) -> list[Path]:
        """Return the GGUF files of a folder, which are to be those of one model."""
        names = sorted(name for name in os.listdir(folder) if name.lower().endswith(".gguf") and name[0] != ".")
        if not names:
            raise NotYet(f"{value} has no GGUF file yet", self._rescan_s)
        paths = [self._regular(folder / name, f"{value.rstrip('/')}/{name}") for name in names]
        for path in paths:
            self._shards(path, value)
        return paths

    def _shards(self, path: Path, value: str) -> list[Path]:
        """Return a shard and all its siblings; nothing for a file that is not one of several."""
        shard = SHARD.fullmatch(path.name)
        if shard is None or int(shard["count"]) < 2:
            return []
        count = int(shard["count"])
        stem, ending = shard["base"], path.name[-len(".gguf") :]
        paths = [path.with_name(f"{stem}-{number:05}-of-{count:05}{ending}") for number in range(1, count + 1)]
        missing = [sibling.name for sibling in paths if not sibling.exists()]
        if missing:
            raise NotYet(f"{missing[0]} of {value} is not there yet", self._rescan_s)
        return [self._regular(sibling, value) for sibling in paths]


def _names(values: set[str]) -> set[str]:
    return {Path(value).name for value in values}
