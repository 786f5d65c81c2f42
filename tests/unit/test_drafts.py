"""Which models can draft for which, and what a manifest says of them."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmd.registry.create import create_model
from lmd.registry.digest import Digest
from lmd.registry.drafting import TOKENS_KEY
from lmd.registry.errors import GgufInvalid, InvalidRequest
from lmd.registry.gguf import iter_strings
from lmd.registry.inspect import HeaderCache, model_info
from lmd.registry.manifest import Manifest
from lmd.registry.model_store import read_blob_header
from lmd.registry.modelfile import parse_modelfile
from tests.support.gguf_bytes import STRING, Tensor, TinyModel, Value, array, gguf
from tests.support.memory_store import MemoryStore, MemoryTag

TARGET = TinyModel().to_bytes()
DRAFT = TinyModel(fill=1).to_bytes()
TOKENS = [f"t{number}" for number in range(16)]


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


def create(
    store: MemoryStore,
    text: str,
    files: Mapping[str, bytes] | None = None,
    *,
    name: str = "mine",
    base: MemoryTag | None = None,
    draft: MemoryTag | None = None,
) -> Manifest:
    digests = {path: store.add(data) for path, data in (files or {}).items()}
    tag = create_model(store, name, parse_modelfile(text), files=digests, base=base, draft=draft)
    return store.get_manifest(tag.manifest)


def with_draft(store: MemoryStore, *, name: str = "mine") -> Manifest:
    return create(store, "FROM ./t.gguf\nDRAFT ./small.gguf", {"./t.gguf": TARGET, "./small.gguf": DRAFT}, name=name)


def with_tokens(tokens: list[str], fill: int = 1, **extra: Value) -> bytes:
    return TinyModel(extra={TOKENS_KEY: array(STRING, tokens), **extra}, fill=fill).to_bytes()


def refusal(store: MemoryStore, draft: bytes, target: bytes = TARGET) -> str:
    with pytest.raises(InvalidRequest) as caught:
        create(store, "FROM ./t.gguf\nDRAFT ./d.gguf", {"./t.gguf": target, "./d.gguf": draft})
    assert caught.value.metadata == {"field": "draft"}
    assert caught.value.hint
    assert store.tags == {}
    return caught.value.message


# What a manifest says


def test_a_file_becomes_a_draft(store: MemoryStore) -> None:
    manifest = with_draft(store)
    assert [(layer.role, layer.filename, layer.digest) for layer in manifest.files] == [
        ("weights", "t.gguf", Digest.of(TARGET)),
        ("draft", "small.gguf", Digest.of(DRAFT)),
    ]
    assert manifest.drafts == manifest.files[1:]
    assert Digest.of(DRAFT) in manifest.blob_digests(), "or it would be collected"


def test_a_model_gives_its_weights_and_nothing_else(store: MemoryStore) -> None:
    projector = gguf({"general.architecture": "clip"}, [Tensor("v", (4,))])
    create(store, "FROM ./s.gguf\nFROM ./p.gguf\nSYSTEM x", {"./s.gguf": DRAFT, "./p.gguf": projector}, name="small")
    small = store.tags["small:latest"]
    for text, draft in (("small", small), (str(small.manifest), None)):
        manifest = create(store, f"FROM ./t.gguf\nDRAFT {text}", {"./t.gguf": TARGET}, draft=draft)
        assert [(layer.role, layer.filename) for layer in manifest.files] == [
            ("weights", "t.gguf"),
            ("draft", "s.gguf"),
        ]
        assert manifest.lm.system is None


def test_what_a_base_has_is_inherited_replaced_or_removed(store: MemoryStore) -> None:
    first = with_draft(store)
    base = store.tags["mine:latest"]
    assert create(store, "FROM mine", base=base).digest == first.digest
    other = TinyModel(fill=2).to_bytes()
    replaced = create(store, "FROM mine\nDRAFT ./o.gguf", {"./o.gguf": other}, base=base)
    assert [layer.digest for layer in replaced.drafts] == [Digest.of(other)]
    removed = create(store, 'FROM mine\nDRAFT ""', base=base)
    assert removed.drafts == ()
    assert removed.weights == first.weights


def test_the_digest_of_a_model_stands_for_its_weights_without_the_draft(store: MemoryStore) -> None:
    first = with_draft(store)
    assert create(store, f"FROM {first.digest}").drafts == ()


def test_a_recipe_makes_the_same_manifest_again(store: MemoryStore) -> None:
    first = with_draft(store)
    recipe = model_info(store, store.tags["mine:latest"]).modelfile
    assert f"DRAFT {Digest.of(DRAFT)}\n" in recipe
    assert create(store, recipe, name="again").digest == first.digest


def test_shards_of_a_draft_in_any_order(store: MemoryStore) -> None:
    parts = []
    for number in range(2):
        extra: dict[str, Value] = {"split.no": number, "split.count": 2}
        parts.append(TinyModel(extra=extra, tensors=[Tensor(f"t{number}", (4,))]).to_bytes())
    text = "FROM ./t.gguf\nDRAFT ./2.gguf\nDRAFT ./1.gguf"
    manifest = create(store, text, {"./t.gguf": TARGET, "./1.gguf": parts[0], "./2.gguf": parts[1]})
    (draft,) = manifest.drafts
    assert draft.filename == "1.gguf"
    assert [tensor.name for tensor in read_blob_header(store, draft.digest).tensors] == ["t0", "t1"]
    recipe = model_info(store, store.tags["mine:latest"]).modelfile
    assert create(store, recipe).digest == manifest.digest
    with pytest.raises(
        GgufInvalid, match=r"`2\.gguf` is file 2 of 2, but of the 2 files of the model, number 1 is missing"
    ):
        create(store, "FROM ./t.gguf\nDRAFT ./2.gguf", {"./t.gguf": TARGET, "./2.gguf": parts[1]})


def test_the_header_of_a_draft_is_cached_like_others(store: MemoryStore) -> None:
    manifest = with_draft(store)
    cache = HeaderCache()
    digests = tuple(layer.digest for layer in manifest.drafts)
    assert cache.of_files(store, digests) is cache.of_files(store, digests)


# Which models draft for which


def test_the_architecture_may_differ(store: MemoryStore) -> None:
    draft = TinyModel(architecture="qwen2").to_bytes()
    assert create(store, "FROM ./t.gguf\nDRAFT ./d.gguf", {"./t.gguf": TARGET, "./d.gguf": draft}).drafts


def test_the_first_token_that_differs_is_named(store: MemoryStore) -> None:
    other = [*TOKENS[:3], "\x1bx", *TOKENS[4:]]
    assert refusal(store, with_tokens(other)) == (
        "the vocabularies differ: the draft has 16 tokens and the model 16, and token 3 is `\\x1bx` in the draft "
        "and `t3` in the model"
    )


@pytest.mark.parametrize("missing", ["draft", "model"])
def test_both_sizes_are_named(store: MemoryStore, missing: str) -> None:
    longer = with_tokens([*TOKENS, "more"])
    message = refusal(store, TARGET, longer) if missing == "draft" else refusal(store, longer)
    assert f"token 16 is {'missing' if missing == 'draft' else '`more`'} in the draft" in message
    assert "17" in message
    assert "16 tokens" in message or "model 16" in message


def test_padding_at_the_end_makes_no_difference(store: MemoryStore) -> None:
    """Qwen 2.5's models of 0.5 and of 7 billion parameters have one tokenizer, padded to different sizes."""
    padded = with_tokens([*TOKENS, "[PAD16]", "[PAD17]"])
    assert create(store, "FROM ./t.gguf\nDRAFT ./d.gguf", {"./t.gguf": TARGET, "./d.gguf": padded}).drafts
    assert create(store, "FROM ./t.gguf\nDRAFT ./d.gguf", {"./t.gguf": padded, "./d.gguf": TARGET}).drafts


