from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmd.registry.errors import SourceError, SourceInvalid, SourceNotFound
from lmd.registry.filenames import plain_basename, why_hostile
from lmd.registry.quant import Choice, RepoFile, check_name, choose_files


def repo(*names: str) -> list[RepoFile]:
    return [RepoFile(name, 1000 + number) for number, name in enumerate(names)]


def chosen(names: Sequence[str], selector: str | None = None) -> str:
    return choose_files(repo(*names), selector, ref="hf.co/o/r").weights[0].name


def shards(prefix: str, count: int) -> list[str]:
    return [f"{prefix}-{number:05d}-of-{count:05d}.gguf" for number in range(1, count + 1)]


BARTOWSKI = [
    ".gitattributes",
    "README.md",
    "M-IQ2_M.gguf",
    "M-Q4_K_L.gguf",
    "M-Q4_K_M.gguf",
    "M-Q4_K_S.gguf",
    "M-Q8_0.gguf",
    "M-bf16.gguf",
    "M-f16.gguf",
    "M.imatrix.gguf",
    "mmproj-M-f16.gguf",
]
PHI3 = ["README.md", "Phi-3-mini-4k-instruct-fp16.gguf", "Phi-3-mini-4k-instruct-q4.gguf"]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (BARTOWSKI, "M-Q4_K_M.gguf"),
        (PHI3, "Phi-3-mini-4k-instruct-q4.gguf"),
        (["a-q4_k_m.gguf", "b-Q8_0.gguf"], "a-q4_k_m.gguf"),
        (["m-F16.gguf", "m-Q8_0.gguf"], "m-Q8_0.gguf"),
        (["m-F16.gguf", "m-q8.gguf"], "m-q8.gguf"),
        (["m-Q5_K_M.gguf", "m-F16.gguf"], "m-Q5_K_M.gguf"),
        (["stories260K.gguf"], "stories260K.gguf"),
        (["model_Q4_K_M.gguf", "model_Q8_0.gguf"], "model_Q4_K_M.gguf"),
        (["a.Q8_0.gguf", "a.Q4_K_M.gguf"], "a.Q4_K_M.gguf"),
        (["MTP-x.gguf", "mtp-x-Q4_K_M.gguf", "eagle3-x.gguf", "dflash-x.gguf", "dspark-x.gguf", "x.gguf"], "x.gguf"),
        (["m-UD-Q4_K_XL.gguf", "m-Q4_K_M.gguf"], "m-Q4_K_M.gguf"),
        (["Q8_0/m.gguf", "Q4_K_M/m.gguf"], "Q4_K_M/m.gguf"),
        (["m.GGUF"], "m.GGUF"),
    ],
)
def test_the_default_choice(names: list[str], expected: str) -> None:
    assert chosen(names) == expected


@pytest.mark.parametrize(
    ("names", "selector", "expected"),
    [
        (BARTOWSKI, "Q4_K_S", "M-Q4_K_S.gguf"),
        (BARTOWSKI, "q4_k_m", "M-Q4_K_M.gguf"),
        # llama.cpp's `F16[.-]` finds bf16 first.
        (BARTOWSKI, "F16", "M-f16.gguf"),
        (BARTOWSKI, "bf16", "M-bf16.gguf"),
        (BARTOWSKI, "M-IQ2_M.gguf", "M-IQ2_M.gguf"),
        (BARTOWSKI, "m-iq2_m.GGUF", "M-IQ2_M.gguf"),
        (PHI3, "q4", "Phi-3-mini-4k-instruct-q4.gguf"),
        (PHI3, "FP16", "Phi-3-mini-4k-instruct-fp16.gguf"),
        (["m-UD-Q4_K_XL.gguf", "m-Q4_K_M.gguf"], "UD-Q4_K_XL", "m-UD-Q4_K_XL.gguf"),
        (["m-UD-Q4_K_XL.gguf", "m-Q4_K_M.gguf"], "Q4_K_XL", "m-UD-Q4_K_XL.gguf"),
        (["a/m.gguf", "b/m.gguf"], "b/m.gguf", "b/m.gguf"),
        (["a/m.gguf", "b/m.gguf"], "m.gguf", "a/m.gguf"),
        (["Q8_0/m.gguf", "Q4_K_M/m.gguf"], "Q8_0", "Q8_0/m.gguf"),
        (["m-Q4_K_M-imat.gguf"], "Q4_K_M", "m-Q4_K_M-imat.gguf"),
    ],
)
def test_a_selector(names: list[str], selector: str, expected: str) -> None:
    assert chosen(names, selector) == expected


