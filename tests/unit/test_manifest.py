from __future__ import annotations

import io
import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmd.registry import strict_json
from lmd.registry.digest import Digest
from lmd.registry.errors import InvalidRequest
from lmd.registry.gguf import GgufHeader, TensorInfo, read_header
from lmd.registry.lm_config import FileEntry, LmConfig, Message, Origin
from lmd.registry.manifest import BuiltManifest, FileLayer, Manifest, build_manifest, lm_config_digest
from tests.support.gguf_bytes import TinyModel

TINY = TinyModel().to_bytes()
WEIGHTS = FileLayer(Digest.of(TINY), len(TINY), "sub/tiny-F32.gguf")
LM = LmConfig(
    template="{{ x }}",
    system="Be brief.",
    parameters={"temperature": 0.5, "stop": ("<a>", "b"), "num_ctx": 512, "use_mmap": False},
    messages=(Message("user", "hi"), Message("assistant", "ho")),
    licenses=("MIT",),
    origin=Origin("hf.co/o/r:F32", "c" * 40),
)


def header() -> GgufHeader:
    return read_header(io.BytesIO(TINY), len(TINY))


def build(lm: LmConfig = LM, *files: FileLayer) -> BuiltManifest:
    return build_manifest(files or (WEIGHTS,), lm, header())


def test_a_manifest_is_a_modelpack_artifact() -> None:
    built = build()
    content = json.loads(built.manifest_bytes)
    assert content["schemaVersion"] == 2
    assert content["mediaType"] == "application/vnd.oci.image.manifest.v1+json"
    assert content["artifactType"] == "application/vnd.cncf.model.manifest.v1+json"
    assert content["config"]["mediaType"] == "application/vnd.cncf.model.config.v1+json"
    assert [layer["mediaType"] for layer in content["layers"]] == [
        "application/vnd.cncf.model.weight.v1.raw",
        "application/vnd.cncf.model.weight.config.v1.raw",
    ]
    assert [layer["annotations"]["org.cncf.model.filepath"] for layer in content["layers"]] == [
        "sub/tiny-F32.gguf",
        "lmd.json",
    ]
    config, lm = built.extra_blobs
    assert content["config"]["digest"] == str(Digest.of(config))
    assert content["layers"][1] | {"annotations": 0} == {
        "annotations": 0,
        "digest": str(Digest.of(lm)),
        "mediaType": "application/vnd.cncf.model.weight.config.v1.raw",
        "size": len(lm),
    }
    assert json.loads(config) == {
        "descriptor": {"name": "Tiny", "family": "llama", "revision": "c" * 40},
        "config": {"architecture": "llama", "format": "gguf", "paramSize": "1.57k", "quantization": "F32"},
        "modelfs": {"type": "layers", "diffIds": [layer["digest"] for layer in content["layers"]]},
    }


def test_what_is_built_reads_back() -> None:
    built = build()
    manifest = Manifest.parse(built.manifest_bytes, built.extra_blobs[1])
    assert manifest == built.manifest
    assert manifest.digest == built.digest == Digest.of(built.manifest_bytes)
    assert manifest.to_bytes() == built.manifest_bytes
    assert manifest.weights[0].digest == WEIGHTS.digest
    assert manifest.weights[0].filename == "sub/tiny-F32.gguf"
    assert manifest.lm.files == (FileEntry(WEIGHTS.digest, "sub/tiny-F32.gguf", "weights"),)
    assert (manifest.lm.template, manifest.lm.system, manifest.lm.origin) == (LM.template, LM.system, LM.origin)
    assert (manifest.lm.parameters, manifest.lm.messages, manifest.lm.licenses) == (
        LM.parameters,
        LM.messages,
        LM.licenses,
    )
    assert lm_config_digest(built.manifest_bytes) == Digest.of(built.extra_blobs[1])
    assert manifest.size_bytes == len(TINY) + sum(len(blob) for blob in built.extra_blobs)
    assert set(manifest.blob_digests()) == {WEIGHTS.digest, *(Digest.of(blob) for blob in built.extra_blobs)}