def test_special_tokens_must_agree_where_both_headers_have_them(store: MemoryStore) -> None:
    def model(fill: int, **ids: int) -> bytes:
        return with_tokens(TOKENS, fill, **{f"tokenizer.ggml.{name}_token_id": number for name, number in ids.items()})

    assert (
        refusal(store, model(1, eos=2), model(0, eos=3)) == "the EOS token of the draft is 2, and that of the model 3"
    )
    assert (
        refusal(store, model(1, bos=2), model(0, bos=1)) == "the BOS token of the draft is 2, and that of the model 1"
    )
    files = {"./t.gguf": model(0, bos=1, eos=2), "./d.gguf": model(1, bos=1)}
    assert create(store, "FROM ./t.gguf\nDRAFT ./d.gguf", files).drafts


def test_what_cannot_draft(store: MemoryStore) -> None:
    assert "only embeds (architecture `bert`)" in refusal(store, TinyModel(architecture="bert").to_bytes())
    assert "the model only embeds" in refusal(store, DRAFT, TinyModel(architecture="bert").to_bytes())
    recurrent = TinyModel(architecture="mamba", extra={"mamba.ssm.state_size": 16}).to_bytes()
    assert "cannot take a token back" in refusal(store, recurrent)
    assert refusal(store, TARGET) == "DRAFT names the model itself"
    assert "DRAFT `gone` is no file and no model" in _missing(store)
    nameless = gguf({"general.architecture": "llama"}, [Tensor("t", (4,))])
    other = gguf({"general.architecture": "llama"}, [Tensor("u", (4,))])
    assert "list of tokens" in refusal(store, other, nameless)


def _missing(store: MemoryStore) -> str:
    with pytest.raises(InvalidRequest) as caught:
        create(store, "FROM ./t.gguf\nDRAFT gone", {"./t.gguf": TARGET})
    return caught.value.message


@pytest.mark.parametrize("kind", ["adapter", "mmproj"])
def test_a_draft_is_a_whole_model(store: MemoryStore, kind: str) -> None:
    draft = TinyModel(extra={"general.type": kind}).to_bytes()
    with pytest.raises(GgufInvalid, match=f"is of the kind `{kind}`, not a model"):
        create(store, "FROM ./t.gguf\nDRAFT ./d.gguf", {"./t.gguf": TARGET, "./d.gguf": draft})


# Reading tokens


@given(st.lists(st.text(st.characters(codec="utf-8"), max_size=8), max_size=2000))
def test_all_strings_of_an_array_are_read(items: list[str]) -> None:
    store = MemoryStore()
    digest = store.add(gguf({"a": "before", "long": [1] * 2000, TOKENS_KEY: array(STRING, items), "z": "after"}))
    with store.open_blob(digest) as file:
        found = list(iter_strings(file, store.blob_size(digest), TOKENS_KEY))
    assert found == [item.encode() for item in items]


def test_reading_strings_trusts_no_number() -> None:
    store = MemoryStore()
    for bad in (array(STRING, ["a"], length=2**62), array(STRING, ["a", "b"], length=3)):
        digest = store.add(gguf({TOKENS_KEY: bad}))
        with store.open_blob(digest) as file, pytest.raises(GgufInvalid):
            list(iter_strings(file, store.blob_size(digest), TOKENS_KEY))
    digest = store.add(gguf({TOKENS_KEY: [1, 2]}))
    with store.open_blob(digest) as file:
        assert list(iter_strings(file, store.blob_size(digest), TOKENS_KEY)) == []
