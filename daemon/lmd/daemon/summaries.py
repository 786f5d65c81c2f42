"""The facts that lists of models show, remembered so that a list does not open every model."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

import structlog

from lmd.registry.capabilities import capabilities
from lmd.registry.digest import Digest
from lmd.registry.errors import BlobCorrupt, BlobMissing, GgufInvalid, StoreError
from lmd.registry.inspect import HeaderCache, effective_template
from lmd.registry.store import Store, TagRecord

log = structlog.get_logger(__name__)

#: Raised when the facts are read differently from the same header; older ones are then read anew.
_KIND = "summary-2"


@dataclass(frozen=True, slots=True)
class Summary:
    """What a manifest is, in short; 0 and "" stand for what is not known."""

    size_bytes: int = 0
    architecture: str = ""
    parameter_count: int = 0
    quantization: str = ""
    context_length: int = 0
    embedding_length: int = 0
    block_count: int = 0
    vocabulary_size: int = 0
    title: str = ""
    capabilities: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ListedModel:
    """A name in the store and what it stands for."""

    tag: TagRecord
    summary: Summary


class Summaries:
    """Reads and remembers summaries: a manifest never changes, so neither does its summary. Thread-safe."""

    def __init__(self, store: Store, headers: HeaderCache) -> None:
        self._store = store
        self._headers = headers

    def of(self, tag: TagRecord) -> ListedModel:
        """Return what *tag* stands for. A damaged model is listed too, with what is known: nothing."""
        summary = self._recall(tag.manifest)
        if summary is None:
            try:
                summary = self._read(tag.manifest)
            except (BlobMissing, BlobCorrupt, GgufInvalid, StoreError) as error:
                log.warning("model_unreadable", name=tag.name, digest=str(tag.manifest), error=error.message)
                return ListedModel(tag, Summary())
            self._store.remember(_KIND, str(tag.manifest), json.dumps(asdict(summary)))
        return ListedModel(tag, summary)

    def _recall(self, manifest: Digest) -> Summary | None:
        text = self._store.recall(_KIND, str(manifest))
        if text is None:
            return None
        facts = json.loads(text)
        return Summary(**{**facts, "capabilities": tuple(facts["capabilities"])})

    def _read(self, digest: Digest) -> Summary:
        manifest = self._store.get_manifest(digest)
        header = self._headers.get(self._store, manifest)
        template = effective_template(manifest, header)
        return Summary(
            size_bytes=manifest.size_bytes,
            architecture=header.architecture,
            parameter_count=header.parameter_count,
            quantization=header.quantization,
            context_length=header.context_length,
            embedding_length=header.embedding_length,
            block_count=header.block_count,
            vocabulary_size=header.vocabulary_size,
            title=header.title,
            capabilities=capabilities(header, template, has_projector=manifest.projector is not None),
        )