def test_the_same_input_gives_the_same_bytes_and_any_change_another_digest() -> None:
    same = LmConfig(
        template=LM.template,
        system=LM.system,
        parameters=dict(reversed(list(LM.parameters.items()))),
        messages=LM.messages,
        licenses=LM.licenses,
        origin=LM.origin,
    )
    assert build(same).manifest_bytes == build().manifest_bytes
    variants = [
        LmConfig(),
        LmConfig(system="a"),
        LmConfig(template="a"),
        LmConfig(parameters={"seed": 1}),
        LmConfig(messages=(Message("user", "a"),)),
        LmConfig(licenses=("a",)),
        LmConfig(origin=Origin("a")),
    ]
    assert len({build(lm).digest for lm in variants}) == len(variants)
    assert build(LmConfig(), FileLayer(WEIGHTS.digest, len(TINY), "other.gguf")).digest != build(LmConfig()).digest


def test_roles_of_several_files() -> None:
    files = (
        FileLayer(Digest.of(b"1"), 1, "m-00001-of-00002.gguf"),
        FileLayer(Digest.of(b"2"), 2, "m-00002-of-00002.gguf"),
        FileLayer(Digest.of(b"p"), 3, "mmproj.gguf", "projector"),
    )
    manifest = build(LmConfig(), *files).manifest
    assert [layer.size_bytes for layer in manifest.weights] == [1, 2]
    assert manifest.projector is not None
    assert manifest.projector.filename == "mmproj.gguf"
    assert [layer.role for layer in manifest.files] == ["weights", "weights", "projector"]


def test_a_blob_that_is_there_twice_counts_once() -> None:
    twice = (FileLayer(WEIGHTS.digest, len(TINY), "a.gguf"), FileLayer(WEIGHTS.digest, len(TINY), "b.gguf"))
    manifest = build(LmConfig(), *twice).manifest
    assert len(manifest.blob_digests()) == 3
    assert manifest.size_bytes < 2 * len(TINY) + 2000


