"""Small models for tests of the store: the store looks at digests and sizes only, so the weights may be any bytes."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmd.registry.digest import Digest
from lmd.registry.store import Store

OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
ARTIFACT_TYPE = "application/vnd.cncf.model.manifest.v1+json"
CONFIG_TYPE = "application/vnd.cncf.model.config.v1+json"
WEIGHT_TYPE = "application/vnd.cncf.model.weight.v1.raw"
WEIGHT_CONFIG_TYPE = "application/vnd.cncf.model.weight.config.v1.raw"


class FakeClock:
    """A clock that stands still until it is told to move."""

    def __init__(self, now: float = 2_000_000_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


@dataclass(frozen=True)
class ModelBytes:
    """Everything that makes up a model, outside any store."""

    manifest: bytes
    blobs: tuple[bytes, ...]

    @property
    def digest(self) -> Digest:
        return Digest.of(self.manifest)

    @property
    def blob_digests(self) -> list[Digest]:
        return [Digest.of(blob) for blob in self.blobs]


def descriptor(media_type: str, data: bytes, path: str | None = None) -> dict[str, Any]:
    made: dict[str, Any] = {"mediaType": media_type, "digest": str(Digest.of(data)), "size": len(data)}
    if path:
        made["annotations"] = {"org.cncf.model.filepath": path}
    return made


def make_model(*weights: bytes, config: bytes = b"{}", lm: bytes = b'{"system": null}') -> ModelBytes:
    manifest = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "artifactType": ARTIFACT_TYPE,
        "config": descriptor(CONFIG_TYPE, config),
        "layers": [
            *(descriptor(WEIGHT_TYPE, data, f"{number}.gguf") for number, data in enumerate(weights)),
            descriptor(WEIGHT_CONFIG_TYPE, lm, "lmd.json"),
        ],
    }
    return ModelBytes(json.dumps(manifest).encode(), (*weights, config, lm))


def put_model(store: Store, model: ModelBytes) -> Digest:
    for blob in model.blobs:
        store.put_bytes(blob)
    return store.put_manifest(model.manifest)


def blob_file(root: Path, digest: Digest) -> Path:
    return root / "blobs" / "sha256" / digest.hex


def assert_store_is_right(root: Path, store: Store) -> None:
    """Check what is always promised: blobs hash to their names, names lead to whole models, the view says the same."""
    for path in (root / "blobs" / "sha256").iterdir():
        assert hashlib.sha256(path.read_bytes()).hexdigest() == path.name
    tags = {tag.name: tag.manifest for tag in store.list_tags()}
    for manifest in tags.values():
        content = json.loads(blob_file(root, manifest).read_bytes())
        for each in [content["config"], *content["layers"]]:
            assert blob_file(root, Digest.parse(each["digest"])).stat().st_size == each["size"]
    index = json.loads((root / "index.json").read_bytes())
    assert json.loads((root / "oci-layout").read_bytes()) == {"imageLayoutVersion": "1.0.0"}
    assert index["schemaVersion"] == 2
    view = {each["annotations"]["org.opencontainers.image.ref.name"]: each for each in index["manifests"]}
    assert {name: each["digest"] for name, each in view.items()} == {name: str(each) for name, each in tags.items()}
    for each in view.values():
        assert blob_file(root, Digest.parse(each["digest"])).stat().st_size == each["size"]
    assert not list((root / "ingest").glob("tmp-*"))
