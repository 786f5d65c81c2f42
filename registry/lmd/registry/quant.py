"""Which files of a repository make up the model that was asked for.

The rules follow llama.cpp's downloader where it is sound, so that the same reference gets the same file there and here:
files for other purposes are set aside; a selector is matched against the names; without one it is Q4_K_M, then Q8_0,
then the first. Deviations: a selector must start and end at a separator (there ``F16`` finds ``BF16``); ``-q4.gguf``
and ``-q8.gguf``, as some publishers name them, count as the four-bit and eight-bit choice; the shards of a model must
all be there.

Source: ``common/download.cpp`` as vendored in llama-cpp-python 0.3.36.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from lmd.registry.errors import SourceInvalid, SourceNotFound
from lmd.registry.filenames import why_hostile

DEFAULT_LABELS = ("Q4_K_M", "Q4", "Q8_0", "Q8")
"""What is taken when nothing is asked for, best first."""
MAX_SHARDS = 1024

_OTHER_PURPOSES = ("mmproj", "imatrix", "mtp-", "eagle3-", "dflash-", "dspark-")
_SHARD = re.compile(r"(?P<prefix>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})", re.DOTALL)
_QUANT = re.compile(r"(?:[it]?q\d\w*|bf16|fp?16|fp?32|mxfp4\w*|nvfp4\w*)", re.IGNORECASE | re.ASCII)
_LABEL = re.compile(rf"(?:^|_)({_QUANT.pattern})$", re.IGNORECASE | re.ASCII)
_BITS = re.compile(r"\d+")


@dataclass(frozen=True, slots=True)
class RepoFile:
    """A file as its repository announces it; small files have a git hash instead of a SHA-256."""

    name: str
    size_bytes: int
    sha256: str | None = None
    git_sha1: str | None = None


@dataclass(frozen=True, slots=True)
class Choice:
    """The files of a model.

    *label* is the quantization that the file's name speaks of, in upper case; "" when it has none. *others* are the
    first files of the models that were not chosen.
    """

    weights: tuple[RepoFile, ...]
    projector: RepoFile | None
    label: str
    others: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Candidate:
    """One model of the repository: a file, or all shards of a set that are there."""

    files: tuple[RepoFile, ...]
    stem: str
    shard_count: int

    @property
    def first(self) -> RepoFile:
        return self.files[0]

    @property
    def label(self) -> str:
        return _label(self.stem)


def choose_files(files: Sequence[RepoFile], selector: str | None, *, ref: str = "") -> Choice:
    """Choose the model that *selector* asks for: a quantization, a file's name, or None for the default.

    *ref* is named in errors. The order of *files* decides between equals.

    Raises:
        SourceInvalid: when a file's name is hostile, or shards of the chosen model are missing.
        SourceNotFound: when nothing fits; the hint lists what there is.
    """
    for file in files:
        check_name(file.name, ref=ref)
    candidates = _candidates(files)
    if not candidates:
        raise SourceNotFound(
            f"{ref or 'the repository'} has no GGUF model", ref=ref, hint="look for a repository with GGUF in its name"
        )
    chosen = _by_default(candidates) if selector is None else _by_selector(candidates, selector)
    if chosen is None:
        listed = ", ".join(sorted({candidate.label or candidate.first.name for candidate in candidates})[:40])
        raise SourceNotFound(f"{ref or 'the repository'} has no `{selector}`", ref=ref, hint=f"it has: {listed}")
    _check_complete(chosen, ref)
    return Choice(
        weights=chosen.files,
        projector=_projector(files, chosen),
        label=chosen.label,
        others=tuple(candidate.first.name for candidate in candidates if candidate is not chosen),
    )


def check_name(name: str, *, ref: str = "") -> None:
    """Refuse a file's name that could mean another place when it becomes part of a URL.

    Names of a source are never used as local paths; this keeps a hostile listing from steering requests.

    Raises:
        SourceInvalid: naming the file with its strange characters escaped.
    """
    why = why_hostile(name)
    if why:
        shown = ascii(name[:100])[1:-1]
        raise SourceInvalid(
            f"{ref or 'the repository'} lists a file named `{shown}`, which {why}",
            ref=ref,
            hint="do not trust this repository; nothing was fetched from it",
        )


def _label(stem: str) -> str:
    """The quantization a file's name (without ending) speaks of: its last word that looks like one; "" if none."""
    words = reversed(re.split(r"[-./]", stem))
    return next((match[1].upper() for word in words if (match := _LABEL.search(word))), "")


