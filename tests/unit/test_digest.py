from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmd.registry.digest import Digest
from lmd.registry.errors import InvalidRequest

EMPTY = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


def test_of_bytes_is_their_sha256() -> None:
    assert Digest.of(b"") == Digest(EMPTY)
    assert str(Digest.of(b"")) == f"sha256:{EMPTY}"
    assert Digest.of(b"").short == "e3b0c44298fc"


@given(st.binary(max_size=64))
def test_text_and_back(data: bytes) -> None:
    digest = Digest.of(data)
    assert Digest.parse(str(digest)) == digest == Digest.from_hex(hashlib.sha256(data).hexdigest())
    assert hash(Digest.parse(str(digest))) == hash(digest)


def test_digests_are_ordered_by_their_hex() -> None:
    assert sorted([Digest("b" * 64), Digest("a" * 64)]) == [Digest("a" * 64), Digest("b" * 64)]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "sha256:",
        EMPTY,
        f"sha256-{EMPTY}",
        f"sha512:{EMPTY}",
        f"SHA256:{EMPTY}",
        f"sha256:{EMPTY.upper()}",
        f"sha256:{EMPTY}0",
        f"sha256:{EMPTY[1:]}",
        f"sha256:{EMPTY}\n",
        f" sha256:{EMPTY}",
        "sha256:" + "../" * 21 + "a",
        "sha256:" + "\u0660" * 64,
        "sha256:" + "g" * 64,
    ],
)
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        Digest.parse(text)
    assert caught.value.metadata == {"field": "digest"}
    assert "64" in caught.value.hint
    assert caught.value.message.isprintable()


def test_only_well_formed_digests_exist() -> None:
    for text in ("", "../../etc/passwd", "A" * 64, EMPTY + "\n"):
        with pytest.raises(InvalidRequest):
            Digest.from_hex(text)


@given(st.text(max_size=100))
def test_arbitrary_text_is_a_digest_or_a_typed_error(text: str) -> None:
    try:
        digest = Digest.parse(text)
    except InvalidRequest:
        return
    assert str(digest) == text
