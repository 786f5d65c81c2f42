"""Manifests: immutable descriptions of models, as OCI image manifests in the CNCF ModelPack dialect.

    config      application/vnd.cncf.model.config.v1+json          facts from the GGUF header
    layers      application/vnd.cncf.model.weight.v1.raw           the main GGUF first, its shards in order, then others
                application/vnd.cncf.model.weight.config.v1.raw    ``lmd.json``, last

Layers are raw files, so the digest of a layer is that of the file anywhere else. There are no timestamps: the same
files and settings always give the same manifest, byte for byte.

Source: OCI image specification 1.1; ModelPack model-spec v0.0.7.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal

from lmd.registry import strict_json
from lmd.registry.digest import Digest
from lmd.registry.filenames import why_hostile
from lmd.registry.gguf import GgufHeader, combine
from lmd.registry.lm_config import MEMBER_NAME, FileEntry, FileRole, LmConfig
from lmd.registry.strict_json import Json, fail

MEDIA_TYPE = "application/vnd.oci.image.manifest.v1+json"
ARTIFACT_TYPE = "application/vnd.cncf.model.manifest.v1+json"
CONFIG_TYPE = "application/vnd.cncf.model.config.v1+json"
WEIGHT_TYPE = "application/vnd.cncf.model.weight.v1.raw"
WEIGHT_CONFIG_TYPE = "application/vnd.cncf.model.weight.config.v1.raw"
DOC_TYPE = "application/vnd.cncf.model.doc.v1.raw"
LAYER_TYPES = (WEIGHT_TYPE, WEIGHT_CONFIG_TYPE, DOC_TYPE)
FILEPATH_ANNOTATION = "org.cncf.model.filepath"
TITLE_ANNOTATION = "org.opencontainers.image.title"

MAX_LAYERS = 256
MAX_BLOB_BYTES = 2**53
_WHAT = "the manifest"


@dataclass(frozen=True, slots=True)
class FileLayer:
    """A file that becomes a layer: a blob of the store, its name at its source, and what it is for.

    *scale* is that of an adapter.
    """

    digest: Digest
    size_bytes: int
    filename: str
    role: FileRole = "weights"
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class Layer:
    """A descriptor of a manifest.

    *role* is what ``lmd.json`` says the file is for; "" for layers that are not files of the model. *scale* is that of
    an adapter.
    """

    media_type: str
    digest: Digest
    size_bytes: int
    filename: str = ""
    role: FileRole | Literal[""] = ""
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class Manifest:
    """A parsed manifest; *raw* is the bytes it was parsed from, which its digest names."""

    raw: bytes
    config: Layer
    layers: tuple[Layer, ...]
    lm: LmConfig
    annotations: Mapping[str, str]

    @property
    def digest(self) -> Digest:
        """The digest of the bytes: the model's identity."""
        return Digest.of(self.raw)

    def to_bytes(self) -> bytes:
        """The bytes as stored."""
        return self.raw

    @property
    def files(self) -> tuple[Layer, ...]:
        """The files of the model in order, weights first."""
        return tuple(layer for layer in self.layers if layer.role)

    @property
    def file_layers(self) -> list[FileLayer]:
        """The files of the model for another manifest; one without a name is called by its digest."""
        return [
            FileLayer(
                layer.digest, layer.size_bytes, layer.filename or f"{layer.digest.short}.gguf", layer.role, layer.scale
            )
            for layer in self.files
            if layer.role
        ]

    @property
    def weights(self) -> tuple[Layer, ...]:
        """The GGUF of the model: all shards in order."""
        return tuple(layer for layer in self.layers if layer.role == "weights")

    @property
    def projector(self) -> Layer | None:
        """The file that turns images into embeddings, if there is one."""
        return next((layer for layer in self.layers if layer.role == "projector"), None)

    @property
    def drafts(self) -> tuple[Layer, ...]:
        """The GGUF of the model that drafts for this one: all shards in order; none when there is none."""
        return tuple(layer for layer in self.layers if layer.role == "draft")

    @property
    def adapters(self) -> tuple[Layer, ...]:
        """The LoRA adapters, each with its scale, in the order in which they were named."""
        return tuple(layer for layer in self.layers if layer.role == "adapter")

    @property
    def size_bytes(self) -> int:
        """Bytes of all blobs, each counted once."""
        sizes = {layer.digest: layer.size_bytes for layer in (self.config, *self.layers)}
        return sum(sizes.values())

    def blob_digests(self) -> tuple[Digest, ...]:
        """Every blob that must be there, each once: config and layers, not the manifest itself."""
        return tuple(dict.fromkeys(layer.digest for layer in (self.config, *self.layers)))

    @classmethod
    def parse(cls, data: bytes, lm_config: bytes) -> Manifest:
        """Read a manifest and the ``lmd.json`` it names (:func:`lm_config_digest` finds which blob that is).

        Raises:
            InvalidRequest: when either is malformed, beyond the caps, or they do not belong together.
        """
        content = _load(data)
        config = _descriptor(content.get("config"))
        if config.media_type != CONFIG_TYPE:
            fail(_WHAT, "has a config of an unknown type")
        found = _layers(content)
        member = _member(found)
        if Digest.of(lm_config) != member.digest or len(lm_config) != member.size_bytes:
            fail(_WHAT, f"names another {MEMBER_NAME} than the one given")
        lm = LmConfig.parse(lm_config)
        return cls(data, config, _with_roles(found, lm), lm, MappingProxyType(_annotations(content)))


