from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import pytest

from lmd.registry.create import build_from_files, create_model, gather_parts
from lmd.registry.digest import Digest
from lmd.registry.errors import BlobMissing, GgufInvalid, InvalidRef, InvalidRequest
from lmd.registry.lm_config import LmConfig, Message, Origin
from lmd.registry.manifest import FileLayer, Manifest
from lmd.registry.model_store import read_blob_header
from lmd.registry.modelfile import From, Modelfile, parse_modelfile
from lmd.registry.shards import in_shard_order
from tests.support.gguf_bytes import Tensor, TinyModel, Value, adapter, gguf
from tests.support.memory_store import MemoryStore, MemoryTag

TINY = TinyModel().to_bytes()
OTHER = TinyModel(fill=1).to_bytes()
PROJECTOR = gguf({"general.architecture": "clip", "general.type": "mmproj"}, [Tensor("v", (4,))])
ADAPTER = gguf({"general.architecture": "llama", "general.type": "adapter"}, [Tensor("a", (4,))])


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


def create(
    store: MemoryStore,
    text: str,
    *,
    name: str = "mine",
    files: Mapping[str, bytes] | None = None,
    base: MemoryTag | None = None,
) -> Manifest:
    digests = {path: store.add(data) for path, data in (files or {}).items()}
    tag = create_model(store, name, parse_modelfile(text), files=digests, base=base)
    return store.get_manifest(tag.manifest)


def pulled(
    store: MemoryStore, *, name: str = "hf.co/o/r:latest", data: bytes = TINY, lm: LmConfig | None = None
) -> MemoryTag:
    layer = FileLayer(store.add(data), len(data), "r-F32.gguf")
    return build_from_files(store, name, [layer], lm=lm or LmConfig(origin=Origin(name, "c" * 40)))


def shard(
    number: int, count: int, *, fill: int = 0, tensors: int = 0, tensor: str = "", architecture: str = ""
) -> bytes:
    """A file of a model that was split; *tensors* is what it says of the whole."""
    metadata: dict[str, Value] = {"split.no": number, "split.count": count}
    if number == 0:
        metadata |= {"general.architecture": "llama", "general.name": "Split"}
    if architecture:
        metadata["general.architecture"] = architecture
    if tensors:
        metadata["split.tensors.count"] = tensors
    return gguf(metadata, [Tensor(tensor or f"t{number}", (4,))], fill=fill)


def test_from_a_file(store: MemoryStore) -> None:
    manifest = create(
        store,
        """
        FROM ./models/tiny.gguf
        PARAMETER temperature 0.5
        PARAMETER stop <a>
        SYSTEM Be brief.
        TEMPLATE {{ messages }}
        LICENSE MIT
        MESSAGE user hi
        """,
        files={"./models/tiny.gguf": TINY},
    )
    (layer,) = manifest.files
    assert (layer.digest, layer.size_bytes, layer.filename, layer.role) == (
        Digest.of(TINY),
        len(TINY),
        "tiny.gguf",
        "weights",
    )
    assert manifest.lm.parameters == {"temperature": 0.5, "stop": ("<a>",)}
    assert (manifest.lm.system, manifest.lm.template, manifest.lm.licenses) == ("Be brief.", "{{ messages }}", ("MIT",))
    assert manifest.lm.messages == (Message("user", "hi"),)
    assert manifest.lm.origin == Origin()
    assert store.tags["mine:latest"].manifest == manifest.digest
    assert store.notes == ["create"]
    assert store.leases == []


def test_the_path_of_a_file_stays_with_the_user(store: MemoryStore) -> None:
    """Manifests are shared between users and pushed to registries; whose home a file lay in is nobody's business."""
    create(store, "FROM /home/someone/secret project/tiny.gguf", files={"/home/someone/secret project/tiny.gguf": TINY})
    assert not any(b"someone" in data or b"secret" in data for data in store.blobs.values())


def test_the_same_recipe_gives_the_same_manifest(store: MemoryStore) -> None:
    text = "FROM a.gguf\nSYSTEM x\nPARAMETER seed 1\nPARAMETER top_k 2"
    again = "PARAMETER top_k 2\nPARAMETER seed 1\nSYSTEM x\nFROM a.gguf"
    assert (
        create(store, text, files={"a.gguf": TINY}).digest
        == create(store, again, name="other", files={"a.gguf": TINY}).digest
    )
    assert (
        create(store, text + "\nPARAMETER seed 2", files={"a.gguf": TINY}).digest != store.tags["other:latest"].manifest
    )


