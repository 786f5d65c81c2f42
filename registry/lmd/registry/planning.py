"""From a reference to a plan: what would be fetched, from where, and what it must hash to."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

from lmd.registry.cancel import CancelScope
from lmd.registry.digest import Digest
from lmd.registry.errors import DigestMismatch, InvalidRequest
from lmd.registry.http import Credentials
from lmd.registry.lm_config import FileRole
from lmd.registry.quant import RepoFile, choose_files
from lmd.registry.ref import HubRef, UrlRef
from lmd.registry.remote_file import RemoteFile
from lmd.registry.sidecars import RemoteText, choose_texts
from lmd.registry.sources.hub import HubEntry, HubModel, HubSource
from lmd.registry.sources.url import UrlSource


@dataclass(frozen=True, slots=True)
class PlannedFile:
    """A file to fetch; *key* names its transfer: pulls of the same key share it."""

    filename: str
    role: FileRole
    key: str
    remote: RemoteFile

    @property
    def is_pinned(self) -> bool:
        """Whether *key* means the same bytes on another day, so that what arrived can be resumed or found again."""
        remote = self.remote
        return remote.sha256 is not None or remote.git_sha1 is not None or remote.validator is not None

    @property
    def digest(self) -> Digest | None:
        """The announced digest; None when it is known only after the transfer."""
        return self.remote.sha256

    @property
    def size_bytes(self) -> int | None:
        """The announced size."""
        return self.remote.size_bytes


@dataclass(frozen=True, slots=True)
class PullPlan:
    """What a pull will do.

    name: the tag it will set.
    origin: the reference as it was resolved, such as "hf.co/org/repo:Q4_K_M".
    commit: the repository's commit, pinned for every request; "" for URLs and files.
    files: the blobs to fetch, the main weights first.
    projector: a file for images that the repository has and that is not fetched; None when there is none or it is
    among the files.
    others: the first files of the models in the repository that were not chosen.
    license: what the repository's tags name.
    texts: small files that go into the model's configuration.
    """

    name: str
    origin: str
    commit: str
    files: tuple[PlannedFile, ...]
    projector: str | None = None
    others: tuple[str, ...] = ()
    license: str | None = None
    texts: tuple[RemoteText, ...] = ()

    @property
    def size_bytes(self) -> int | None:
        """Bytes of all files; None when a source does not say."""
        sizes = [file.size_bytes for file in self.files]
        return None if None in sizes else sum(size for size in sizes if size is not None)


def plan_hub(
    source: HubSource, ref: HubRef, name: str, *, token: str | None, with_projector: bool, cancel: CancelScope
) -> PullPlan:
    """Ask the Hub and choose the files of *ref*; the plan sets the tag *name*.

    Raises:
        SourceError: the source refuses or fails, or nothing fits.
        DigestMismatch: the reference asserts another digest than the Hub announces.
        PullCancelled: cancelled.
    """
    credentials = source.credentials(token)
    model = source.describe(ref.org, ref.repo, ref=ref.name, token=token, cancel=cancel)
    by_name = {entry.name: entry for entry in model.entries}
    choice = choose_files(
        [RepoFile(e.name, e.size_bytes or 0, e.sha256, e.git_sha1) for e in model.entries], ref.selector, ref=ref.name
    )
    chosen: list[tuple[str, FileRole]] = [(file.name, "weights") for file in choice.weights]
    if with_projector and choice.projector is not None:
        chosen.append((choice.projector.name, "projector"))
    files = []
    for filename, role in chosen:
        entry = by_name[filename]
        if entry.sha256 is None:
            entry = source.complete(model, entry, ref=ref.name, credentials=credentials, cancel=cancel)
        files.append(_hub_file(source, model, entry, role, ref, credentials))
    if ref.digest is not None:
        files[0] = _asserted(files[0], ref.digest, shards=len(choice.weights))
    return PullPlan(
        name=name,
        origin=f"hf.co/{model.repo_id}:{choice.label or choice.weights[0].name}",
        commit=model.commit,
        files=tuple(files),
        projector=choice.projector.name if choice.projector is not None and not with_projector else None,
        others=choice.others,
        license=model.license,
        texts=choose_texts(source, model, ref=ref.name, credentials=credentials),
    )


def plan_url(source: UrlSource, ref: UrlRef, *, hub_credentials: Credentials | None, cancel: CancelScope) -> PullPlan:
    """Ask a web server about a file.

    *hub_credentials* serve when the server is the Hub and the URL has no user name.

    Raises:
        SourceError: it refuses or fails.
        DigestMismatch: the reference asserts another digest than the server announces.
        PullCancelled: cancelled.
    """
    file = source.describe(ref.url, ref=ref.name, fallback_credentials=hub_credentials, cancel=cancel)
    sha256 = None if file.sha256 is None else Digest.from_hex(file.sha256)
    remote = RemoteFile(
        url=file.url,
        what=file.filename,
        ref=ref.name,
        size_bytes=file.size_bytes,
        sha256=sha256,
        validator=file.validator,
        credentials=file.credentials,
    )
    # Without an announced digest, the same URL, size and validator mean the same bytes.
    key = str(sha256)
    if sha256 is None:
        # The query may be a secret: only its hash goes into names on the disk.
        url_hash = hashlib.sha256(file.url.encode()).hexdigest()
        key = f"url {file.shown} {url_hash} {file.size_bytes} {file.validator}"
    planned = PlannedFile(file.filename, "weights", key, remote)
    if ref.digest is not None:
        planned = _asserted(planned, ref.digest, shards=1)
    return PullPlan(name=ref.name, origin=ref.name, commit="", files=(planned,))


def _hub_file(
    source: HubSource,
    model: HubModel,
    entry: HubEntry,
    role: FileRole,
    ref: HubRef,
    credentials: Credentials | None,
) -> PlannedFile:
    sha256 = None if entry.sha256 is None else Digest.from_hex(entry.sha256)
    remote = RemoteFile(
        url=source.file_url(model, entry.name),
        what=entry.name,
        ref=ref.name,
        size_bytes=entry.size_bytes,
        sha256=sha256,
        git_sha1=entry.git_sha1 if sha256 is None else None,
        credentials=credentials,
        page=source.page(model.repo_id),
    )
    if sha256 is not None:
        key = str(sha256)
    elif entry.git_sha1 is not None:
        key = f"git {entry.git_sha1} {entry.size_bytes}"
    else:
        key = f"hub {source.endpoint} {model.repo_id} {model.commit} {entry.name}"
    return PlannedFile(entry.name, role, key, remote)


def _asserted(file: PlannedFile, digest: Digest, *, shards: int) -> PlannedFile:
    """Require the digest that the reference asserts after "@"."""
    if shards > 1:
        raise InvalidRequest(f"a digest cannot be asserted of a model of {shards} files", field="ref")
    if file.digest is None:
        return replace(file, key=str(digest), remote=replace(file.remote, sha256=digest))
    if file.digest != digest:
        raise DigestMismatch(expected=str(digest), actual=str(file.digest), what=file.filename)
    return file