def _candidates(files: Sequence[RepoFile]) -> list[_Candidate]:
    """Group the model files, in the order of their first files."""
    groups: dict[tuple[str, int], list[tuple[int, RepoFile]]] = {}
    for file in files:
        if not file.name.lower().endswith(".gguf"):
            continue
        base = file.name.rpartition("/")[2].lower()
        if any(word in base for word in _OTHER_PURPOSES):
            continue
        stem = file.name[: -len(".gguf")]
        shard = _SHARD.fullmatch(stem)
        if shard and not int(shard["count"]):
            shard = None
        key = (shard["prefix"], int(shard["count"])) if shard else (stem, 0)
        groups.setdefault(key, []).append((int(shard["number"]) if shard else 1, file))
    return [
        _Candidate(tuple(file for _, file in sorted(group, key=lambda item: item[0])), stem, count)
        for (stem, count), group in groups.items()
    ]


def _by_default(candidates: Sequence[_Candidate]) -> _Candidate:
    for label in DEFAULT_LABELS:
        if chosen := _by_label(candidates, label):
            return chosen
    return candidates[0]


def _by_selector(candidates: Sequence[_Candidate], selector: str) -> _Candidate | None:
    wanted = selector.lower()
    if wanted.endswith(".gguf"):
        for exact in (True, False):
            for candidate in candidates:
                for file in candidate.files:
                    name = file.name if exact else file.name.lower()
                    if (selector if exact else wanted) in (name, name.rpartition("/")[2]):
                        return candidate
        return None
    return _by_label(candidates, selector)


def _by_label(candidates: Sequence[_Candidate], selector: str) -> _Candidate | None:
    """The first candidate labelled *selector*, else the first that has it between separators.

    An underscore counts as one before a quantization only: ``model_Q4_K_M`` is found as Q4_K_M, but not as K_M.
    """
    for candidate in candidates:
        if candidate.label == selector.upper():
            return candidate
    before = r"[-./_]" if _QUANT.fullmatch(selector) else r"[-./]"
    anchored = re.compile(rf"(?:^|{before}){re.escape(selector)}(?=[-./]|$)", re.IGNORECASE)
    return next((candidate for candidate in candidates if anchored.search(candidate.stem)), None)


def _check_complete(candidate: _Candidate, ref: str) -> None:
    count = candidate.shard_count
    if not count:
        return
    numbers = [int(match["number"]) for file in candidate.files if (match := _SHARD.fullmatch(file.name[:-5]))]
    if count > MAX_SHARDS:
        raise SourceInvalid(f"`{candidate.stem}` claims {count} shards; at most {MAX_SHARDS} are allowed", ref=ref)
    if numbers != list(range(1, count + 1)):
        missing = sorted(set(range(1, count + 1)) - set(numbers))
        detail = f"shard {missing[0]} of {count} is missing" if missing else f"shards beyond {count} are there"
        raise SourceInvalid(
            f"the model `{candidate.stem}` is not complete: {detail}",
            ref=ref,
            hint="the upload may be under way; try later, or choose another quantization",
        )


def _projector(files: Sequence[RepoFile], chosen: _Candidate) -> RepoFile | None:
    """The projector that goes with a model: nearest in the directory tree, then closest in bits."""
    folder = chosen.first.name.split("/")[:-1]
    bits = _bits(chosen.label)
    best: tuple[tuple[int, int], RepoFile] | None = None
    for file in files:
        *where, base = file.name.lower().split("/")
        if "mmproj" not in base or not base.endswith(".gguf"):
            continue
        original = file.name.split("/")[:-1]
        if original != folder[: len(original)]:
            continue
        distance = (len(folder) - len(where), abs(bits - _bits(_label(base[: -len(".gguf")]))))
        if best is None or distance < best[0]:
            best = (distance, file)
    return best[1] if best else None


def _bits(label: str) -> int:
    match = _BITS.search(label)
    return int(match[0][:4]) if match else 0