def test_names_are_made_canonical(store: MemoryStore) -> None:
    create(store, "FROM a", name="Me/Mario:V2", files={"a": TINY})
    assert list(store.tags) == ["me/mario:v2"]


@pytest.mark.parametrize("name", ["hf.co/o/r", "https://h/x.gguf", "/a/x.gguf", f"x@{Digest.of(b'')}"])
def test_names_that_belong_to_sources_cannot_be_created(store: MemoryStore, name: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        create(store, "FROM a", name=name, files={"a": TINY})
    assert caught.value.metadata == {"field": "name"}
    assert store.tags == {}


def test_an_invalid_name(store: MemoryStore) -> None:
    with pytest.raises(InvalidRef):
        create(store, "FROM a", name="../x", files={"a": TINY})


BASE = LmConfig(
    template="base {{ x }}",
    system="base system",
    parameters={"temperature": 0.1, "top_k": 7, "stop": ("a",)},
    messages=(Message("user", "base"),),
    licenses=("base",),
    origin=Origin("hf.co/o/r:latest", "c" * 40),
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", BASE),
        ("SYSTEM new", LmConfig(system="new")),
        ('SYSTEM ""', LmConfig(system=None)),
        ("TEMPLATE {{ y }}", LmConfig(template="{{ y }}")),
        ('TEMPLATE ""', LmConfig(template=None)),
        ("PARAMETER top_k 9", LmConfig(parameters={"temperature": 0.1, "top_k": 9, "stop": ("a",)})),
        ("PARAMETER stop b", LmConfig(parameters={"temperature": 0.1, "top_k": 7, "stop": ("b",)})),
        ("MESSAGE assistant new", LmConfig(messages=(Message("assistant", "new"),))),
        ("LICENSE new", LmConfig(licenses=("base", "new"))),
        ("LICENSE base", LmConfig(licenses=("base",))),
    ],
)
def test_what_is_inherited_from_a_base(store: MemoryStore, text: str, expected: LmConfig) -> None:
    base = pulled(store, lm=BASE)
    lm = create(store, f"FROM hf.co/o/r\n{text}", base=base).lm
    word = text.partition(" ")[0]
    assert lm.system == (expected.system if word == "SYSTEM" else BASE.system)
    assert lm.template == (expected.template if word == "TEMPLATE" else BASE.template)
    assert lm.parameters == (expected.parameters if word == "PARAMETER" else BASE.parameters)
    assert lm.messages == (expected.messages if word == "MESSAGE" else BASE.messages)
    assert lm.licenses == (expected.licenses if word == "LICENSE" else BASE.licenses)
    assert lm.origin == BASE.origin


def test_from_a_model_alone_is_the_same_manifest(store: MemoryStore) -> None:
    base = pulled(store, lm=BASE)
    assert create(store, "FROM r", base=base).digest == base.manifest


def test_from_the_digest_of_a_manifest_takes_its_files_and_origin_alone(store: MemoryStore) -> None:
    base = pulled(store, lm=BASE)
    manifest = create(store, f"FROM {base.manifest}\nSYSTEM new")
    assert manifest.weights == store.get_manifest(base.manifest).weights
    assert (manifest.lm.system, manifest.lm.template, dict(manifest.lm.parameters)) == ("new", None, {})
    assert (manifest.lm.messages, manifest.lm.licenses, manifest.lm.origin) == ((), (), BASE.origin)


def test_from_the_digest_of_a_file(store: MemoryStore) -> None:
    digest = store.add(TINY)
    (layer,) = create(store, f"FROM {digest}").files
    assert (layer.digest, layer.filename) == (digest, f"{digest.short}.gguf")


def test_from_a_digest_that_is_not_here(store: MemoryStore) -> None:
    with pytest.raises(BlobMissing):
        create(store, f"FROM {Digest.of(b'nothing')}")
    assert store.tags == {}