@pytest.mark.parametrize(
    ("names", "selector"),
    [
        (BARTOWSKI, "Q4_K"),
        (BARTOWSKI, "K_M"),
        (BARTOWSKI, "Q2_K"),
        (BARTOWSKI, "4_K_M"),
        (BARTOWSKI, ".*"),
        (BARTOWSKI, "none.gguf"),
        (BARTOWSKI, "imatrix"),
        (BARTOWSKI, "mmproj-M-f16.gguf"),
        (PHI3, "Q4_K_M"),
        (["m-Q4_K_M_L.gguf"], "Q4_K_M"),
    ],
)
def test_a_selector_that_nothing_answers_to_lists_what_there_is(names: list[str], selector: str) -> None:
    with pytest.raises(SourceNotFound) as caught:
        choose_files(repo(*names), selector, ref="hf.co/o/r")
    assert f"`{selector}`" in caught.value.message
    assert caught.value.metadata == {"ref": "hf.co/o/r"}
    assert caught.value.hint.startswith("it has: ")


def test_labels_are_listed_once_and_sorted() -> None:
    with pytest.raises(SourceNotFound) as caught:
        choose_files(repo("b-Q8_0.gguf", "a-Q4_K_M.gguf", "c-Q8_0.gguf", "plain.gguf"), "Q2_K")
    assert caught.value.hint == "it has: Q4_K_M, Q8_0, plain.gguf"


def test_a_repository_without_models() -> None:
    with pytest.raises(SourceNotFound, match="no GGUF model"):
        choose_files(repo("README.md", "model.safetensors", "mmproj-x.gguf"), None)
    with pytest.raises(SourceNotFound):
        choose_files([], None)


def test_the_choice_says_what_it_left() -> None:
    choice = choose_files(repo(*BARTOWSKI), "Q8_0")
    assert choice.label == "Q8_0"
    assert choice.others == (
        "M-IQ2_M.gguf",
        "M-Q4_K_L.gguf",
        "M-Q4_K_M.gguf",
        "M-Q4_K_S.gguf",
        "M-bf16.gguf",
        "M-f16.gguf",
    )
    assert choice.projector == RepoFile("mmproj-M-f16.gguf", 1010)
    assert choose_files(repo("stories260K.gguf"), None) == Choice(tuple(repo("stories260K.gguf")), None, "", ())


def test_shards_come_in_order_whatever_the_listing() -> None:
    names = shards("q/M-Q4_K_M", 4)
    choice = choose_files(repo(*reversed(names), "M-Q8_0.gguf"), None)
    assert [file.name for file in choice.weights] == names
    assert choice.label == "Q4_K_M"
    assert choice.others == ("M-Q8_0.gguf",)


@pytest.mark.parametrize("selector", ["Q8_0", "M-Q8_0-00002-of-00003.gguf", "x/M-Q8_0-00001-of-00003.gguf"])
def test_any_shard_stands_for_all(selector: str) -> None:
    names = shards("x/M-Q8_0", 3)
    assert [file.name for file in choose_files(repo("M-Q4_K_M.gguf", *names), selector).weights] == names


@pytest.mark.parametrize(
    ("names", "why"),
    [
        (shards("m", 3)[1:], "shard 1 of 3 is missing"),
        (shards("m", 3)[:2], "shard 3 of 3 is missing"),
        ([shards("m", 3)[0], shards("m", 3)[2]], "shard 2 of 3 is missing"),
        ([*shards("m", 2), "m-00003-of-00002.gguf"], "beyond 2"),
        (["m-00000-of-00001.gguf"], "shard 1 of 1 is missing"),
        (["m-00001-of-99999.gguf"], "at most 1024"),
    ],
)
def test_incomplete_shards_are_refused(names: list[str], why: str) -> None:
    with pytest.raises(SourceInvalid, match=why):
        choose_files(repo(*names), None)


