"""The models of the store, for everything in the daemon that deals with models by name."""

from __future__ import annotations

import base64
import binascii
import json
import sys
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import structlog

from lmd.daemon.adapter_scales import AdapterFile
from lmd.daemon.blocking import BlockingPool
from lmd.daemon.footprints import Footprints
from lmd.daemon.names import Names, Removal, new_name
from lmd.daemon.reporting import Progress
from lmd.daemon.summaries import ListedModel, Summaries
from lmd.daemon.tasks import TaskSet, to_the_end
from lmd.daemon.uploads import Uploads
from lmd.daemon.versions import Versions
from lmd.registry.aliases import AliasTable
from lmd.registry.capabilities import capabilities
from lmd.registry.create import build_from_files, gather_parts
from lmd.registry.digest import Digest
from lmd.registry.errors import BlobMissing, InvalidRequest, LmdError, ModelNotFound
from lmd.registry.gguf import GgufHeader
from lmd.registry.inspect import HeaderCache, ModelFacts, effective_template, model_info, read_whole_header
from lmd.registry.lm_config import FileRole, LmConfig, Message
from lmd.registry.manifest import FileLayer, Manifest
from lmd.registry.merging import ShardSet, merge, shard_sets
from lmd.registry.modelfile import Modelfile, parse_modelfile
from lmd.registry.parameters import ParameterValue
from lmd.registry.removed import removed_model
from lmd.registry.store import Lease, Store, TagRecord

log = structlog.get_logger(__name__)

MAX_PAGE = 1000


@dataclass(frozen=True, slots=True)
class ResolvedModel:
    """A model that is ready to be loaded: its files are there, and its settings are read.

    *header* is that of the whole model, shards combined; *headers* holds the same for those who take several.
    *template* is the one in effect; *parameters* are only those that the manifest sets. *draft* are the files of
    the model that drafts for this one, and *draft_header* is its header; () and None when there is none. *adapters* are
    in the order of the manifest.
    """

    name: str
    manifest_digest: Digest
    manifest: Manifest
    weights: tuple[Path, ...]
    header: GgufHeader
    headers: tuple[GgufHeader, ...]
    template: str | None
    system: str | None
    parameters: Mapping[str, ParameterValue]
    messages: tuple[Message, ...]
    capabilities: tuple[str, ...]
    size_bytes: int
    draft: tuple[Path, ...]
    draft_header: GgufHeader | None
    adapters: tuple[AdapterFile, ...]


async def _nothing_resident(_manifest: Digest) -> None:
    pass


@dataclass(frozen=True, slots=True)
class Page:
    """Some models of a list; *next_token* is empty on the last page."""

    models: tuple[ListedModel, ...]
    next_token: str