def test_from_something_unknown(store: MemoryStore) -> None:
    with pytest.raises(InvalidRequest, match=r"FROM `nope\\x1b` is no file") as caught:
        create_model(store, "x", Modelfile((From("nope\x1b"),)))
    assert caught.value.metadata == {"field": "from"}
    assert caught.value.hint


def test_shards_in_any_order(store: MemoryStore) -> None:
    parts = [shard(number, 3) for number in (2, 0, 1)]
    layers = [
        FileLayer(store.add(part), len(part), f"m-{number}.gguf") for number, part in zip((3, 1, 2), parts, strict=True)
    ]
    manifest = store.get_manifest(build_from_files(store, "hf.co/o/r:latest", layers).manifest)
    assert [layer.filename for layer in manifest.weights] == ["m-1.gguf", "m-2.gguf", "m-3.gguf"]


@pytest.mark.parametrize(
    ("parts", "why"),
    [
        ([shard(0, 3), shard(1, 3)], "2 were given, but of the 3 files of the model, number 3 is missing"),
        (
            [shard(0, 9), shard(8, 9)],
            "2 were given, but of the 9 files of the model, numbers 2, 3, 4, 5, 6, … are missing",
        ),
        ([shard(1, 2)], "`0.gguf` is file 2 of 2, but of the 2 files of the model, number 1 is missing"),
        ([shard(0, 2), shard(0, 2, fill=1)], "`0.gguf` and `1.gguf` are both file 1 of 2"),
        ([shard(0, 2), shard(2, 2)], "`1.gguf` says that it is file 3 of 2"),
        ([TINY, OTHER], "`0.gguf` and `1.gguf` are both a whole model"),
        ([shard(0, 2), TINY], "`0.gguf` is file 1 of 2, `1.gguf` is a whole model; they are not of one model"),
        ([shard(0, 2), shard(1, 3)], "`0.gguf` is file 1 of 2, `1.gguf` is file 2 of 3; they are not of one model"),
        (
            [shard(0, 2), shard(1, 2, tensors=7)],
            "`1.gguf` is of a model of 7 tensors, but the 2 files have 2; they are not of one model",
        ),
        ([shard(0, 2), shard(1, 2, tensor="t0")], "`0.gguf` and `1.gguf` both have the tensor `t0`"),
        (
            [shard(0, 2), shard(1, 2, architecture="qwen2")],
            "`1.gguf` is of the architecture `qwen2`, `0.gguf` is of `llama`; they are not of one model",
        ),
        ([gguf({"general.architecture": "llama"})], "no tensors"),
        ([gguf({}, [Tensor("t", (4,))])], "architecture"),
    ],
)
def test_files_that_are_not_one_whole_model(store: MemoryStore, parts: Sequence[bytes], why: str) -> None:
    files = {f"{number}.gguf": data for number, data in enumerate(parts)}
    with pytest.raises(GgufInvalid, match=re.escape(why)):
        create(store, "\n".join(f"FROM {name}" for name in files), files=files)
    assert store.tags == {}
    assert store.leases == []


def test_no_weights_at_all() -> None:
    with pytest.raises(GgufInvalid, match="no file has a model's weights"):
        in_shard_order([], [])


def test_a_file_that_is_no_gguf(store: MemoryStore) -> None:
    with pytest.raises(GgufInvalid):
        create(store, "FROM a", files={"a": b"not a model" * 10})
    with pytest.raises(GgufInvalid):
        create(store, "FROM a", files={"a": TINY[:200]})


def test_an_adapter_is_no_model(store: MemoryStore) -> None:
    with pytest.raises(InvalidRequest, match="FROM `a` is an adapter, not a model"):
        create(store, "FROM a", files={"a": ADAPTER})
    layer = FileLayer(store.add(ADAPTER), len(ADAPTER), "a.gguf")
    with pytest.raises(GgufInvalid, match="not a model"):
        build_from_files(store, "a:latest", [layer])


def test_a_projector_beside_the_weights(store: MemoryStore) -> None:
    manifest = create(store, "FROM p.gguf\nFROM m.gguf", files={"p.gguf": PROJECTOR, "m.gguf": TINY})
    assert [layer.role for layer in manifest.files] == ["weights", "projector"]
    assert [layer.filename for layer in manifest.files] == ["m.gguf", "p.gguf"]