def test_sets_with_different_counts_are_different_models() -> None:
    names = [*shards("m-Q4_K_M", 2), *shards("m-Q4_K_M", 3)]
    assert len(choose_files(repo(*names), None).weights) == 2


def test_an_incomplete_set_that_was_not_asked_for_does_no_harm() -> None:
    assert chosen([*shards("m-Q8_0", 3)[1:], "m-Q4_K_M.gguf"]) == "m-Q4_K_M.gguf"


def test_a_count_of_zero_is_no_shard() -> None:
    assert chosen(["m-00001-of-00000.gguf"]) == "m-00001-of-00000.gguf"


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["m-Q8_0.gguf", "mmproj-f16.gguf", "mmproj-Q8_0.gguf"], "mmproj-Q8_0.gguf"),
        (["m-F16.gguf", "mmproj-f16.gguf", "mmproj-Q8_0.gguf"], "mmproj-f16.gguf"),
        (["a/m-Q8_0.gguf", "mmproj-Q8_0.gguf", "a/mmproj-f16.gguf"], "a/mmproj-f16.gguf"),
        (["a/m-Q8_0.gguf", "mmproj-f16.gguf"], "mmproj-f16.gguf"),
        (["a/m-Q8_0.gguf", "b/mmproj-f16.gguf"], None),
        (["m.gguf", "mmproj.txt"], None),
    ],
)
def test_the_projector(names: list[str], expected: str | None) -> None:
    projector = choose_files(repo(*names), None).projector
    assert (projector.name if projector else None) == expected


HOSTILE = [
    "../../etc/passwd",
    "/etc/passwd",
    "a/../b.gguf",
    "a//b.gguf",
    "a/./b.gguf",
    "a\\b.gguf",
    "a\0b.gguf",
    "a\nb.gguf",
    "a\x1b[2Jb.gguf",
    "a\u202eb.gguf",
    "a\u200bb.gguf",
    "a\ud800.gguf",
    "%2e%2e/b.gguf",
    "a%2fb.gguf",
    "a%2F..%2Fb.gguf",
    "a%5cb.gguf",
    "a%00.gguf",
    "",
    "x" * 256,
    "a/" * 600 + "b",
    "a/",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_are_refused_before_anything_else(name: str) -> None:
    with pytest.raises(SourceInvalid) as caught:
        choose_files([*repo("m-Q4_K_M.gguf"), RepoFile(name, 1)], None, ref="hf.co/o/r")
    assert caught.value.message.isprintable()
    assert caught.value.message.isascii()


@pytest.mark.parametrize(
    "name", ["a b.gguf", "größe.gguf", "a/b-1.2+x(1).gguf", "100%.gguf", "a%20b.gguf", "..a", "a..b"]
)
def test_unusual_names_are_not_hostile(name: str) -> None:
    check_name(name)
    assert why_hostile(name) == ""


@given(st.text(max_size=60))
def test_a_basename_is_always_plain(path: str) -> None:
    base = plain_basename(path)
    assert why_hostile(base) == ""
    assert "/" not in base


NAMES = st.lists(
    st.one_of(
        st.text(max_size=12),
        st.from_regex(r"([a-c]/)?m[-._](Q4_K_M|q8|F16|mmproj)?(-0000[0-3]-of-0000[0-3])?\.gguf", fullmatch=True),
    ),
    max_size=8,
    unique=True,
)


@given(NAMES, st.one_of(st.none(), st.sampled_from(["Q4_K_M", "q8", "m.gguf", "F16"]), st.text(max_size=8)))
def test_any_listing_gives_a_complete_choice_or_a_typed_error(names: list[str], selector: str | None) -> None:
    try:
        choice = choose_files(repo(*names), selector)
    except SourceError:
        return
    assert choice.weights
    assert {file.name for file in choice.weights} <= set(names)
    assert choice.weights[0].name not in choice.others
    assert all(why_hostile(name) == "" for name in names)
