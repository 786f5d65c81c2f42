"""What the store itself needs to know of a manifest: the blobs it refers to.

Everything else in a manifest is read by `lmd.registry.manifest`. Source of the format: OCI image specification 1.1,
"Image Manifest" and "Content Descriptors".
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lmd.registry.digest import Digest
from lmd.registry.errors import InvalidRequest

MANIFEST_MAX_BYTES = 4 << 20
DESCRIPTORS_MAX = 1024
SIZE_MAX_BYTES = 1 << 53
OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
FILEPATH_ANNOTATION = "org.cncf.model.filepath"
LM_CONFIG_PATH = "lmd.json"


@dataclass(frozen=True, slots=True)
class ManifestFacts:
    """A manifest's own size and types, the sizes of its blobs, and which of them is ``lmd.json``."""

    size_bytes: int
    media_type: str
    artifact_type: str
    blobs: Mapping[Digest, int]
    lm_config: Digest | None = None


def read_manifest_facts(data: bytes) -> ManifestFacts:
    """Extract the descriptors of the manifest *data*, trusting nothing in it.

    Raises: InvalidRequest.
    """
    if len(data) > MANIFEST_MAX_BYTES:
        raise _invalid(f"has {len(data)} bytes, more than {MANIFEST_MAX_BYTES}")
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise _invalid("is not JSON") from error
    if not isinstance(content, dict):
        raise _invalid("is not a JSON object")
    if "manifests" in content:
        raise _invalid("is an index, or pretends to be both")
    if content.get("schemaVersion") != 2:
        raise _invalid("does not have schemaVersion 2")
    layers = content.get("layers")
    if not isinstance(layers, list) or len(layers) >= DESCRIPTORS_MAX:
        raise _invalid(f"does not have a list of fewer than {DESCRIPTORS_MAX} layers")
    blobs: dict[Digest, int] = {}
    lm_config = None
    for position, descriptor in enumerate([content.get("config"), *layers]):
        digest, size_bytes = _read_descriptor(descriptor)
        if blobs.setdefault(digest, size_bytes) != size_bytes:
            raise _invalid(f"gives two sizes for {digest}")
        annotations = descriptor.get("annotations")
        if position > 0 and isinstance(annotations, dict) and annotations.get(FILEPATH_ANNOTATION) == LM_CONFIG_PATH:
            lm_config = digest
    return ManifestFacts(
        len(data),
        _text(content, "mediaType", OCI_MANIFEST),
        _text(content, "artifactType", ""),
        blobs,
        lm_config,
    )


def _read_descriptor(descriptor: Any) -> tuple[Digest, int]:
    if not isinstance(descriptor, dict):
        raise _invalid("has a descriptor that is not an object")
    digest, size_bytes = descriptor.get("digest"), descriptor.get("size")
    if not isinstance(digest, str):
        raise _invalid("has a descriptor without a digest")
    if type(size_bytes) is not int or not 0 <= size_bytes <= SIZE_MAX_BYTES:
        raise _invalid(f"has a descriptor without a size from 0 to {SIZE_MAX_BYTES}")
    return Digest.parse(digest), size_bytes


def _text(content: dict[str, Any], key: str, default: str) -> str:
    value = content.get(key, default)
    if not isinstance(value, str) or len(value) > 255:
        raise _invalid(f"has a `{key}` that is not a short text")
    return value


def _invalid(why: str) -> InvalidRequest:
    return InvalidRequest(f"the manifest {why}", field="manifest")