def test_a_projector_for_a_model_replaces_the_one_it_has(store: MemoryStore) -> None:
    base = pulled(store)
    with_one = create(store, "FROM r\nFROM p.gguf", files={"p.gguf": PROJECTOR}, base=base)
    other = PROJECTOR + b"\0"
    tag = store.tags["mine:latest"]
    with_other = create(store, "FROM p2.gguf\nFROM mine", files={"p2.gguf": other}, base=tag)
    assert with_one.projector is not None
    assert with_other.projector is not None
    assert with_other.projector.digest == Digest.of(other)
    assert len(with_other.files) == 2


def test_weights_pass_for_no_projector(store: MemoryStore) -> None:
    files = [FileLayer(store.add(data), len(data), f"{name}.gguf") for name, data in (("m", TINY), ("p", OTHER))]
    projector = FileLayer(files[1].digest, files[1].size_bytes, "p.gguf", "projector")
    with pytest.raises(GgufInvalid, match=r"`p\.gguf` is of the kind `model`, not a projector"):
        build_from_files(store, "x:latest", [files[0], projector])


def test_one_model_and_one_set_of_weights_at_most(store: MemoryStore) -> None:
    base = pulled(store)
    with pytest.raises(InvalidRequest, match="both a model and weights"):
        create(store, "FROM r\nFROM a", files={"a": OTHER}, base=base)
    with pytest.raises(InvalidRequest, match="one other model at most"):
        create(store, f"FROM r\nFROM {base.manifest}", base=base)


def test_building_needs_the_blobs(store: MemoryStore) -> None:
    gone = FileLayer(Digest.of(b"gone"), 4, "x.gguf")
    with pytest.raises(BlobMissing):
        build_from_files(store, "x:latest", [gone])


def test_headers_that_are_given_are_not_read_again(store: MemoryStore) -> None:
    tag = pulled(store)
    layer = store.get_manifest(tag.manifest).weights[0]
    header = read_blob_header(store, layer.digest)
    store.opened.clear()
    again = build_from_files(
        store,
        "x:latest",
        [FileLayer(layer.digest, layer.size_bytes, layer.filename)],
        lm=LmConfig(origin=Origin("hf.co/o/r:latest", "c" * 40)),
        headers=[header],
    )
    assert store.opened == []
    assert again.manifest == tag.manifest
    assert store.notes == ["pull", "pull"]


def test_texts_beyond_all_measure(store: MemoryStore) -> None:
    with pytest.raises(InvalidRequest, match="have 10000029 bytes together, most of them LICENSE; at most") as caught:
        create_model(store, "x", Modelfile((From(str(store.add(TINY))),), licenses=("x" * 10_000_000,)))
    assert caught.value.metadata == {"field": "license"}
    assert store.tags == {}
    first = create_model(store, "x", Modelfile((From(str(store.add(TINY))),), licenses=("x" * 3_000_000,)))
    with pytest.raises(InvalidRequest, match="most of them SYSTEM"):
        create_model(store, "x", Modelfile((From("x"),), system="y" * 4_000_000), base=first)
    assert store.tags["x:latest"] == first


def adapters_of(manifest: Manifest) -> list[tuple[str, float]]:
    return [(layer.filename, layer.scale) for layer in manifest.adapters]


def test_adapters_are_inherited_replaced_and_taken_away(store: MemoryStore) -> None:
    files = {"m.gguf": TINY, "a.gguf": adapter(fill=1), "b.gguf": adapter(fill=2)}
    plain = create(store, "FROM m.gguf", name="plain", files={"m.gguf": TINY})
    both = create(store, "FROM m.gguf\nADAPTER a.gguf 0.5\nADAPTER b.gguf", name="both", files=files)
    assert adapters_of(both) == [("a.gguf", 0.5), ("b.gguf", 1.0)]
    assert [layer.role for layer in both.files] == ["weights", "adapter", "adapter"]
    tag = store.tags["both:latest"]
    assert adapters_of(create(store, "FROM both\nSYSTEM x", base=tag)) == adapters_of(both)
    other = create(store, "FROM both\nADAPTER other.gguf -1", files={"other.gguf": adapter(fill=1)}, base=tag)
    assert adapters_of(other) == [("a.gguf", -1.0)], "a blob that the base has keeps its name"
    assert create(store, 'FROM both\nADAPTER ""', base=tag).digest == plain.digest
    assert adapters_of(create(store, f"FROM {both.digest}")) == []


