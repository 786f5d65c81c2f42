"""What removed models were made of, so that a Modelfile that names one by its digest still means something.

`lm rm` takes the bytes of a model at once. What stays for a while is a few hundred bytes of each: which files it had,
and where they came from. As long as its weights are here, for other models or because they were pulled again, the same
model can be made again.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass
from typing import Any

from lmd.registry.digest import Digest
from lmd.registry.errors import BlobMissing
from lmd.registry.lm_config import Origin
from lmd.registry.manifest import FileLayer, Manifest
from lmd.registry.model_store import ModelStore, Tag

#: Of so many models, the last that were removed.
MOST_REMEMBERED = 100

_KIND, _KEY = "removed", "models"
_REMOTE = ("hf.co/", "https://", "http://")


class FilesGone(BlobMissing):
    """Raised when a Modelfile names bytes that the store had, and has no more."""

    def __init__(self, digest: Digest, message: str, hint: str) -> None:
        super().__init__(str(digest))
        self.message = message
        self.args = (message,)
        self.hint = hint


@dataclass(frozen=True, slots=True)
class RemovedModel:
    """The files of a model that was removed, and their origin."""

    files: tuple[FileLayer, ...]
    origin: Origin

    @property
    def source(self) -> str:
        """Where its files can be pulled from as they were; "" when nowhere."""
        return self.origin.ref if self.origin.ref.startswith(_REMOTE) and not self.origin.quantize else ""

    def first_missing(self, store: ModelStore[Tag]) -> FileLayer | None:
        """Return a file that the store lacks of those that another model takes from it; None when it has all.

        Drafts and adapters are not among them: a Modelfile names those by their own digests.
        """
        for file in self.files:
            if file.role not in ("weights", "projector"):
                continue
            try:
                store.blob_size(file.digest)
            except BlobMissing:
                return file
        return None

    def gone(self, file: FileLayer) -> FilesGone:
        """Return the failure that a missing *file* of it is."""
        ref = self.origin.ref
        if self.origin.quantize:
            hint = f"it was quantized here; put what it was made of behind FROM, and `QUANTIZE {self.origin.quantize}`"
        elif self.source:
            hint = f"put `FROM {ref}` in its place; if its files have changed there since, the result is another model"
        elif ref.startswith("file:"):
            hint = f"put `FROM {ref.removeprefix('file:')}` in its place, or where the file is now"
        else:
            hint = "put the path of its GGUF file behind FROM"
        return FilesGone(
            file.digest, f"`{file.filename}`, which FROM needs, went with the last model that had it", hint
        )


def remember_removed(store: ModelStore[Tag], manifests: Sequence[Manifest]) -> None:
    """Note what models are made of that are about to be removed. For one thread at a time. Raises: DiskFull."""
    known = _all(store)
    for manifest in manifests:
        known.pop(str(manifest.digest), None)
        known[str(manifest.digest)] = {
            "files": [[str(file.digest), *astuple(file)[1:]] for file in manifest.file_layers],
            "origin": asdict(manifest.lm.origin),
        }
    newest = dict(list(known.items())[-MOST_REMEMBERED:])
    store.remember(_KIND, _KEY, json.dumps(newest))


def removed_model(store: ModelStore[Tag], digest: Digest) -> RemovedModel | None:
    """Find what the model of this manifest was made of, when it was removed not long ago."""
    entry = _all(store).get(str(digest))
    if entry is None:
        return None
    files = (FileLayer(Digest.parse(file), *rest) for file, *rest in entry["files"])
    return RemovedModel(tuple(files), Origin(**entry["origin"]))


def _all(store: ModelStore[Tag]) -> dict[str, Any]:
    text = store.recall(_KIND, _KEY)
    found: dict[str, Any] = json.loads(text) if text else {}
    return found
