from __future__ import annotations

import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmd.registry.capabilities import capabilities
from lmd.registry.create import build_from_files, create_model
from lmd.registry.digest import Digest
from lmd.registry.errors import BlobMissing
from lmd.registry.gguf import GgufHeader
from lmd.registry.inspect import HeaderCache, ModelFacts, model_info
from lmd.registry.lm_config import LmConfig, Message, Origin
from lmd.registry.manifest import FileLayer
from lmd.registry.model_store import read_blob_header
from lmd.registry.modelfile import parse_modelfile
from tests.support.gguf_bytes import Tensor, TinyModel, Value, gguf
from tests.support.memory_store import MemoryStore, MemoryTag
from tests.support.shared_models import STORIES

CHAT = "{% for m in messages %}{{ m.content }}{% endfor %}"
PROJECTOR = gguf({"general.architecture": "clip"}, [Tensor("v", (4,))])
ORIGIN = Origin("hf.co/o/r:Q4_K_M", "c" * 40)


def pulled(
    store: MemoryStore,
    lm: LmConfig | None = None,
    data: bytes = b"",
    *,
    projector: bool = False,
    name: str = "r:latest",
) -> MemoryTag:
    data = data or TinyModel().to_bytes()
    files = [FileLayer(store.add(data), len(data), "sub/r-F32.gguf")]
    if projector:
        files.append(FileLayer(store.add(PROJECTOR), len(PROJECTOR), "mmproj.gguf", "projector"))
    return build_from_files(store, name, files, lm=lm or LmConfig(origin=ORIGIN))


def facts(**metadata: Value) -> ModelFacts:
    store = MemoryStore()
    return model_info(store, pulled(store, data=TinyModel(extra=metadata).to_bytes()))


def test_all_facts() -> None:
    store = MemoryStore()
    lm = LmConfig(
        system="Be brief.",
        parameters={"seed": 1},
        messages=(Message("user", "hi"),),
        licenses=("Apache-2.0",),
        origin=ORIGIN,
    )
    extra: dict[str, Value] = {"tokenizer.chat_template": CHAT, "general.file_type": 0, "general.license": "MIT"}
    tag = pulled(store, lm, TinyModel(extra=extra).to_bytes(), projector=True)
    found = model_info(store, tag)
    manifest = store.get_manifest(tag.manifest)
    assert (found.name, found.digest, found.size_bytes) == ("r:latest", tag.manifest, manifest.size_bytes)
    assert (found.modified_at, found.pulled_at) == (tag.modified_at, tag.pulled_at)
    assert (found.architecture, found.title, found.quantization) == ("llama", "Tiny", "F32")
    assert found.parameter_count == 32 * 16 + 32 * 32 + 32
    assert (found.context_length, found.embedding_length, found.block_count, found.vocabulary_size) == (256, 32, 1, 16)
    assert found.capabilities == ("completion", "chat", "vision")
    assert (found.template, found.system) == (CHAT, "Be brief.")
    assert (found.parameters, found.messages, found.licenses) == ({"seed": 1}, lm.messages, ("Apache-2.0",))
    assert found.origin == ORIGIN
    assert [(layer.role, layer.filename) for layer in found.files] == [
        ("weights", "sub/r-F32.gguf"),
        ("projector", "mmproj.gguf"),
    ]
    assert found.metadata["llama.context_length"] == "256"
    assert "tokenizer.chat_template" not in found.metadata


def test_a_model_that_says_nothing_of_itself() -> None:
    found = facts()
    assert (found.template, found.system, found.licenses) == ("", "", ())
    assert found.capabilities == ("completion",)


def test_the_licence_of_the_header_is_the_last_resort() -> None:
    assert facts(**{"general.license": "MIT"}).licenses == ("MIT",)


def test_the_manifests_template_wins_over_the_headers() -> None:
    store = MemoryStore()
    data = TinyModel(extra={"tokenizer.chat_template": CHAT}).to_bytes()
    tag = pulled(store, LmConfig(template="{{ tools }}"), data)
    found = model_info(store, tag)
    assert found.template == "{{ tools }}"
    assert "tools" in found.capabilities


