"""What a stored model is: everything `lm show` prints, read from its manifest and its GGUF header."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lmd.registry.capabilities import capabilities
from lmd.registry.digest import Digest
from lmd.registry.errors import InvalidRequest
from lmd.registry.gguf import GgufHeader, combine, read_header
from lmd.registry.gguf_cursor import Limits
from lmd.registry.lm_config import Message, Origin
from lmd.registry.manifest import Layer, Manifest
from lmd.registry.model_store import ModelStore, Tag, read_blob_header
from lmd.registry.modelfile import Adapter, From, Modelfile, format_modelfile
from lmd.registry.parameters import ParameterValue

#: The largest vocabularies of mid 2026 have some 260,000 tokens and twice as many merges.
WHOLE_ARRAYS = Limits(max_kept_items=1 << 21, max_kept_bytes=128 << 20)


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """All about one model under one name.

    *template* is the one in effect, *modelfile* a recipe that makes this very manifest again; *context_length* and its
    neighbours are 0 when the header does not say. Times are in seconds since the epoch.
    """

    name: str
    digest: Digest
    size_bytes: int
    modified_at: float
    pulled_at: float
    architecture: str
    parameter_count: int
    quantization: str
    context_length: int
    embedding_length: int
    block_count: int
    vocabulary_size: int
    title: str
    capabilities: tuple[str, ...]
    template: str
    system: str
    parameters: Mapping[str, ParameterValue]
    messages: tuple[Message, ...]
    licenses: tuple[str, ...]
    origin: Origin
    files: tuple[Layer, ...]
    modelfile: str
    metadata: Mapping[str, str]
    requires: str = ""


class HeaderCache:
    """Remembers the headers of models, so that a listing does not parse tokenizers again.

    Keyed by the digests of the weights, so entries never go stale; the least recently used one goes first. Thread-safe;
    two threads that ask for the same new header may both read it.
    """

    def __init__(self, capacity: int = 128) -> None:
        self._capacity = capacity
        self._headers: OrderedDict[tuple[Digest, ...], GgufHeader] = OrderedDict()
        # Protects the dictionary; never held while a file is read.
        self._lock = threading.Lock()

    def get(self, store: ModelStore[Tag], manifest: Manifest) -> GgufHeader:
        """The header of a model, its shards combined.

        Raises:
            BlobMissing: when weights are gone.
            GgufInvalid: when they are not what was stored.
        """
        return self.of_files(store, tuple(layer.digest for layer in manifest.weights))

    def of_files(self, store: ModelStore[Tag], digests: tuple[Digest, ...]) -> GgufHeader:
        """The header of a GGUF by the digests of its files, all shards in order. Raises as `get`."""
        with self._lock:
            if digests in self._headers:
                self._headers.move_to_end(digests)
                return self._headers[digests]
        header = combine([read_blob_header(store, digest) for digest in digests])
        with self._lock:
            self._headers[digests] = header
            while len(self._headers) > self._capacity:
                self._headers.popitem(last=False)
        return header


def read_whole_header(store: ModelStore[Tag], digests: Sequence[Digest]) -> GgufHeader:
    """Read the header of a GGUF with all its arrays, the tokenizer's too; *digests* are its files, all shards in order.

    Raises:
        BlobMissing, GgufInvalid: as `HeaderCache.get`, and GgufInvalid for arrays of more than 128 MiB.
    """
    headers = []
    for digest in digests:
        with store.open_blob(digest) as file:
            headers.append(read_header(file, store.blob_size(digest), WHOLE_ARRAYS))
    return combine(headers)


def model_info(store: ModelStore[Tag], tag: Tag, headers: HeaderCache | None = None) -> ModelFacts:
    """Describe the model that *tag* points to. *headers* spares reading headers that it knows.

    Raises:
        BlobMissing, BlobCorrupt, GgufInvalid: when what the manifest names is gone or damaged.
    """
    manifest = store.get_manifest(tag.manifest)
    header = (headers or HeaderCache(1)).get(store, manifest)
    template = effective_template(manifest, header)
    lm = manifest.lm
    return ModelFacts(
        name=tag.name,
        digest=tag.manifest,
        size_bytes=manifest.size_bytes,
        modified_at=tag.modified_at,
        pulled_at=tag.pulled_at,
        architecture=header.architecture,
        parameter_count=header.parameter_count,
        quantization=header.quantization,
        context_length=header.context_length,
        embedding_length=header.embedding_length,
        block_count=header.block_count,
        vocabulary_size=header.vocabulary_size,
        title=header.title,
        capabilities=capabilities(header, template, has_projector=manifest.projector is not None),
        template=template or "",
        system=lm.system or "",
        parameters=lm.parameters,
        messages=lm.messages,
        licenses=lm.licenses or ((header.license,) if header.license else ()),
        origin=lm.origin,
        files=manifest.files,
        modelfile=recreating_modelfile(manifest, tag.name),
        metadata=header.text_metadata(),
        requires=lm.requires or "",
    )


def effective_template(manifest: Manifest, header: GgufHeader) -> str | None:
    """The chat template that is used: the manifest's, else the header's; None when there is neither."""
    return manifest.lm.template or header.chat_template


def recreating_modelfile(manifest: Manifest, name: str) -> str:
    """Write a Modelfile that, given to `create_model`, makes *manifest* again, byte for byte.

    Its FROM is the manifest's own digest, which stands for the weights and their origin alone: nothing is inherited, so
    a line that is taken out is gone from the result (with ``FROM <name>`` it would come back from the base). The blobs
    must still be here; a comment says what to write elsewhere.
    """
    lm = manifest.lm
    recipe = Modelfile(
        from_=(From(str(manifest.digest)),),
        template=lm.template,
        system=lm.system,
        parameters=lm.parameters,
        licenses=lm.licenses,
        messages=lm.messages,
        drafts=tuple(From(str(layer.digest)) for layer in manifest.drafts) or None,
        adapters=tuple(Adapter(From(str(layer.digest)), layer.scale) for layer in manifest.adapters) or None,
        requires=lm.requires,
    )
    comment = f"# Makes `{name}` again, from the files in this store.\n"
    if lm.origin.ref.startswith(("hf.co/", "https://", "http://")):
        comment += f"# On another machine, replace the digest: FROM {lm.origin.ref}\n"
    try:
        return comment + format_modelfile(recipe)
    except InvalidRequest as error:
        # No Modelfile could have made this. Inheriting everything makes the same manifest too.
        return f"# {error.message}, so all is inherited.\nFROM {name}\n"
