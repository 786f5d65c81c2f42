from __future__ import annotations

from pathlib import Path

import pytest

from lmd.registry.aliases import AliasTable
from lmd.registry.digest import Digest
from lmd.registry.errors import InvalidRequest
from lmd.registry.ref import HubRef, NameRef, parse_ref


@pytest.fixture(scope="module")
def table() -> AliasTable:
    return AliasTable.load()


def name(text: str) -> NameRef:
    ref = parse_ref(text)
    assert isinstance(ref, NameRef)
    return ref


@pytest.mark.parametrize(
    ("text", "repository"),
    [
        ("llama3", "hf.co/bartowski/Meta-Llama-3-8B-Instruct-GGUF:latest"),
        ("llama3:latest", "hf.co/bartowski/Meta-Llama-3-8B-Instruct-GGUF:latest"),
        ("Llama3:70B", "hf.co/bartowski/Meta-Llama-3-70B-Instruct-GGUF:latest"),
        ("phi3", "hf.co/microsoft/Phi-3-mini-4k-instruct-gguf:latest"),
        ("phi3:q4", "hf.co/microsoft/Phi-3-mini-4k-instruct-gguf:Q4"),
        ("phi2", "hf.co/MaziyarPanahi/phi-2-GGUF:latest"),
        ("mistral", "hf.co/bartowski/Mistral-7B-Instruct-v0.3-GGUF:latest"),
        ("qwen2.5:0.5b", "hf.co/bartowski/Qwen2.5-0.5B-Instruct-GGUF:latest"),
        ("qwen3.6:35b", "hf.co/lmstudio-community/Qwen3.6-35B-A3B-GGUF:latest"),
        ("deepseek-r1", "hf.co/bartowski/DeepSeek-R1-Distill-Qwen-7B-GGUF:latest"),
        ("llama3:8b-q8_0", "hf.co/bartowski/Meta-Llama-3-8B-Instruct-GGUF:Q8_0"),
        ("llama3:iq4_xs", "hf.co/bartowski/Meta-Llama-3-8B-Instruct-GGUF:IQ4_XS"),
        ("gemma4:e2b-bf16", "hf.co/bartowski/google_gemma-4-E2B-it-GGUF:BF16"),
    ],
)
def test_short_names_stand_for_repositories(table: AliasTable, text: str, repository: str) -> None:
    ref = table.resolve(name(text))
    assert ref is not None
    assert ref.name == repository


@pytest.mark.parametrize("text", ["nope", "llama3:9b", "me/llama3", "llama3:8b-instruct", "llama3:q"])
def test_other_names_stand_for_nothing(table: AliasTable, text: str) -> None:
    assert table.resolve(name(text)) is None


def test_the_asserted_digest_is_handed_on(table: AliasTable) -> None:
    digest = Digest.of(b"")
    ref = table.resolve(name(f"llama3@{digest}"))
    assert ref is not None
    assert ref.digest == digest


def test_every_short_name_has_a_default_and_resolves(table: AliasTable) -> None:
    assert len(table.names) >= 30
    for short in table.names:
        assert table.resolve(name(short)) == table.resolve(name(f"{short}:{table.tags(short)[0]}"))
        assert table.resolve(name(short)) is not None


@pytest.mark.parametrize(
    ("typed", "best"),
    [
        ("lama3", "llama3"),
        ("llama-3", "llama3"),
        ("tinylama", "tinyllama"),
        ("gpt-os", "gpt-oss"),
        ("llama3:9b", "llama3:8b"),
        ("LAMA3:latest", "llama3"),
        ("hf.co/test/storys", "hf.co/test/Stories"),
    ],
)
def test_suggestions(table: AliasTable, typed: str, best: str) -> None:
    found = table.suggest(typed, extra=["hf.co/test/Stories:latest", "mario:v2"])
    assert found[0] == best
    assert len(found) <= 3
    assert len(set(found)) == len(found)


def test_nothing_is_suggested_for_what_is_like_nothing(table: AliasTable) -> None:
    assert table.suggest("zzzzzzzz") == []
    assert table.suggest("") == []


def user_table(tmp_path: Path, text: str | bytes) -> AliasTable:
    path = tmp_path / "aliases.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return AliasTable.load(path)


def test_a_users_table_adds_replaces_and_removes(tmp_path: Path) -> None:
    table = user_table(
        tmp_path,
        """
        [mine]
        latest = "hf.co/me/My-GGUF:Q8_0"

        [llama3]
        default = "BIG"
        Big = "hf.co/me/big"
        small = "https://huggingface.co/me/small"

        [phi2]
        """,
    )
    assert table.resolve(name("mine")) == HubRef("me", "My-GGUF", "Q8_0")
    assert table.resolve(name("mine:q4_0")) == HubRef("me", "My-GGUF", "Q4_0")
    assert table.resolve(name("llama3")) == HubRef("me", "big")
    assert table.resolve(name("llama3:small")) == HubRef("me", "small")
    assert table.resolve(name("llama3:70b")) is None
    assert table.resolve(name("phi2")) is None
    assert table.resolve(name("phi3")) is not None


def test_a_users_file_need_not_exist(tmp_path: Path) -> None:
    assert AliasTable.load(tmp_path / "none.toml").names == AliasTable.load().names


@pytest.mark.parametrize(
    ("text", "line", "why"),
    [
        ("[a]\nx = 1", 2, "must name a repository"),
        ('[a]\nx = "llama3"', 2, "must name a repository"),
        ('\n[a]\n\nx = "hf.co/o"', 4, "must name a repository"),
        ("a = 1", 1, "must be a table"),
        ('[a.b]\nx = "hf.co/o/r"', 1, "table in a table"),
        ('# c\n\n[a]\nx = "hf.co/o/r"\ny = "hf.co/o/r"', 3, "one of its tags: x, y"),
        ('[a]\nx = "hf.co/o/r"\n"default" = "z"', 3, "one of its tags: x"),
        ('[a]\nx = "hf.co/o/r"\n\n[b', 4, "expected"),
        ('["a b"]\nx = "hf.co/o/r"', 1, "not a short name"),
        ('["o/../r"]\nx = "hf.co/o/r"', 1, "not a short name"),
        ('[a]\n"x y" = "hf.co/o/r"', 2, "not a tag"),
        (b"[a]\n\xff", 2, "UTF-8"),
    ],
)
def test_errors_in_a_users_file_name_file_and_line(tmp_path: Path, text: str | bytes, line: int, why: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        user_table(tmp_path, text)
    assert caught.value.message.startswith(f"{tmp_path / 'aliases.toml'}:{line}: ")
    assert why in caught.value.message


def test_a_users_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="cannot read"):
        AliasTable.load(tmp_path)


def test_a_users_file_has_a_size_limit(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="larger"):
        user_table(tmp_path, "#" * (1024**2 + 1))