@dataclass(frozen=True, slots=True)
class BuiltManifest:
    """A manifest and the small blobs that were made for it; store *extra_blobs* before the manifest."""

    manifest: Manifest
    extra_blobs: tuple[bytes, ...]

    @property
    def manifest_bytes(self) -> bytes:
        """The manifest as stored."""
        return self.manifest.raw

    @property
    def digest(self) -> Digest:
        """The manifest's digest."""
        return self.manifest.digest


def lm_config_digest(data: bytes) -> Digest:
    """Find which blob of the manifest *data* is its ``lmd.json``. Raises InvalidRequest."""
    return _member(_layers(_load(data))).digest


def build_manifest(
    files: Sequence[FileLayer], lm: LmConfig, header: GgufHeader | Sequence[GgufHeader]
) -> BuiltManifest:
    """Make the manifest of a model; the same arguments always give the same bytes.

    *files* are the weights in the order of their shards, then others; *header* is that of the weights, or of each
    shard. The files of *lm* are replaced by *files*.

    Raises:
        InvalidRequest: when a file's name cannot be stored, or there are too many.
    """
    whole = header if isinstance(header, GgufHeader) else combine(header)
    for file in files:
        why = "is reserved" if file.filename == MEMBER_NAME else why_hostile(file.filename)
        if why:
            fail("filename", f"`{ascii(file.filename[:80])[1:-1]}` {why}")
    lm_bytes = replace(lm, files=tuple(FileEntry(f.digest, f.filename, f.role, f.scale) for f in files)).to_bytes()
    layers = [_layer_json(WEIGHT_TYPE, file.digest, file.size_bytes, file.filename) for file in files]
    layers.append(_layer_json(WEIGHT_CONFIG_TYPE, Digest.of(lm_bytes), len(lm_bytes), MEMBER_NAME))
    config = _config_json(whole, lm, [str(layer["digest"]) for layer in layers])
    content: dict[str, object] = {
        "schemaVersion": 2,
        "mediaType": MEDIA_TYPE,
        "artifactType": ARTIFACT_TYPE,
        "config": {"mediaType": CONFIG_TYPE, "digest": str(Digest.of(config)), "size": len(config)},
        "layers": layers,
    }
    # Parsing what was built costs little and means that nothing is ever stored which cannot be read back.
    return BuiltManifest(Manifest.parse(strict_json.dump(content), lm_bytes), (config, lm_bytes))


def _layer_json(media_type: str, digest: Digest, size_bytes: int, filename: str) -> dict[str, object]:
    annotations = {FILEPATH_ANNOTATION: filename, TITLE_ANNOTATION: filename}
    return {"mediaType": media_type, "digest": str(digest), "size": size_bytes, "annotations": annotations}


