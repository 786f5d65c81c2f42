"""The derived OCI view: ``oci-layout`` and ``index.json``, for OCI tools to read and for us to rebuild the index from.

The tags are descriptors of their manifests with annotations: the name, and when it was modified and pulled. Source of
the format: OCI image layout specification 1.1.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from lmd.registry.digest import Digest
from lmd.registry.errors import InvalidRequest
from lmd.registry.store.descriptors import ManifestFacts
from lmd.registry.store.durable import replace_file
from lmd.registry.store.layout import Layout
from lmd.registry.store.records import TagRecord

log = logging.getLogger(__name__)

OCI_INDEX = "application/vnd.oci.image.index.v1+json"
NAME_ANNOTATION = "org.opencontainers.image.ref.name"
MODIFIED_ANNOTATION = "lmd.modified-at"
PULLED_ANNOTATION = "lmd.pulled-at"
LAYOUT_CONTENT = b'{"imageLayoutVersion": "1.0.0"}\n'
VIEW_MAX_BYTES = 64 << 20


def render(tags: list[TagRecord], described: Mapping[Digest, ManifestFacts]) -> bytes:
    """Write ``index.json``: the same tags give the same bytes."""
    manifests = []
    for tag in sorted(tags, key=lambda tag: tag.name.lower()):
        found = described.get(tag.manifest)
        if found is None:
            continue
        descriptor: dict[str, Any] = {
            "mediaType": found.media_type,
            "digest": str(tag.manifest),
            "size": found.size_bytes,
            "annotations": {
                NAME_ANNOTATION: tag.name,
                MODIFIED_ANNOTATION: repr(tag.modified_at),
                PULLED_ANNOTATION: repr(tag.pulled_at),
            },
        }
        if found.artifact_type:
            descriptor["artifactType"] = found.artifact_type
        manifests.append(descriptor)
    content = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": manifests}
    return json.dumps(content, indent=1, ensure_ascii=True).encode() + b"\n"


def parse(data: bytes) -> list[TagRecord] | None:
    """Read the tags back, leaving out what makes no sense; None when *data* is no index at all."""
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        return None
    if not isinstance(content, dict) or not isinstance(content.get("manifests"), list):
        return None
    tags = []
    for descriptor in content["manifests"]:
        try:
            annotations = descriptor["annotations"]
            tag = TagRecord(
                check_name(str(annotations[NAME_ANNOTATION])),
                Digest.parse(descriptor["digest"]),
                _seconds(annotations.get(MODIFIED_ANNOTATION)),
                _seconds(annotations.get(PULLED_ANNOTATION)),
            )
        except (InvalidRequest, KeyError, TypeError, AttributeError, ValueError) as error:
            log.warning("index.json has an entry that is no tag: %s", error)
            continue
        tags.append(tag)
    return tags


def check_name(name: str) -> str:
    """Return *name* if the store can hold a tag of that name; what a name may be is said by the grammar of refs.

    Raises: InvalidRequest.
    """
    if not 0 < len(name) <= 512 or not name.isascii() or not name.isprintable():
        raise InvalidRequest("a name has 1 to 512 printable ASCII characters", field="name")
    return name


def read(layout: Layout) -> bytes | None:
    """Read ``index.json`` as it is on the disk; None when it is not there or unreasonable."""
    with suppress(OSError), layout.index_json.open("rb") as file:
        data = file.read(VIEW_MAX_BYTES + 1)
        return data if len(data) <= VIEW_MAX_BYTES else None
    return None


def refresh(layout: Layout, content: bytes) -> None:
    """Write the view where it differs from *content*; atomic and durable. Raises: OSError."""
    if _differs(layout.oci_layout, LAYOUT_CONTENT):
        replace_file(layout.oci_layout, LAYOUT_CONTENT, layout.temporary())
    if _differs(layout.index_json, content):
        replace_file(layout.index_json, content, layout.temporary())


def _differs(path: Path, content: bytes) -> bool:
    try:
        if path.stat().st_size != len(content):
            return True
        return path.read_bytes() != content
    except OSError:
        return True


def _seconds(text: object) -> float:
    if text is None:
        return 0.0
    seconds = float(str(text))
    if not math.isfinite(seconds) or seconds < 0:
        raise ValueError(f"`{seconds}` is no time")
    return seconds