TEMPLATE, TOOL_TEMPLATE = "tokenizer.chat_template", "tokenizer.chat_template.tool_use"
TOKENS = "tokenizer.ggml.tokens"
QWEN_FIM = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")
DEEPSEEK_FIM = ("<\uff5cfim\u2581begin\uff5c>", "<\uff5cfim\u2581hole\uff5c>", "<\uff5cfim\u2581end\uff5c>")
# More than a header keeps, and than are read at once.
MANY_TOKENS = [f"token {number} {'x' * 60}" for number in range(20_000)]


def fim_ids(*names: str) -> dict[str, Value]:
    return {f"tokenizer.ggml.{name}_token_id": number for number, name in enumerate(names)}


@pytest.mark.parametrize(
    ("architecture", "extra", "template", "projector", "expected"),
    [
        ("llama", {}, None, False, ("completion",)),
        ("llama", {}, CHAT, False, ("completion", "chat")),
        ("llama", {}, CHAT + "{{ tools }}", False, ("completion", "chat", "tools")),
        ("llama", {}, CHAT + "<think>", False, ("completion", "chat", "thinking")),
        ("llama", {}, None, True, ("completion", "vision")),
        # A template that shows earlier calls need not tell of functions, nor does one that only speaks of tools.
        ("llama", {}, CHAT + "{% if message.tool_calls %}{% endif %}", False, ("completion", "chat")),
        ("llama", {}, CHAT + "{{ 'no tools' }}{# tools #} tools", False, ("completion", "chat")),
        ("llama", {}, CHAT + "{%- if tools is not none %}{% endif %}", False, ("completion", "chat", "tools")),
        ("llama", {}, CHAT + "{% if enable_thinking %}{% endif %}", False, ("completion", "chat", "thinking")),
        ("llama", {}, CHAT + "{{ reasoning_effort }}", False, ("completion", "chat", "thinking")),
        ("llama", {}, CHAT + "{{ '[THINK]' }}", False, ("completion", "chat", "thinking")),
        ("llama", {}, CHAT + "{{ 'I was thinking' }}", False, ("completion", "chat")),
        ("llama", {TEMPLATE: CHAT, TOOL_TEMPLATE: "x"}, CHAT, False, ("completion", "chat", "tools")),
        ("llama", {TEMPLATE: "y", TOOL_TEMPLATE: "x"}, CHAT, False, ("completion", "chat")),
        ("llama", {}, "{{ .Prompt }}", False, ("completion", "chat")),
        ("llama", {}, "{{ range .Tools }}{{ end }}", False, ("completion", "chat", "tools")),
        ("llama", {}, "{{ range .Messages }}{{ .ToolCalls }} tools{{ end }}", False, ("completion", "chat")),
        ("llama", {}, "{{ range .Messages }}{{ .Thinking }}{{ end }}", False, ("completion", "chat", "thinking")),
        ("llama", {}, "{{ if $.Think }}{{ end }}", False, ("completion", "chat", "thinking")),
        ("llama", {}, "{{ .Prompt }}<think>", False, ("completion", "chat", "thinking")),
        ("llama", {}, "{{ .Prompt }}{{ .Suffix }}", False, ("completion", "chat", "insert")),
        ("qwen2", fim_ids("fim_pre", "fim_suf", "fim_mid"), None, False, ("completion", "insert")),
        ("qwen2", fim_ids("fim_pre", "fim_suf"), None, False, ("completion",)),
        ("llama", fim_ids("prefix", "suffix", "middle"), None, False, ("completion", "insert")),
        ("llama", fim_ids("prefix", "suffix", "fim_mid"), None, False, ("completion", "insert")),
        ("qwen2", {TOKENS: ["a", *QWEN_FIM]}, None, False, ("completion", "insert")),
        ("qwen2", {TOKENS: ["a", *QWEN_FIM[1:]]}, None, False, ("completion",)),
        ("qwen2", {TOKENS: [*MANY_TOKENS, *QWEN_FIM]}, None, False, ("completion", "insert")),
        ("qwen2", {TOKENS: [*MANY_TOKENS, *QWEN_FIM[:2]]}, None, False, ("completion",)),
        ("qwen2", {TOKENS: [*MANY_TOKENS, "x".join(QWEN_FIM)]}, None, False, ("completion",)),
        (
            "qwen2",
            {TOKENS: MANY_TOKENS, "general.description": "".join(QWEN_FIM)},
            None,
            False,
            ("completion",),
        ),
        (
            "deepseek2",
            {TOKENS: [*MANY_TOKENS, *DEEPSEEK_FIM]},
            None,
            False,
            ("completion", "insert"),
        ),
        ("bert", {}, CHAT, False, ("embedding",)),
        ("qwen3", {"qwen3.pooling_type": 3}, CHAT, False, ("embedding",)),
        ("qwen3", {"qwen3.pooling_type": 4}, CHAT, False, ("rerank",)),
        ("bert", {"bert.pooling_type": 4}, None, False, ("rerank",)),
        ("qwen3", {"qwen3.pooling_type": 0}, CHAT, False, ("completion", "chat")),
    ],
)
def test_capabilities(
    architecture: str, extra: dict[str, Value], template: str | None, projector: bool, expected: tuple[str, ...]
) -> None:
    store = MemoryStore()
    digest = store.add(TinyModel(architecture, extra).to_bytes())
    assert capabilities(read_blob_header(store, digest), template, has_projector=projector) == expected


