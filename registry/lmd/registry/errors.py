"""Domain errors: what went wrong, in a form people and programs can use.

    LmdError
    ├── InvalidRequest            a field is missing or out of range
    ├── InvalidRef                a model reference does not parse
    ├── ModelfileSyntax           a Modelfile does not parse
    ├── ModelNotFound             no model has this name here
    ├── VersionNotFound           a name has no such version, or it is no longer kept
    ├── TagChanged                a name was pointed at another model meanwhile
    ├── CapabilityMissing         the model cannot do this
    ├── SourceError               a pull's source ...
    │   ├── SourceNotFound          ... does not know the repository or file
    │   ├── SourceDenied            ... refuses access
    │   ├── SourceUnavailable       ... cannot be reached, or keeps failing
    │   ├── SourceRateLimited       ... asks to slow down
    │   └── SourceInvalid           ... answers something that must not be trusted
    ├── DigestMismatch            downloaded bytes do not hash to the announced digest
    ├── PullCancelled             a pull was stopped
    ├── BlobMissing               stored data that a manifest names is gone
    ├── BlobCorrupt               stored data does not hash to its name
    ├── StoreError                an operation on the store's disk or index failed
    │   └── StoreLocked             another daemon owns the store
    ├── DiskFull                  not enough free space
    ├── GgufInvalid               a file is not a well-formed GGUF
    │   └── ShardsInvalid           files are not all those of one model, each once
    ├── FileInvalid               a path is not a regular file that can be imported
    └── FileChanged               a file changed while it was read

Each has a *reason* (a name of the ``ErrorReason`` enum of the wire API, without its prefix), *metadata* with every
dynamic value of the message, and an optional *hint*: what to do next. The message is one sentence without a full stop.
Nothing here imports anything of the project, so every layer may.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar


def size_text(size_bytes: int) -> str:
    """Return a size for people, rounded to a tenth of a binary unit: "22.2 MiB"."""
    value, unit = float(size_bytes), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{size_bytes} B" if unit == "B" else f"{value:.1f} {unit}"


class LmdError(Exception):
    """Any failure that a caller can be told about."""

    reason: ClassVar[str] = "INTERNAL"

    def __init__(self, message: str, *, hint: str = "", metadata: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.metadata: dict[str, str] = dict(metadata or {})


class InvalidRequest(LmdError):
    """Raised when a request field is missing or outside its range."""

    reason = "INVALID_ARGUMENT"

    def __init__(self, message: str, *, field: str, hint: str = "") -> None:
        super().__init__(message, hint=hint, metadata={"field": field})


class InvalidRef(LmdError):
    """Raised when a model reference does not parse."""

    reason = "INVALID_MODEL_REF"

    def __init__(self, message: str, *, ref: str, hint: str = "") -> None:
        super().__init__(message, hint=hint, metadata={"ref": ref[:200]})


@dataclass(frozen=True, slots=True)
class ModelfileProblem:
    """One mistake in a Modelfile; *line* and *column* count from 1."""

    line: int
    column: int
    message: str
    source_line: str


class ModelfileSyntax(LmdError):
    """Raised when a Modelfile does not parse; *problems* holds every mistake of the file, in order."""

    reason = "MODELFILE_SYNTAX"

    def __init__(self, problems: Sequence[ModelfileProblem]) -> None:
        first = problems[0]
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        super().__init__(
            f"Modelfile line {first.line}: {first.message}{more}",
            metadata={"line": str(first.line), "column": str(first.column)},
        )
        self.problems = tuple(problems)


class ModelNotFound(LmdError):
    """Raised when no model has this name here; *suggestions* are close names."""

    reason = "MODEL_NOT_FOUND"

    def __init__(self, name: str, *, suggestions: Sequence[str] = (), hint: str = "", message: str = "") -> None:
        metadata = {"name": name}
        if suggestions:
            metadata["suggestions"] = ",".join(suggestions)
            hint = hint or f"did you mean {' or '.join(f'`{s}`' for s in suggestions)}?"
        super().__init__(message or f"model `{name}` not found", hint=hint, metadata=metadata)
        self.suggestions = tuple(suggestions)


class VersionNotFound(LmdError):
    """Raised when a name has no version of this number, or its bytes are no longer kept."""

    reason = "VERSION_NOT_FOUND"

    def __init__(self, message: str, *, name: str, version: int, hint: str = "") -> None:
        super().__init__(message, hint=hint, metadata={"name": name, "version": str(version)})


class TagChanged(LmdError):
    """Raised when a name no longer points to the manifest that a change of it began with; *actual* may be empty."""

    reason = "TAG_CHANGED"

    def __init__(self, name: str, *, expected: str, actual: str) -> None:
        super().__init__(
            f"`{name}` was {'changed' if actual else 'removed'} meanwhile",
            hint=f"see `lm history {name}`, and begin anew from what it is now",
            metadata={"name": name, "expected": expected, "actual": actual},
        )


class CapabilityMissing(LmdError):
    """Raised when a model cannot do what is asked."""

    reason = "CAPABILITY_MISSING"

    def __init__(self, name: str, capability: str, *, hint: str = "") -> None:
        super().__init__(
            f"model `{name}` does not support {capability}",
            hint=hint,
            metadata={"name": name, "capability": capability},
        )


class SourceError(LmdError):
    """Base of what can go wrong at the place a model is pulled from."""

    reason = "SOURCE_UNAVAILABLE"

    def __init__(self, message: str, *, ref: str, hint: str = "", retry_after_s: float | None = None) -> None:
        super().__init__(message, hint=hint, metadata={"ref": ref})
        self.retry_after_s = retry_after_s


class SourceNotFound(SourceError):
    """Raised when the source does not know the repository or file."""

    reason = "SOURCE_NOT_FOUND"


class SourceDenied(SourceError):
    """Raised when the source refuses access: gated, private, or a bad token."""

    reason = "SOURCE_ACCESS_DENIED"


class SourceUnavailable(SourceError):
    """Raised when the source cannot be reached, or made no progress for the whole retry budget."""

    reason = "SOURCE_UNAVAILABLE"


class SourceRateLimited(SourceError):
    """Raised when the source asks to slow down for longer than a pull waits."""

    reason = "SOURCE_RATE_LIMITED"


class SourceInvalid(SourceError):
    """Raised when the source answers something that must not be trusted."""

    reason = "SOURCE_INVALID"


class DigestMismatch(LmdError):
    """Raised when downloaded bytes do not hash to the announced digest; the bytes are discarded."""

    reason = "DOWNLOAD_DIGEST_MISMATCH"

    def __init__(self, *, expected: str, actual: str, what: str) -> None:
        super().__init__(
            f"{what} hashes to {actual}, not to the announced {expected}",
            hint="the source or something on the way altered the file; pull again, or report it to the source",
            metadata={"expected": expected, "actual": actual},
        )


class PullCancelled(LmdError):
    """Raised in a pull that was stopped; what arrived is kept for resume."""

    reason = "PULL_CANCELLED"

    def __init__(self, message: str = "the pull was cancelled") -> None:
        super().__init__(message, hint="pull again to resume")


class BlobMissing(LmdError):
    """Raised when stored data that a manifest names is gone."""

    reason = "BLOB_MISSING"

    def __init__(self, digest: str) -> None:
        super().__init__(
            f"blob {digest} is missing from the store",
            hint="pull the model again, or create it anew from its file",
            metadata={"digest": digest},
        )


class BlobCorrupt(LmdError):
    """Raised when stored data does not hash to its name; the file has been moved to quarantine."""

    reason = "BLOB_CORRUPT"

    def __init__(self, digest: str) -> None:
        super().__init__(
            f"blob {digest} is damaged and was moved to quarantine",
            hint="pull the model again, or create it anew from its file",
            metadata={"digest": digest},
        )


class StoreError(LmdError):
    """Raised when an operation on the store's disk or index failed; nothing acknowledged is lost."""

    reason = "STORE_IO"

    def __init__(self, message: str, *, operation: str, hint: str = "") -> None:
        super().__init__(message, hint=hint, metadata={"operation": operation})


