"""What the Hub holds: repositories, their commits and files."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

LFS_THRESHOLD_BYTES = 10 << 20
_DIGESTS: dict[tuple[Path, int, int], tuple[str, str]] = {}


@dataclass(slots=True)
class HubFile:
    """A file of a repository: bytes at *path*, or in memory."""

    name: str
    path: Path | None = None
    data: bytes | None = None
    lfs: bool = True
    size_bytes: int = 0
    sha256: str = ""
    git_sha1: str = ""

    @classmethod
    def of(cls, name: str, content: Path | bytes, *, lfs: bool | None = None) -> HubFile:
        """Describe *content*, hashing it once per process; GGUF and big files are LFS unless told otherwise."""
        if isinstance(content, bytes):
            size = len(content)
            sha256, git_sha1 = _digest(io.BytesIO(content), size)
        else:
            stat = content.stat()
            size = stat.st_size
            key = (content, size, stat.st_mtime_ns)
            if key not in _DIGESTS:
                with content.open("rb") as file:
                    _DIGESTS[key] = _digest(file, size)
            sha256, git_sha1 = _DIGESTS[key]
        return cls(
            name=name,
            path=content if isinstance(content, Path) else None,
            data=content if isinstance(content, bytes) else None,
            lfs=lfs if lfs is not None else name.endswith(".gguf") or size > LFS_THRESHOLD_BYTES,
            size_bytes=size,
            sha256=sha256,
            git_sha1=git_sha1,
        )

    @property
    def pointer_sha1(self) -> str:
        """The git object id of an LFS file: that of its pointer, not of its bytes."""
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {self.size_bytes}\n"
        return hashlib.sha1(f"blob {len(pointer)}\0{pointer}".encode()).hexdigest()


def _digest(file: io.BufferedIOBase, size: int) -> tuple[str, str]:
    sha256 = hashlib.sha256()
    sha1 = hashlib.sha1(f"blob {size}\0".encode())
    while chunk := file.read(1 << 20):
        sha256.update(chunk)
        sha1.update(chunk)
    return sha256.hexdigest(), sha1.hexdigest()


@dataclass(slots=True)
class HubRepo:
    """A repository and its history; *allowed* holds the tokens that may read it when it is private or gated."""

    id: str
    private: bool = False
    gated: bool = False
    license: str | None = "mit"
    allowed: set[str] = field(default_factory=set)
    commits: dict[str, dict[str, HubFile]] = field(default_factory=dict)
    head: str = ""

    def commit(self, files: Iterable[HubFile]) -> str:
        """Make *files* the content of the main branch; earlier commits stay reachable by their id."""
        content = {file.name: file for file in files}
        listing = "\n".join(f"{file.name} {file.sha256}" for file in content.values())
        self.head = hashlib.sha1(f"{self.head}\n{listing}".encode()).hexdigest()
        self.commits[self.head] = content
        return self.head

    def at(self, revision: str) -> tuple[str, dict[str, HubFile]] | None:
        """Return the commit and the files of *revision*, or None."""
        commit = self.head if revision == "main" else revision
        return (commit, self.commits[commit]) if commit in self.commits else None

    def describe(self, revision: str, *, blobs: bool) -> dict[str, object] | None:
        """Return what `/api/models/{id}` answers."""
        found = self.at(revision)
        if found is None:
            return None
        commit, files = found
        answer: dict[str, object] = {
            "_id": hashlib.md5(self.id.encode()).hexdigest()[:24],
            "id": self.id,
            "modelId": self.id,
            "author": self.id.split("/")[0],
            "sha": commit,
            "private": self.private,
            "gated": "auto" if self.gated else False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": ["gguf"],
            "siblings": [_sibling(file, blobs=blobs) for file in files.values()],
        }
        if self.license is not None:
            answer["tags"] = ["gguf", f"license:{self.license}"]
            answer["cardData"] = {"license": self.license}
        return answer

    def tree(self, revision: str) -> list[dict[str, object]] | None:
        """Return what `/api/models/{id}/tree/{revision}` answers."""
        found = self.at(revision)
        if found is None:
            return None
        entries: list[dict[str, object]] = []
        for file in found[1].values():
            entry: dict[str, object] = {"type": "file", "path": file.name, "size": file.size_bytes}
            entry["oid"] = file.pointer_sha1 if file.lfs else file.git_sha1
            if file.lfs:
                entry["lfs"] = {"oid": file.sha256, "size": file.size_bytes, "pointerSize": 134}
            entries.append(entry)
        return entries


def _sibling(file: HubFile, *, blobs: bool) -> dict[str, object]:
    entry: dict[str, object] = {"rfilename": file.name}
    if blobs:
        entry["size"] = file.size_bytes
        entry["blobId"] = file.pointer_sha1 if file.lfs else file.git_sha1
        if file.lfs:
            entry["lfs"] = {"sha256": file.sha256, "size": file.size_bytes, "pointerSize": 134}
    return entry