def _config_json(header: GgufHeader, lm: LmConfig, diff_ids: list[str]) -> bytes:
    descriptor = {
        "name": header.title,
        "family": header.architecture,
        "revision": lm.origin.commit,
        "licenses": [header.license] if header.license else [],
    }
    config = {
        "architecture": header.architecture,
        "format": "gguf",
        "paramSize": _size_name(header.parameter_count),
        "quantization": header.quantization,
    }
    content: dict[str, object] = {
        "descriptor": {key: value for key, value in descriptor.items() if value},
        "config": {key: value for key, value in config.items() if value},
        "modelfs": {"type": "layers", "diffIds": diff_ids},
    }
    return strict_json.dump(content)


def _size_name(count: int) -> str:
    for unit, name in ((10**9, "b"), (10**6, "m"), (10**3, "k")):
        if count >= unit:
            return f"{count / unit:.3g}{name}"
    return str(count)


def _load(data: bytes) -> dict[str, Json]:
    content = strict_json.load_object(data, _WHAT)
    # An index that is also a manifest means different things to different readers (CVE-2021-41190).
    if "manifests" in content:
        fail(_WHAT, "is an index, or claims to be both")
    version = content.get("schemaVersion")
    if version != 2 or isinstance(version, bool):
        fail(_WHAT, "does not have schemaVersion 2")
    if content.get("mediaType") != MEDIA_TYPE or content.get("artifactType") != ARTIFACT_TYPE:
        fail(_WHAT, f"is not of the types {MEDIA_TYPE} and {ARTIFACT_TYPE}")
    return content


def _layers(content: dict[str, Json]) -> list[Layer]:
    value = content.get("layers")
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_LAYERS:
        fail(_WHAT, f"does not have 1 to {MAX_LAYERS} layers")
    layers = [_descriptor(item) for item in value]
    sizes: dict[Digest, int] = {}
    for layer in layers:
        if layer.media_type not in LAYER_TYPES:
            fail(_WHAT, f"has a layer of the type `{layer.media_type[:100]}`; only raw model files are accepted")
        if sizes.setdefault(layer.digest, layer.size_bytes) != layer.size_bytes:
            fail(_WHAT, f"gives two sizes for {layer.digest}")
    return layers


def _member(layers: Sequence[Layer]) -> Layer:
    members = [layer for layer in layers if layer.filename == MEMBER_NAME and layer.media_type == WEIGHT_CONFIG_TYPE]
    if len(members) != 1:
        fail(_WHAT, f"does not have exactly one {MEMBER_NAME}")
    return members[0]


def _with_roles(layers: Sequence[Layer], lm: LmConfig) -> tuple[Layer, ...]:
    """Give each weight layer its role; one that ``lmd.json`` does not list is part of the weights."""
    entries = {entry.digest: entry for entry in lm.files}
    weights = {layer.digest for layer in layers if layer.media_type == WEIGHT_TYPE}
    if not set(entries) <= weights:
        fail(MEMBER_NAME, "lists a file that is no layer of the manifest")
    result = tuple(
        _with_role(layer, entries.get(layer.digest)) if layer.media_type == WEIGHT_TYPE else layer for layer in layers
    )
    if not any(layer.role == "weights" for layer in result):
        fail(_WHAT, "has no weights")
    return result


def _with_role(layer: Layer, entry: FileEntry | None) -> Layer:
    if entry is None:
        return replace(layer, role="weights")
    return replace(layer, role=entry.role, scale=entry.scale)


def _descriptor(value: Json) -> Layer:
    if not isinstance(value, dict):
        fail(_WHAT, "has a descriptor that is not an object")
    media_type, digest, size = value.get("mediaType"), value.get("digest"), value.get("size")
    if not isinstance(media_type, str) or not isinstance(digest, str):
        fail(_WHAT, "has a descriptor without type or digest")
    if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size <= MAX_BLOB_BYTES:
        fail(_WHAT, f"has a descriptor without a size from 0 to {MAX_BLOB_BYTES}")
    filename = _annotations(value).get(FILEPATH_ANNOTATION, "")
    if filename and (why := why_hostile(filename)):
        fail(_WHAT, f"has a file whose name {why}")
    return Layer(media_type, Digest.parse(digest), size, filename)


def _annotations(content: dict[str, Json]) -> dict[str, str]:
    value = content.get("annotations", {})
    if not isinstance(value, dict):
        fail(_WHAT, "has annotations that are not an object")
    texts = {key: text for key, text in value.items() if isinstance(text, str)}
    if len(texts) != len(value):
        fail(_WHAT, "has an annotation that is not text")
    return texts