def test_shards_are_described_as_one() -> None:
    store = MemoryStore()
    files = []
    for number in range(2):
        metadata: dict[str, Value] = {"split.no": number, "split.count": 2}
        data = gguf(metadata | ({"general.architecture": "llama"} if number == 0 else {}), [Tensor(f"t{number}", (8,))])
        files.append(FileLayer(store.add(data), len(data), f"m-{number}.gguf"))
    found = model_info(store, build_from_files(store, "m:latest", files))
    assert (found.parameter_count, found.architecture) == (16, "llama")


def recreated(store: MemoryStore, tag: MemoryTag) -> Digest:
    """Feed what `show --modelfile` prints to `create`, the way a user does."""
    text = model_info(store, tag).modelfile
    return create_model(store, "copy", parse_modelfile(text), base=tag).manifest


@pytest.mark.parametrize(
    "lm",
    [
        LmConfig(),
        LmConfig(origin=ORIGIN),
        LmConfig(template=CHAT, system='Say """hi""".\n', origin=ORIGIN),
        LmConfig(parameters={"stop": ("\n", '"', "a b"), "temperature": 0.1, "use_mmap": False}),
        LmConfig(messages=(Message("user", ""), Message("assistant", "two\nlines")), licenses=("MIT", "a\nb")),
    ],
)
@pytest.mark.parametrize("projector", [False, True])
def test_the_modelfile_recreates_the_manifest(lm: LmConfig, projector: bool) -> None:
    store = MemoryStore()
    tag = pulled(store, lm, projector=projector)
    assert recreated(store, tag) == tag.manifest


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@settings(max_examples=60)
@given(
    st.builds(
        LmConfig,
        system=st.one_of(st.none(), TEXT),
        template=st.one_of(st.none(), st.text(alphabet='a" \n', max_size=8)),
        parameters=st.fixed_dictionaries(
            {},
            optional={
                "temperature": st.floats(0, 100),
                "seed": st.integers(-1, 2**63 - 1),
                "stop": st.lists(TEXT.filter(bool), min_size=1, max_size=2).map(tuple),
            },
        ),
        messages=st.lists(st.builds(Message, st.sampled_from(["system", "user"]), TEXT), max_size=2).map(tuple),
        licenses=st.lists(TEXT, max_size=2, unique=True).map(tuple),
        origin=st.sampled_from([Origin(), ORIGIN]),
    )
)
def test_any_modelfile_recreates_its_manifest(lm: LmConfig) -> None:
    store = MemoryStore()
    tag = pulled(store, lm)
    assert recreated(store, tag) == tag.manifest