def test_the_order_and_scale_of_adapters_are_part_of_the_model(store: MemoryStore) -> None:
    files = {"m": TINY, "a": adapter(fill=1), "b": adapter(fill=2)}
    recipes = ("ADAPTER a\nADAPTER b", "ADAPTER b\nADAPTER a", "ADAPTER a 2\nADAPTER b", "ADAPTER a 1.0\nADAPTER b 1")
    digests = [create(store, f"FROM m\n{lines}", files=files).digest for lines in recipes]
    assert len(set(digests)) == 3
    assert digests[0] == digests[3]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("FROM m\nADAPTER m", "ADAPTER `m` is of the kind `model`, not an adapter"),
        ("FROM m\nADAPTER a\nADAPTER again", "two adapters are the same file"),
        ("FROM m\nADAPTER none", "ADAPTER `none` is no file that is here"),
        ("FROM m\nPROJECTOR none", "PROJECTOR `none` is no file that is here"),
        ("FROM m\nFROM p\nPROJECTOR q", "one projector at most"),
        ("FROM a", "FROM `a` is an adapter, not a model"),
        ("FROM m\nQUANTIZE Q4_0", "QUANTIZE Q4_0: nothing is quantized here"),
    ],
)
def test_what_cannot_be_attached(store: MemoryStore, text: str, why: str) -> None:
    files = {"m": TINY, "a": adapter(fill=1), "again": adapter(fill=1), "p": PROJECTOR, "q": PROJECTOR + b"\0"}
    with pytest.raises(InvalidRequest, match=why):
        create(store, text, files=files)
    assert store.tags == {}


def test_a_projector_is_inherited_replaced_and_taken_away(store: MemoryStore) -> None:
    files = {"m": TINY, "p": PROJECTOR}
    seeing = create(store, "FROM m\nPROJECTOR p", name="seeing", files=files)
    assert seeing.digest == create(store, "FROM m\nFROM p", files=files).digest
    tag = store.tags["seeing:latest"]
    assert create(store, "FROM seeing", base=tag).projector == seeing.projector
    assert create(store, "FROM seeing\nPROJECTOR p2", files={"p2": PROJECTOR}, base=tag).digest == seeing.digest
    assert create(store, 'FROM seeing\nPROJECTOR ""', base=tag).projector is None


def test_a_folder_of_shards(store: MemoryStore) -> None:
    files = {f"./parts/m-{number + 1}.gguf": shard(number, 3) for number in (2, 0, 1)}
    expected = create(store, "\n".join(f"FROM {name}" for name in files), files=files).digest
    assert create(store, "FROM ./parts", files=files).digest == expected
    assert create(store, "FROM ./parts/", files=files).digest == expected


def test_the_parts_of_a_model_that_is_to_be_quantized(store: MemoryStore) -> None:
    files = {"m": store.add(TINY), "a": store.add(adapter(fill=1))}
    recipe = parse_modelfile("FROM m\nADAPTER a\nQUANTIZE Q4_0\nSYSTEM x")
    parts, lm = gather_parts(store, recipe, files=files)
    assert [(part.filename, part.role) for part in parts] == [("m", "weights"), ("a", "adapter")]
    assert lm.system == "x"


def test_what_a_model_requires_is_inherited(store: MemoryStore) -> None:
    base = create(store, "FROM m\nREQUIRES v0.14.0", name="base", files={"m": TINY})
    assert base.lm.requires == "0.14.0"
    tag = store.tags["base:latest"]
    assert create(store, "FROM base", base=tag).digest == base.digest
    assert create(store, "FROM base\nREQUIRES 0.20", base=tag).lm.requires == "0.20"


def test_texts_from_a_source_become_plain(store: MemoryStore) -> None:
    """Licences come with form feeds and Windows line ends, which a Modelfile cannot hold."""
    lm = LmConfig(system="a\r\nb\x1b[2J", licenses=("x\fy\rz", "\x00"), messages=(Message("user", "\x07"),))
    found = store.get_manifest(pulled(store, lm=lm).manifest).lm
    assert (found.system, found.licenses, found.messages) == ("a\nb[2J", ("xy\nz",), (Message("user", ""),))