@pytest.mark.parametrize("name", ["../x.gguf", "lmd.json", "", "a\nb", "/x"])
def test_file_names_that_cannot_be_stored(name: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        build(LmConfig(), FileLayer(Digest.of(b""), 0, name))
    assert caught.value.message.isprintable()


Change = Callable[[dict[str, Any]], object]


def changed(change: Change) -> bytes:
    content = json.loads(build().manifest_bytes)
    change(content)
    return json.dumps(content).encode()


REFUSED: list[tuple[Change, str]] = [
    (lambda c: c.update(schemaVersion=1), "schemaVersion"),
    (lambda c: c.update(schemaVersion=True), "schemaVersion"),
    (lambda c: c.update(schemaVersion=2.5), "schemaVersion"),
    (lambda c: c.pop("mediaType"), "not of the types"),
    (lambda c: c.update(artifactType="application/x"), "not of the types"),
    (lambda c: c.update(manifests=[]), "claims to be both"),
    (lambda c: c.pop("layers"), "1 to 256 layers"),
    (lambda c: c.update(layers=[]), "1 to 256 layers"),
    (lambda c: c.update(layers=c["layers"] * 129), "1 to 256 layers"),
    (lambda c: c.update(layers={}), "1 to 256 layers"),
    (lambda c: c["layers"].append(5), "not an object"),
    (lambda c: c.pop("config"), "not an object"),
    (lambda c: c["config"].update(mediaType="x"), "config of an unknown type"),
    (lambda c: c["layers"][0].update(mediaType="application/vnd.cncf.model.weight.v1.tar"), "only raw"),
    (lambda c: c["layers"][0].update(digest="sha256:" + "../" * 21 + "a"), "not a digest"),
    (lambda c: c["layers"][0].update(digest=5), "without type or digest"),
    (lambda c: c["layers"][0].update(size=-1), "without a size"),
    (lambda c: c["layers"][0].update(size=2**53 + 1), "without a size"),
    (lambda c: c["layers"][0].update(size=1.0), "without a size"),
    (lambda c: c["layers"][0].update(size=True), "without a size"),
    (lambda c: c["layers"][0].update(annotations=[]), "annotations"),
    (lambda c: c["layers"][0].update(annotations={"a": 1}), "annotation that is not text"),
    (lambda c: c["layers"][0]["annotations"].update({"org.cncf.model.filepath": "../x"}), "whose name"),
    (lambda c: c["layers"].append(c["layers"][0] | {"size": 1}), "two sizes"),
    (lambda c: c["layers"].append(c["layers"][1]), "exactly one lmd.json"),
    (lambda c: c["layers"].pop(), "exactly one lmd.json"),
    (lambda c: c["layers"].pop(0), "no layer of the manifest"),
    (lambda c: c["layers"][1].update(size=1), "another lmd.json"),
    (lambda c: c.update(annotations={"a": ["b"]}), "annotation"),
]


@pytest.mark.parametrize(("change", "why"), REFUSED, ids=[f"{number}-{why}" for number, (_, why) in enumerate(REFUSED)])
def test_manifests_that_are_refused(change: Change, why: str) -> None:
    with pytest.raises(InvalidRequest, match=why):
        Manifest.parse(changed(change), build().extra_blobs[1])


def test_another_lmd_json_than_the_manifest_names() -> None:
    with pytest.raises(InvalidRequest, match="names another"):
        Manifest.parse(build().manifest_bytes, LmConfig().to_bytes())


def test_a_manifest_without_weights() -> None:
    lm = LmConfig(files=(FileEntry(WEIGHTS.digest, "x.gguf", "projector"),)).to_bytes()

    def change(content: dict[str, Any]) -> None:
        content["layers"][1].update(digest=str(Digest.of(lm)), size=len(lm))

    with pytest.raises(InvalidRequest, match="no weights"):
        Manifest.parse(changed(change), lm)


def test_weights_that_lmd_json_does_not_list_are_weights() -> None:
    lm = LmConfig().to_bytes()

    def change(content: dict[str, Any]) -> None:
        content["layers"][1].update(digest=str(Digest.of(lm)), size=len(lm))

    assert Manifest.parse(changed(change), lm).weights[0].digest == WEIGHTS.digest


def test_unknown_keys_are_ignored_and_the_bytes_are_kept() -> None:
    """Somebody else's manifest keeps its digest, whatever order or spaces it was written with."""
    data = changed(lambda content: content.update({"subject": {}, "annotations": {"a": "b"}}))
    manifest = Manifest.parse(data, build().extra_blobs[1])
    assert manifest.digest == Digest.of(data)
    assert manifest.annotations == {"a": "b"}


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "does not parse"),
        (b"\xff", "does not parse"),
        (b"[]", "not an object"),
        (b"5", "not an object"),
        (b'{"a":1,"a":2}', "there twice"),
        (b'{"a":NaN}', "no JSON number"),
        (b'{"a":-Infinity}', "no JSON number"),
        (b'{"a":1e999}', "beyond what a double holds"),
        (b'{"a":%d}' % 2**63, "64 bits"),
        (b'{"a":' + b"9" * 5000 + b"}", "does not parse"),
        (b'{"a":"\\ud800"}', "not Unicode"),
        (b'{"\\udfff":1}', "not Unicode"),
        (b'{"a":' * 17 + b"1" + b"}" * 17, "levels deep"),
        (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "does not parse|levels deep"),
        (b'{"a":[' + b"1," * 70_000 + b"1]}", "more than 65536"),
        (b'"' + b"x" * 2**22 + b'"', "at most"),
    ],
)
def test_json_that_is_refused(data: bytes, why: str) -> None:
    with pytest.raises(InvalidRequest, match=why) as caught:
        strict_json.load_object(data, "it")
    assert caught.value.metadata == {"field": "it"}
    with pytest.raises(InvalidRequest):
        Manifest.parse(data, b"{}")
    with pytest.raises(InvalidRequest):
        LmConfig.parse(data)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(max_size=8), children, max_size=4),
    max_leaves=12,
)
KEYS = st.sampled_from(
    ["schemaVersion", "mediaType", "artifactType", "config", "layers", "manifests", "annotations", "digest", "size"]
)


@given(st.one_of(JSON, st.dictionaries(KEYS, JSON)))
def test_arbitrary_json_is_a_manifest_or_a_typed_error(value: object) -> None:
    data = json.dumps(value).encode()
    for parse in (lm_config_digest, LmConfig.parse, lambda data: Manifest.parse(data, b"{}")):
        with pytest.raises(InvalidRequest):
            parse(data)