def test_a_model_made_from_another_does_not_inherit_twice() -> None:
    """Taking a line out of the printed Modelfile takes it out of the model, though the base has it."""
    store = MemoryStore()
    base = pulled(store, LmConfig(parameters={"seed": 1}, system="base", licenses=("MIT",)), name="base:latest")
    child = create_model(store, "child", parse_modelfile("FROM base\nPARAMETER top_k 5"), base=base)
    text = model_info(store, child).modelfile
    assert recreated(store, child) == child.manifest
    edited = "\n".join(line for line in text.splitlines() if "seed" not in line and "SYSTEM" not in line)
    lm = store.get_manifest(create_model(store, "edited", parse_modelfile(edited)).manifest).lm
    assert (dict(lm.parameters), lm.system, lm.licenses) == ({"top_k": 5}, None, ("MIT",))


def test_the_modelfile_of_a_plain_pull() -> None:
    store = MemoryStore()
    tag = pulled(store)
    assert model_info(store, tag).modelfile == (
        "# Makes `r:latest` again, from the files in this store.\n"
        "# On another machine, replace the digest: FROM hf.co/o/r:Q4_K_M\n"
        f"FROM {tag.manifest}\n"
    )


@pytest.mark.parametrize(
    "lm",
    [
        LmConfig(parameters={"stop": ("\r",)}),
        LmConfig(template="{{ .System }}{{ end }}"),
        LmConfig(messages=(Message("tool", "{}"),)),
        LmConfig(system='a"""\nb"'),
    ],
)
def test_a_manifest_that_no_modelfile_can_hold_still_recreates(lm: LmConfig) -> None:
    store = MemoryStore()
    tag = pulled(store, lm)
    found = model_info(store, tag)
    assert "cannot be written in a Modelfile" in found.modelfile
    assert recreated(store, tag) == tag.manifest


def test_headers_are_read_once() -> None:
    store = MemoryStore()
    tag = pulled(store)
    cache = HeaderCache()
    store.opened.clear()
    first = model_info(store, tag, cache)
    assert model_info(store, tag, cache) == first
    assert len(store.opened) == 1


def test_the_cache_forgets_the_least_recently_used() -> None:
    store = MemoryStore()
    tags = [pulled(store, data=TinyModel(fill=n).to_bytes(), name=f"m{n}:latest") for n in range(3)]
    cache = HeaderCache(capacity=2)
    manifests = [store.get_manifest(tag.manifest) for tag in tags]
    for number in (0, 1, 0, 2):
        cache.get(store, manifests[number])
    store.opened.clear()
    cache.get(store, manifests[0])
    assert store.opened == []
    cache.get(store, manifests[1])
    assert len(store.opened) == 1


def test_the_cache_is_thread_safe() -> None:
    store = MemoryStore()
    tags = [pulled(store, data=TinyModel(fill=n).to_bytes(), name=f"m{n}:latest") for n in range(8)]
    manifests = [store.get_manifest(tag.manifest) for tag in tags]
    cache = HeaderCache(capacity=3)
    found: list[GgufHeader] = []

    def read() -> None:
        for _ in range(20):
            found.extend(cache.get(store, manifest) for manifest in manifests)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 * 20 * 8
    assert all(header.title == "Tiny" for header in found)


def test_weights_that_are_gone() -> None:
    store = MemoryStore()
    tag = pulled(store)
    del store.blobs[store.get_manifest(tag.manifest).weights[0].digest]
    with pytest.raises(BlobMissing):
        model_info(store, tag)


def test_a_real_model() -> None:
    store = MemoryStore()
    found = model_info(store, pulled(store, data=STORIES.read_bytes()))
    assert (found.architecture, found.quantization, found.parameter_count) == ("llama", "F32", 292800)
    assert (found.context_length, found.vocabulary_size, found.licenses) == (512, 512, ("MIT",))
    assert found.capabilities == ("completion",)
