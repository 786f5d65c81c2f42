"""The radix trees find what a search of all entries finds, and count shared tokens once."""

from __future__ import annotations

from array import array

from hypothesis import given, settings
from hypothesis import strategies as st

from lmd.runner.prefix_cache import Entry, PrefixCache, common_prefix

tokens = st.lists(st.integers(0, 2), max_size=10)
entries = st.lists(st.tuples(tokens.filter(bool), st.sampled_from(["a", "b", None])), max_size=20)


def shared(one: list[int], other: list[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def beginnings(texts: list[list[int]]) -> int:
    return len({tuple(text[:length]) for text in texts for length in range(1, len(text) + 1)})


@given(entries, st.lists(st.integers(0, 19)), tokens, st.sampled_from(["a", "b", None, "c"]), st.integers(-1, 10))
@settings(max_examples=400, deadline=None)
def test_it_agrees_with_a_search_of_everything(
    added: list[tuple[list[int], str | None]], removed: list[int], prompt: list[int], scope: str | None, limit: int
) -> None:
    cache: PrefixCache[Entry] = PrefixCache()
    kept: list[Entry] = []
    for number, (text, owner) in enumerate(added):
        kept.append(Entry(number, array("i", text), owner))
        cache.insert(kept[-1])
    for index in removed:
        if index < len(kept):
            cache.remove(kept.pop(index))
    assert set(cache) == set(kept)
    assert cache.tokens == sum(beginnings([list(e.tokens) for e in kept if e.scope == s]) for s in ("a", "b", None))

    mine = [entry for entry in kept if entry.scope == scope]
    entry, length = cache.match(array("i", prompt), scope, limit)
    wanted = prompt[: max(0, limit)]
    assert length == max((shared(list(e.tokens), wanted) for e in mine), default=0)
    if length:
        assert entry in mine
        assert list(entry.tokens[:length]) == prompt[:length]
        if any(list(e.tokens) == prompt[:length] for e in mine):
            assert len(entry.tokens) == length
    else:
        assert entry is None
    found = cache.beginnings(array("i", prompt), scope)
    assert set(found) == {e for e in mine if prompt[: len(e.tokens)] == list(e.tokens)}


def test_the_one_used_longest_ago_goes_first_and_pinned_ones_last() -> None:
    cache: PrefixCache[Entry] = PrefixCache()
    one, two = Entry(1, array("i", [1]), "a"), Entry(2, array("i", [2]), "a")
    pinned = Entry(3, array("i", [3]), None, pinned=True)
    for entry in (pinned, one, two):
        cache.insert(entry)
    assert cache.oldest() is one
    cache.touch(one)
    assert cache.oldest() is two
    assert cache.oldest(besides=two) is one
    assert cache.oldest_pinned() is pinned


@given(tokens, tokens, st.integers(-2, 12))
def test_common_prefix(one: list[int], other: list[int], limit: int) -> None:
    assert common_prefix(array("i", one), array("i", other), limit) == min(shared(one, other), max(0, limit))