class StoreLocked(StoreError):
    """Raised when another process owns the store."""


class DiskFull(LmdError):
    """Raised before or during a write that the store's file system has no room for."""

    reason = "DISK_SPACE"

    def __init__(self, *, needed_bytes: int, free_bytes: int, where: str) -> None:
        super().__init__(
            f"not enough disk space in {where}: {size_text(needed_bytes)} needed, {size_text(free_bytes)} free",
            hint="remove a model with `lm rm`, or run `lm gc`",
            metadata={"needed_bytes": str(needed_bytes), "free_bytes": str(free_bytes)},
        )
        self.needed_bytes = needed_bytes
        self.free_bytes = free_bytes


class GgufInvalid(LmdError):
    """Raised when a file is not a well-formed GGUF, or exceeds a bound of the parser."""

    reason = "GGUF_INVALID"
    what: ClassVar[str] = "not a valid GGUF file"
    next_step: ClassVar[str] = (
        "get the file again; if it stays so, use another one of the model and tell whoever made this one"
    )

    def __init__(self, detail: str) -> None:
        super().__init__(f"{self.what}: {detail}", hint=self.next_step, metadata={"detail": detail})


class ShardsInvalid(GgufInvalid):
    """Raised when files that are to be one model are not all of one model, each once."""

    what = "the files are not one whole model"
    next_step = "name every file of one model, each once: their folder, a pattern, or the first of them"


class FileInvalid(LmdError):
    """Raised when a path is not a regular file that can be imported."""

    reason = "FILE_INVALID"

    def __init__(self, path: str, why: str) -> None:
        super().__init__(
            f"cannot import {path}: {why}",
            hint="give the path of a GGUF file that can be read, not of a link to it",
            metadata={"path": path},
        )


class FileChanged(LmdError):
    """Raised when a file changed while it was read; nothing of it is kept."""

    reason = "FILE_CHANGED"

    def __init__(self, path: str) -> None:
        super().__init__(
            f"{path} changed while it was read",
            hint="wait until the writer is done, then try again",
            metadata={"path": path},
        )
