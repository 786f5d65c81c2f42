"""Makes models from Modelfiles."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Collection, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial

import structlog

from lmd.daemon.catalog import Catalog
from lmd.daemon.names import new_name
from lmd.daemon.ollama_level import check_required
from lmd.daemon.pulls import Pulls
from lmd.daemon.quantizer import Quantized, Quantizer, Wanted, WorkProgress
from lmd.daemon.reporting import Finished, reports_of
from lmd.daemon.template_check import check_template
from lmd.registry.digest import Digest
from lmd.registry.errors import InvalidRequest, ModelNotFound
from lmd.registry.lm_config import LmConfig
from lmd.registry.manifest import FileLayer
from lmd.registry.merging import with_merged
from lmd.registry.modelfile import Modelfile
from lmd.registry.pull import PullEvent
from lmd.registry.recipe_files import keys_of
from lmd.registry.ref import FileRef, ModelRef, parse_ref
from lmd.registry.store import Lease, TagRecord

log = structlog.get_logger(__name__)

Step = str | PullEvent | WorkProgress | TagRecord


@dataclass(frozen=True, slots=True)
class Quantization:
    """The type to quantize the weights of a new model to ("": that of its Modelfile), and by whom.

    *requantize* allows weights that are quantized already.
    """

    by: Quantizer
    quantize: str = ""
    requantize: bool = False


async def create(
    catalog: Catalog,
    pulls: Pulls,
    *,
    name: str,
    modelfile: str,
    files: Mapping[str, Digest],
    quantization: Quantization,
    token: str | None = None,
    edited: Digest | None = None,
) -> AsyncGenerator[Step]:
    """Make or replace the model *name* as a Modelfile says; as `make` otherwise. Raises ModelfileSyntax, too."""
    target = _target(name, edited)
    yield "reading the Modelfile"
    recipe = await catalog.parse(modelfile)
    making = make(
        catalog,
        pulls,
        name=target,
        recipe=recipe,
        files=files,
        quantization=quantization,
        token=token,
        edited=edited,
    )
    async with aclosing(making) as steps:
        async for step in steps:
            yield step


async def make(
    catalog: Catalog,
    pulls: Pulls,
    *,
    name: str,
    recipe: Modelfile,
    files: Mapping[str, Digest],
    quantization: Quantization,
    token: str | None = None,
    edited: Digest | None = None,
) -> AsyncGenerator[Step]:
    """Make or replace the model *name*; yields what begins, progress of a pull, of merging or of quantizing, at the end
    the tag.

    *files* holds, for each argument that is a file, the argument as written and the blob that was stored for it; for
    one that is a folder or pattern, ``ARGUMENT/NAME`` for each of its files. A model that is not here is pulled;
    closing the iterator is leaving that pull. *edited* makes it an edit of the manifest that *name* points to: when
    that is another one by now, nothing is done.

    Raises: InvalidRef, InvalidRequest, ModelNotFound, BlobMissing, GgufInvalid, what a pull raises, what
    `Quantizer.quantize` raises, TagChanged, DiskFull, StoreError.
    """
    target = _target(name, edited)
    check_required(recipe.requires)
    await check_template(recipe.template or "")
    used = {key for source in recipe.sources for key in keys_of(source.value, files)}
    if unused := files.keys() - used:
        raise InvalidRequest(f"no directive of the Modelfile names the file `{min(unused)[:200]}`", field="files")
    for source in recipe.file_sources:
        if source.value not in files and source.digest is None:
            raise _file_not_sent("ADAPTER or PROJECTOR", source.value)
    named: dict[str, TagRecord | None] = {"FROM": None, "DRAFT": None}
    for directive, sources in (("FROM", recipe.from_), ("DRAFT", recipe.drafts or ())):
        for source in sources:
            if keys_of(source.value, files):
                continue
            if source.digest is not None:
                if lost := await catalog.lost_source(source.digest):
                    async with aclosing(_pull(pulls, parse_ref(lost), lost, token)) as steps:
                        async for step in steps:
                            if not isinstance(step, TagRecord):
                                yield step
                continue
            if directive == "DRAFT" and named[directive] is not None:
                raise InvalidRequest("a model has one draft at most", field="draft", hint="leave all but one DRAFT out")
            steps = _find(catalog, pulls, directive, source.value, token, target)
            async with aclosing(steps):
                async for step in steps:
                    if isinstance(step, TagRecord):
                        named[directive] = step
                    else:
                        yield step
    models = [tag.manifest for tag in named.values() if tag is not None]
    async with catalog.hold(f"create {target}", [*files.values(), *models]) as lease:
        parts, lm = await catalog.gather(recipe, files=files, base=named["FROM"], draft=named["DRAFT"])
        note = "create" if edited is None else "edit"
        publication = _Publication(catalog, target, set(files.values()), lease, note, edited)
        wanted_type = quantization.quantize or recipe.quantize
        if wanted_type:
            wanted = Wanted(target, parts, lm, wanted_type, requantize=quantization.requantize, may_be=True)
            making = publication.quantized(wanted, quantization.by)
        else:
            making = publication.of(parts, lm)
        tag: TagRecord | None = None
        async with aclosing(making) as working:
            async for made in working:
                if isinstance(made, TagRecord):
                    tag = made
                else:
                    yield made
    await catalog.let_go(files.values())
    # Only now: whoever has the model may remove it at once, and nothing of this must hold its bytes then.
    assert tag is not None, "a model that is made ends with its tag"
    log.info("model_created", name=tag.name, digest=str(tag.manifest))
    yield tag


async def make_quantized(
    catalog: Catalog, quantizer: Quantizer, wanted: Wanted, given: Collection[Digest], *, note: str
) -> TagRecord:
    """Make or replace the model that is *wanted* of files that are in the store, of which *given* were not before.

    Raises: as `Quantizer.quantize`.
    """
    async with catalog.hold(f"create {wanted.name}", given) as lease:
        publication = _Publication(catalog, wanted.name, given, lease, note, None)
        async with aclosing(publication.quantized(wanted, quantizer)) as steps:
            made = [step async for step in steps if isinstance(step, TagRecord)]
    return made[-1]


@dataclass(frozen=True, slots=True)
class _Publication:
    """Points *name* at a model; *given* are the files that were brought for it, and *lease* holds what is made."""

    catalog: Catalog
    name: str
    given: Collection[Digest]
    lease: Lease
    note: str
    expected: Digest | None

    async def of(self, parts: Sequence[FileLayer], lm: LmConfig) -> AsyncGenerator[Step]:
        """Publish a model of these parts, once shards among the given files are one file; the tag comes last."""
        merged = []
        for shards in await self.catalog.shard_sets(parts, self.given):
            yield f"merging {len(shards.shards)} files into {shards.filename}"
            work = partial(self.catalog.merge, shards, self.lease)
            async with aclosing(reports_of(work, "merge")) as reports:
                async for report in reports:
                    if isinstance(report, Finished):
                        merged.append(report.result)
                        yield WorkProgress(shards.filename, report.result.size_bytes, report.result.size_bytes)
                    else:
                        yield WorkProgress(shards.filename, *report)
        yield f"creating {self.name}"
        files = with_merged(parts, merged)
        yield await self.catalog.publish(self.name, files, lm, note=self.note, expected=self.expected)

    async def quantized(self, wanted: Wanted, quantizer: Quantizer) -> AsyncGenerator[Step]:
        """Publish a model of quantized weights; the shards of an original need no merging."""
        async with aclosing(quantizer.quantize(wanted)) as working:
            async for made in working:
                if not isinstance(made, Quantized):
                    yield made
                    continue
                # What is of the type already comes back as it was, in all its files.
                async with aclosing(self.of(made.files, made.lm)) as steps:
                    async for step in steps:
                        yield step


def _target(name: str, edited: Digest | None) -> str:
    """Return the canonical name. An edit may be of a model that was pulled, whose name is that of its source."""
    return new_name(name, "name") if edited is None else parse_ref(name).name


async def _find(
    catalog: Catalog, pulls: Pulls, directive: str, value: str, token: str | None, target: str
) -> AsyncGenerator[str | PullEvent | TagRecord]:
    """Find the model *value*, pulling it when it is not here; the tag comes last."""
    try:
        yield await catalog.find(value)
        return
    except ModelNotFound:
        ref = parse_ref(value)
        if isinstance(ref, FileRef):
            raise _file_not_sent(directive, value) from None
        if ref.name == target:
            raise InvalidRequest(
                f"{directive} {value[:200]} is the model that is to be made, and there is none yet",
                field=directive.lower(),
                hint="name the model or the file to start from",
            ) from None
    async with aclosing(_pull(pulls, ref, value, token)) as steps:
        async for step in steps:
            yield step


async def _pull(
    pulls: Pulls, ref: ModelRef, text: str, token: str | None
) -> AsyncGenerator[str | PullEvent | TagRecord]:
    """Pull a model; the tag comes last."""
    yield f"pulling {ref.name}"
    async with pulls.attach(ref, text=text, token=token) as watcher:
        async for event in watcher:
            yield event
        yield watcher.result()


def _file_not_sent(directive: str, value: str) -> InvalidRequest:
    return InvalidRequest(
        f"{directive} {value[:200]} is a file, and no blob was stored for it",
        field="files",
        hint="`lm create` stores the files of a Modelfile first",
    )