class Catalog:
    """Finds, lists, describes, makes, copies and removes models. For use on one event loop."""

    def __init__(self, store: Store, aliases: AliasTable, pool: BlockingPool) -> None:
        self._store = store
        self._pool = pool
        self._headers = HeaderCache()
        self._summaries = Summaries(store, self._headers)
        self._sweeps = TaskSet()
        #: Stops the runner of a manifest when its answers are done; returns once it is gone or known to be busy.
        self.unload_unnamed: Callable[[Digest], Awaitable[None]] = _nothing_resident
        #: For the drop-in folder, which works in a thread of its own.
        self.names = Names(store, aliases)
        self.uploads = Uploads(store, pool)
        self.versions = Versions(store, self.names, pool)
        self._footprints = Footprints(store)

    async def find(self, text: str) -> TagRecord:
        """Return the tag that a reference means. Raises: InvalidRef, ModelNotFound."""
        return await self._pool.run(self.names.find, text)

    async def resolve(self, text: str) -> ResolvedModel:
        """Return the model that a reference means, with all its files.

        Raises: InvalidRef, ModelNotFound, BlobMissing, BlobCorrupt, GgufInvalid.
        """
        return await self._pool.run(self._resolve, text)

    async def list(self, prefix: str = "", *, page_size: int = 0, page_token: str = "") -> Page:
        """Return a page of the models whose name starts with *prefix*, most recently modified first.

        A page goes on where the one before ended, whatever was added or removed meanwhile. Raises: InvalidRequest.
        """
        if page_size < 0:
            raise InvalidRequest("a page cannot have fewer than 0 models", field="page_size")
        after = _parse_token(page_token) if page_token else None
        return await self._pool.run(self._page, prefix, min(page_size or MAX_PAGE, MAX_PAGE), after)

    @property
    def generation(self) -> int:
        """A number that grows with every change of a name; see `Store.generation`."""
        return self._store.generation

    async def models(self) -> tuple[ListedModel, ...]:
        """Return all models, most recently modified first."""
        return await self._pool.run(lambda: self._page("", sys.maxsize, None).models)

    async def own_bytes(self) -> Mapping[str, int]:
        """Return, by name, the bytes that only this name needs; those of one being removed may be missing."""
        return await self._pool.run(self._footprints.own_bytes)

    async def describe(self, tag: TagRecord) -> ListedModel:
        """Return the headline facts of a tag."""
        return await self._pool.run(self._summaries.of, tag)

    async def info(self, text: str, version: int = 0) -> ModelFacts:
        """Return everything about a model, or about a version of it (0 is the current one).

        Raises: as `resolve`, and VersionNotFound.
        """
        return await self._pool.run(lambda: model_info(self._store, self.versions.tag_at(text, version), self._headers))

    async def header(self, facts: ModelFacts, role: FileRole, *, whole: bool = False) -> GgufHeader | None:
        """Return the header of the files of a model that have this role; None when there are none.

        Long arrays are cut short unless *whole* (a tokenizer makes that tens of megabytes).

        Raises: BlobMissing, BlobCorrupt, GgufInvalid.
        """
        digests = tuple(layer.digest for layer in facts.files if layer.role == role)
        if not digests:
            return None
        if whole:
            return await self._pool.run(read_whole_header, self._store, digests)
        return await self._pool.run(self._headers.of_files, self._store, digests)

    async def delete(self, text: str) -> Removal:
        """Remove a name, and what only it needed.

        A resident model that nobody can name any more stops: at once when it is idle, after its running answers when
        it is not; its bytes go then.

        Raises: InvalidRef, ModelNotFound, StoreError.
        """
        tag = await self._pool.run(self.names.find_exactly, text)
        own = await self._pool.run(self.names.exclusive_blobs, tag)
        if not await self._pool.run(self.names.remove, tag):
            await self.unload_unnamed(tag.manifest)
        removal = await self._pool.run(self.names.removal, own)
        log.info("model_removed", name=tag.name, freed_bytes=removal.freed_bytes, pending_bytes=removal.pending_bytes)
        return removal

    async def copy(self, source: str, destination: str, version: int = 0) -> ListedModel:
        """Point the name *destination* at the model *source*, or at a version of it (0 is the current one).

        Raises: InvalidRef, InvalidRequest, ModelNotFound, VersionNotFound, BlobMissing, StoreError.
        """
        name = new_name(destination, "destination")
        tag = await self._pool.run(self.versions.tag_at, source, version)
        note = f"copy of {tag.name}{f'@{version}' if version else ''}"
        copied = await self._pool.run(self._store.set_tag, name, tag.manifest, note=note)
        return await self.describe(copied)

    async def parse(self, modelfile: str) -> Modelfile:
        """Parse a Modelfile. Raises: ModelfileSyntax with every mistake."""
        return await self._pool.run(parse_modelfile, modelfile)

    @asynccontextmanager
    async def hold(self, owner: str, digests: Iterable[Digest]) -> AsyncGenerator[Lease]:
        """Keep blobs and manifests, with all they refer to, for the time of a with block. Raises: StoreError."""
        lease = await self._pool.run(self._store.lease, owner)
        try:
            await self._pool.run(lease.add, *digests)
            yield lease
        finally:
            await to_the_end(self._pool.run(lease.release))

    async def gather(
        self,
        recipe: Modelfile,
        *,
        files: Mapping[str, Digest],
        base: TagRecord | None,
        draft: TagRecord | None = None,
    ) -> tuple[Sequence[FileLayer], LmConfig]:
        """Return the files and settings that a Modelfile adds up to, all of which are in the store; see `publish`.

        The files and models should be held by then.

        Raises: InvalidRequest, GgufInvalid, BlobMissing, ModelNotFound.
        """
        for named in (base, draft):
            if named is not None:
                await self._pool.run(self._check_there, named)
        return await self._pool.run(gather_parts, self._store, recipe, files=files, base=base, draft=draft)

    async def lost_source(self, digest: Digest) -> str:
        """Return where to pull what a removed model needs that is gone; "" when nothing is, or nobody knows where."""
        return await self._pool.run(self._lost_source, digest)

    async def shard_sets(self, files: Sequence[FileLayer], given: Collection[Digest]) -> Sequence[ShardSet]:
        """Find what is to be merged among the *files* of a new model; see `lmd.registry.merging`.

        Raises: GgufInvalid, BlobMissing.
        """
        return await self._pool.run(shard_sets, self._store, files, given)

    async def merge(self, shards: ShardSet, lease: Lease, on_progress: Progress) -> FileLayer:
        """Make one file of shards, which *lease* holds. Raises: GgufInvalid, BlobMissing, DiskFull, StoreError."""
        cancelled = threading.Event()
        return await self._pool.run_cancellable(
            cancelled, merge, self._store, shards, lease, on_progress=on_progress, cancelled=cancelled
        )

    async def publish(
        self, name: str, files: Sequence[FileLayer], lm: LmConfig, *, note: str, expected: Digest | None = None
    ) -> TagRecord:
        """Make or replace the model *name* of files that are in the store and held there.

        *note* and *expected* are as for `Store.set_tag`.

        Raises: InvalidRequest, GgufInvalid, BlobMissing, TagChanged, StoreError.
        """
        return await self._pool.run(build_from_files, self._store, name, files, lm=lm, note=note, expected=expected)

    async def let_go(self, digests: Iterable[Digest]) -> None:
        """Give up the leases of uploads that a model was made of."""
        await self._pool.run(self.uploads.release, tuple(digests))

    def model_released(self, manifest: Digest) -> None:
        """Take note that no runner holds *manifest* any more: what was removed meanwhile can go now."""
        self._sweeps.start(self._sweep(manifest), name="sweep")

    async def stop(self) -> None:
        """Return when the sweeps under way are done."""
        await self._sweeps.wait()

    async def _sweep(self, manifest: Digest) -> None:
        try:
            freed_bytes = await self._pool.run(self._store.sweep_condemned)
        except LmdError as error:
            log.warning("sweep_failed", digest=str(manifest), error=error.message)
            return
        if freed_bytes:
            log.info("space_freed", digest=str(manifest), freed_bytes=freed_bytes)

    def _resolve(self, text: str) -> ResolvedModel:
        tag = self.names.find(text)
        manifest = self._store.get_manifest(tag.manifest)
        for layer in manifest.files:
            if self._store.blob_size(layer.digest) != layer.size_bytes:
                raise BlobMissing(str(layer.digest))
        header = self._headers.get(self._store, manifest)
        template = effective_template(manifest, header)
        drafts = tuple(layer.digest for layer in manifest.drafts)
        return ResolvedModel(
            name=tag.name,
            manifest_digest=tag.manifest,
            manifest=manifest,
            weights=tuple(self._store.blob_path(layer.digest) for layer in manifest.weights),
            header=header,
            headers=(header,),
            template=template,
            system=manifest.lm.system,
            parameters=manifest.lm.parameters,
            messages=manifest.lm.messages,
            capabilities=capabilities(header, template, has_projector=manifest.projector is not None),
            size_bytes=manifest.size_bytes,
            draft=tuple(self._store.blob_path(digest) for digest in drafts),
            draft_header=self._headers.of_files(self._store, drafts) if drafts else None,
            adapters=tuple(
                AdapterFile(layer.filename, self._store.blob_path(layer.digest), layer.scale, layer.size_bytes)
                for layer in manifest.adapters
            ),
        )

    def _lost_source(self, digest: Digest) -> str:
        removed = None if self._store.has_blob(digest, None) else removed_model(self._store, digest)
        if removed is None or removed.first_missing(self._store) is None:
            return ""
        return removed.source

    def _page(self, prefix: str, size: int, after: tuple[float, str] | None) -> Page:
        tags = sorted(self._store.list_tags(prefix), key=_place)
        if after is not None:
            tags = [tag for tag in tags if _place(tag) > after]
        models = tuple(self._summaries.of(tag) for tag in tags[:size])
        return Page(models, _token(tags[size - 1]) if len(tags) > size else "")

    def _check_there(self, tag: TagRecord) -> None:
        """Make sure, once a lease holds it, that a model was not removed after it was found. Raises: ModelNotFound."""
        try:
            for digest in self._store.get_manifest(tag.manifest).blob_digests():
                self._store.blob_size(digest)
        except BlobMissing as error:
            raise ModelNotFound(
                tag.name, hint="it was removed meanwhile; pull or create it again, then try once more"
            ) from error


def _place(tag: TagRecord) -> tuple[float, str]:
    """Return the place of a tag in a list: the newest first, then by name."""
    return (-tag.modified_at, tag.name)


def _token(tag: TagRecord) -> str:
    return base64.urlsafe_b64encode(json.dumps(_place(tag)).encode()).decode()


def _parse_token(token: str) -> tuple[float, str]:
    try:
        place, name = json.loads(base64.urlsafe_b64decode(token))
        return float(place), str(name)
    except (binascii.Error, ValueError, TypeError) as error:
        raise InvalidRequest("the page token is not one of this daemon's", field="page_token") from error
