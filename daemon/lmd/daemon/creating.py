"""Makes models from Modelfiles."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping

import structlog

from lmd.daemon.catalog import Catalog
from lmd.daemon.names import new_name
from lmd.daemon.pulls import Pulls
from lmd.registry.digest import Digest
from lmd.registry.errors import InvalidRequest, ModelNotFound
from lmd.registry.pull import PullEvent
from lmd.registry.ref import FileRef, parse_ref
from lmd.registry.store import TagRecord

log = structlog.get_logger(__name__)


async def create(
    catalog: Catalog,
    pulls: Pulls,
    *,
    name: str,
    modelfile: str,
    files: Mapping[str, Digest],
    token: str | None = None,
) -> AsyncGenerator[str | PullEvent | TagRecord]:
    """Make or replace the model *name*; yields what begins, the progress of a pull, and at the end the tag.

    *files* holds, for each FROM that is a file, its argument as written and the blob that was stored for it. A base
    that is not here is pulled; closing the iterator is leaving that pull.

    Raises: InvalidRef, InvalidRequest, ModelfileSyntax, ModelNotFound, BlobMissing, GgufInvalid, what a pull raises,
    DiskFull, StoreError.
    """
    target = new_name(name, "name")
    yield "reading the Modelfile"
    recipe = await catalog.parse(modelfile)
    unused = files.keys() - {source.value for source in recipe.from_}
    if unused:
        raise InvalidRequest(f"no FROM names the file `{min(unused)[:200]}`", field="files")
    base: TagRecord | None = None
    for source in recipe.from_:
        if source.value in files or source.digest is not None:
            continue
        try:
            base = await catalog.find(source.value)
        except ModelNotFound:
            ref = parse_ref(source.value)
            if isinstance(ref, FileRef):
                raise _file_not_sent(source.value) from None
            yield f"pulling {ref.name}"
            async with pulls.attach(ref, text=source.value, token=token) as watcher:
                async for event in watcher:
                    yield event
                base = watcher.result()
    yield f"creating {target}"
    tag = await catalog.build(target, recipe, files=files, base=base)
    log.info("model_created", name=tag.name, digest=str(tag.manifest))
    yield tag


def _file_not_sent(value: str) -> InvalidRequest:
    return InvalidRequest(
        f"FROM {value[:200]} is a file, and no blob was stored for it",
        field="files",
        hint="`lm create` stores the files of a Modelfile first",
    )