@given(st.lists(st.one_of(st.just(0), st.just(1), KEYS), min_size=1, max_size=4), JSON)
def test_a_manifest_with_one_value_replaced_is_a_manifest_or_a_typed_error(
    path: list[str | int], value: object
) -> None:
    content = json.loads(build().manifest_bytes)
    place: Any = content
    for step in path[:-1]:
        inner = place.get(step) if isinstance(place, dict) else place[step] if isinstance(step, int) else None
        place = inner if isinstance(inner, dict) or (isinstance(inner, list) and len(inner) > 1) else place
    if isinstance(place, dict) or isinstance(path[-1], int):
        place[path[-1]] = value
    try:
        manifest = Manifest.parse(json.dumps(content).encode(), build().extra_blobs[1])
    except InvalidRequest:
        return
    assert manifest.weights


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
CONFIGS = st.builds(
    LmConfig,
    template=st.one_of(st.none(), TEXT.filter(bool)),
    system=st.one_of(st.none(), TEXT.filter(bool)),
    parameters=st.fixed_dictionaries(
        {},
        optional={
            "temperature": st.floats(0, 100),
            "num_ctx": st.integers(8, 2**20),
            "use_mmap": st.booleans(),
            "stop": st.lists(TEXT.filter(bool), min_size=1, max_size=3).map(tuple),
        },
    ),
    messages=st.lists(
        st.builds(Message, st.sampled_from(["system", "user", "assistant", "tool"]), TEXT), max_size=3
    ).map(tuple),
    licenses=st.lists(TEXT, max_size=2).map(tuple),
    files=st.just((FileEntry(Digest.of(b""), "a/b.gguf", "weights"),)),
    origin=st.builds(Origin, TEXT, TEXT),
)


@given(CONFIGS)
def test_lmd_json_and_back(config: LmConfig) -> None:
    assert LmConfig.parse(config.to_bytes()) == config


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ({}, "version"),
        ({"version": 3}, "version"),
        ({"version": True}, "version"),
        ({"version": "1"}, "version"),
        ({"version": 1, "system": 5}, "system"),
        ({"version": 1, "messages": {}}, "messages"),
        ({"version": 1, "messages": [{"role": "robot", "content": ""}]}, "role"),
        ({"version": 1, "messages": [{"role": "user"}]}, "messages"),
        ({"version": 1, "licenses": [5]}, "licenses"),
        ({"version": 1, "origin": []}, "origin"),
        ({"version": 1, "parameters": {"temperature": 1000}}, "temperature"),
        ({"version": 1, "parameters": {"nope": 1}}, "nope"),
        ({"version": 1, "files": [{"digest": "x"}]}, "digest"),
        ({"version": 1, "files": [{"digest": str(Digest.of(b"")), "filename": "../x", "role": "weights"}]}, "name"),
        ({"version": 1, "files": [{"digest": str(Digest.of(b"")), "filename": "x", "role": "boss"}]}, "role"),
        ({"version": 1, "files": [{}] * 257}, "at most 256"),
        ({"version": 1, "requires": 5}, "requires"),
        *(
            (
                {
                    "version": 2,
                    "files": [{"digest": str(Digest.of(b"")), "filename": "x", "role": "adapter", "scale": s}],
                },
                "scale",
            )
            for s in (True, "1", None, 1000, -100.5)
        ),
    ],
)
def test_lmd_json_that_is_refused(content: dict[str, object], why: str) -> None:
    with pytest.raises(InvalidRequest, match=why):
        LmConfig.parse(json.dumps(content).encode())


def test_keys_of_a_later_minor_change_are_ignored() -> None:
    assert LmConfig.parse(b'{"version":1,"shiny":true}') == LmConfig()


@pytest.mark.parametrize(
    ("count", "name"), [(999, "999"), (8_030_261_312, "8.03b"), (494_032_768, "494m"), (1_100_048_384, "1.1b")]
)
def test_sizes_in_words(count: int, name: str) -> None:
    sized = GgufHeader(3, 32, {}, (TensorInfo("t", (count,), "F32", 0, 0),), 0, 0)
    config = json.loads(build_manifest((WEIGHTS,), LM, sized).extra_blobs[0])
    assert config["config"]["paramSize"] == name
