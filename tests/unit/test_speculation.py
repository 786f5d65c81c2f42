"""Guessing tokens: what is accepted, what is guessed, how much; and that none of it changes what comes out."""

from __future__ import annotations

import functools
import itertools
import random
from array import array
from collections import Counter
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmd.runner.speculation import (
    MAX_DRAFT,
    STEP_COSTS,
    Drafter,
    Pace,
    PromptLookup,
    Speculation,
    accepted,
    make_speculation,
)

TOKENS = st.lists(st.integers(0, 3), max_size=60)


def tokens(values: Sequence[int]) -> array[int]:
    return array("i", values)


# What is accepted


@pytest.mark.parametrize(
    ("drafted", "sampled", "count"),
    [
        ([], [], 0),
        ([], [7], 0),
        ([1, 2, 3], [1, 2, 3, 4], 3),
        ([1, 2, 3], [1, 2, 3], 3),
        ([1, 2, 3], [1, 9], 1),
        ([1, 2, 3], [9], 0),
        ([1, 2, 3], [9, 2, 3, 4], 0),
    ],
)
def test_what_is_accepted(drafted: list[int], sampled: list[int], count: int) -> None:
    assert accepted(drafted, sampled) == count


@given(st.lists(st.integers(0, 2), max_size=8), st.lists(st.integers(0, 2), max_size=9))
def test_what_is_accepted_was_sampled_and_the_next_was_not_guessed(drafted: list[int], sampled: list[int]) -> None:
    count = accepted(drafted, sampled)
    assert drafted[:count] == sampled[:count]
    assert count == min(len(drafted), len(sampled)) or drafted[count] != sampled[count]


# The distribution of the output

WORDS = 4


def chances(context: Sequence[int]) -> list[float]:
    """A model: how likely each of four tokens is after a context; depends on the last two, and never the same."""
    return _chances(context[-2], context[-1])


@functools.cache
def _chances(before: int, last: int) -> list[float]:
    mixed = random.Random(7 * last + 31 * before + 1)
    weights = [mixed.random() ** 3 + 0.02 for _ in range(WORDS)]
    total = sum(weights)
    return [weight / total for weight in weights]


class Likely:
    """A drafter that guesses well: the likeliest token, each time."""

    def draft(self, tokens: array[int], limit: int) -> list[int]:
        guess: list[int] = []
        for _ in range(limit):
            likely = chances([*tokens[-2:], *guess][-2:])
            guess.append(likely.index(max(likely)))
        return guess

    def forget(self) -> None:
        pass


class Biased:
    """A drafter that only ever guesses one token."""

    def draft(self, tokens: array[int], limit: int) -> list[int]:
        return [3] * limit

    def forget(self) -> None:
        pass


Rule = Callable[[Sequence[int], Sequence[int]], int]


def everything(drafted: Sequence[int], sampled: Sequence[int]) -> int:
    """A wrong rule: believe the drafter."""
    return len(drafted)


def generate(draw: random.Random, count: int, drafter: Drafter | None, limit: int, rule: Rule = accepted) -> list[int]:
    """Generate *count* tokens as the engine does: sample at every drafted place, keep what was guessed right."""
    text = tokens([0, 0])
    while len(text) < count + 2:
        guess = drafter.draft(text, limit) if drafter else []
        sampled: list[int] = []
        for at in range(len(guess) + 1):
            [token] = draw.choices(range(WORDS), chances([*text[-2:], *guess[:at]]))
            sampled.append(token)
            if rule is accepted and at < len(guess) and token != guess[at]:
                break
        kept = rule(guess, sampled)
        text.extend([*guess[:kept], sampled[kept]])
    return list(text[2 : count + 2])


def surprise(text: Sequence[int]) -> float:
    """How far the tokens after each pair are from what the model says: chi-square, 16 pairs of 3 degrees of freedom."""
    after: dict[tuple[int, ...], Counter[int]] = {}
    for at in range(2, len(text)):
        after.setdefault(tuple(text[at - 2 : at]), Counter())[text[at]] += 1
    total = 0.0
    for pair, counts in after.items():
        trials = counts.total()
        total += sum((counts[t] - trials * p) ** 2 / (trials * p) for t, p in enumerate(chances(pair)))
    return total


#: Chi-square with 48 degrees of freedom exceeds this once in a thousand times.
CRITICAL = 84.04


@pytest.mark.parametrize("drafter", [None, Likely(), Biased(), PromptLookup()], ids=lambda each: type(each).__name__)
@pytest.mark.parametrize("limit", [1, 5])
def test_drafting_leaves_the_distribution_as_it_is(drafter: Drafter | None, limit: int) -> None:
    text = generate(random.Random(20_261_125), 20_000, drafter, limit)
    assert surprise(text) < CRITICAL


@pytest.mark.parametrize("drafter", [Likely(), Biased()], ids=lambda each: type(each).__name__)
def test_the_distribution_would_show_a_wrong_rule(drafter: Drafter) -> None:
    text = generate(random.Random(20_261_125), 20_000, drafter, 2, everything)
    assert surprise(text) > 10 * CRITICAL


@pytest.mark.parametrize("drafter", [Likely(), Biased(), PromptLookup()], ids=lambda each: type(each).__name__)
def test_the_same_seed_gives_the_same_text_with_and_without_drafting(drafter: Drafter) -> None:
    """Sampling stops at the first wrong guess, so the random numbers are those of plain decoding."""
    plain = generate(random.Random(5), 2_000, None, 0)
    assert generate(random.Random(5), 2_000, drafter, 4) == plain


# Prompt lookup


def test_what_followed_before_is_guessed_again() -> None:
    assert PromptLookup().draft(tokens([1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3, 4, 5]), 3) == [6, 7, 8]


def test_without_a_repetition_there_is_no_guess() -> None:
    lookup = PromptLookup()
    for text in ([], [1], [1, 2], [1, 2, 3, 4, 2], [5, 5]):
        assert lookup.draft(tokens(text), 8) == []


def test_the_longest_match_wins_and_of_equals_the_latest() -> None:
    longer = [7, 1, 2, 3, 4, 5, 50, 0, 3, 4, 5, 60, 9, 1, 2, 3, 4, 5]
    assert PromptLookup().draft(tokens(longer), 1) == [50]
    equal = [1, 2, 3, 4, 5, 50, 1, 2, 3, 4, 5, 60, 1, 2, 3, 4, 5]
    assert PromptLookup().draft(tokens(equal), 1) == [60]


def test_a_short_match_is_good_for_a_short_guess() -> None:
    def guess(length: int) -> list[int]:
        match = list(range(1, length + 1))
        return PromptLookup().draft(tokens([*match, *range(20, 40), *match]), 15)

    assert [len(guess(length)) for length in (1, 2, 3, 4, 5, 6)] == [0, 1, 2, 3, 15, 15]


def test_a_repetition_that_reaches_the_end_goes_on_repeating() -> None:
    assert PromptLookup().draft(tokens([1, 2, 3] * 3), 7) == [1, 2, 3, 1, 2, 3, 1]


def test_a_match_beyond_the_candidates_and_the_longest_one_is_not_looked_for() -> None:
    text = [8, 9, 1, 2, 3, 4, 5, 6, 7, *([1, 2, 0] * 40), 9, 1, 2]
    assert PromptLookup().draft(tokens(text), 1) == [0]


def bears_out(text: Sequence[int], guess: Sequence[int]) -> bool:
    """Tell whether *guess* stands behind an earlier place that looks like the end of *text*, which it may run into."""
    size, whole = len(text), [*text, *guess]
    return any(
        whole[at - 2 : at] == whole[size - 2 : size] and whole[at : at + len(guess)] == list(guess)
        for at in range(2, size)
    )


@given(TOKENS, st.integers(0, 20))
def test_a_guess_is_what_stands_after_an_equal_place(text: list[int], limit: int) -> None:
    guess = PromptLookup().draft(tokens(text), limit)
    assert len(guess) <= limit
    if guess:
        assert bears_out(text, guess)
    elif limit:
        assert not any(text[at - 2 : at] == text[-2:] for at in range(2, len(text)))


@given(st.lists(TOKENS, max_size=12))
def test_an_index_that_grew_guesses_like_a_new_one(parts: list[list[int]]) -> None:
    lookup, text = PromptLookup(), tokens([])
    for more in parts:
        text.extend(more)
        assert lookup.draft(text, 5) == PromptLookup().draft(text, 5)


@given(st.lists(st.tuples(TOKENS, st.integers(0, 30), st.integers(0, 30)), max_size=12))
def test_a_guess_holds_also_after_cuts(steps: list[tuple[list[int], int, int]]) -> None:
    """A part in the middle is lost when the context is shifted; a cut in a repetition may go unseen."""
    lookup, text = PromptLookup(), tokens([])
    for more, keep, drop in steps:
        text = text[:keep] + text[keep + drop :]
        text.extend(more)
        guess = lookup.draft(text, 5)
        assert not guess or bears_out(text, guess)


def test_a_cut_context_is_indexed_anew() -> None:
    lookup = PromptLookup()
    text = tokens([*range(100), *range(50, 60)])
    assert lookup.draft(text, 3) == [60, 61, 62]
    cut = text[:10] + text[60:]
    assert lookup.draft(cut, 3) == []
    cut.extend(range(70, 76))
    assert lookup.draft(cut, 3) == [76, 77, 78]


def test_the_work_of_a_call_is_what_is_new() -> None:
    class Counting(dict[int, int]):
        writes = 0

        def __setitem__(self, key: int, value: int) -> None:
            Counting.writes += 1
            super().__setitem__(key, value)

    lookup = PromptLookup()
    text = tokens([random.Random(1).randrange(1000) for _ in range(5000)])
    lookup.draft(text, 4)
    lookup._latest = Counting(lookup._latest)
    for token in (1, 2, 3):
        text.append(token)
        lookup.draft(text, 4)
    assert Counting.writes == 3


def test_the_index_is_bounded_and_keeps_the_end() -> None:
    text = tokens([random.Random(1).randrange(10_000) for _ in range(70_000)])
    lookup = PromptLookup()
    for size in (1000, 66_000, 70_000):
        lookup.draft(text[:size], 4)
        assert len(lookup._latest) <= 1 << 16
        assert len(lookup._previous) <= (1 << 16) + 1
    again = text + text[60_000:60_006]
    assert lookup.draft(again, 4) == list(text[60_006:60_010])


def test_forgetting_starts_over() -> None:
    lookup = PromptLookup()
    lookup.draft(tokens([1, 2, 3, 1, 2]), 4)
    lookup.forget()
    assert lookup.draft(tokens([1, 2]), 4) == []


# How much is guessed


def run(pace: Pace, chance: float, steps: int, seed: int = 1) -> tuple[float, int]:
    """Let *pace* decide in so many steps, with guesses that are right by *chance*; return the cost and the tokens."""
    draw = random.Random(seed)
    cost, made = 0.0, 0
    for _ in range(steps):
        limit = pace.limit(active=1, wanted=-1)
        right = next((at for at in range(limit) if draw.random() >= chance), limit)
        pace.note(limit, right)
        cost += STEP_COSTS[limit] + limit * pace._draft_cost
        made += right + 1
    return cost, made


def test_it_starts_modestly_and_grows_with_acceptance() -> None:
    pace = Pace()
    first = pace.limit(active=1, wanted=-1)
    assert 1 <= first <= 4
    limits = []
    for _ in range(30):
        limit = pace.limit(active=1, wanted=-1)
        limits.append(limit)
        pace.note(limit, limit)
    assert limits == sorted(limits)
    assert limits[-1] == MAX_DRAFT


def test_it_switches_off_when_drafting_loses_and_tries_again_later() -> None:
    pace = Pace()
    limits = []
    for _ in range(600):
        limit = pace.limit(active=1, wanted=-1)
        limits.append(limit)
        pace.note(limit, 0)
    tries = [at for at, limit in enumerate(limits) if limit]
    gaps = [later - earlier for earlier, later in itertools.pairwise(tries)]
    assert gaps == sorted(gaps), "rarer and rarer"
    assert len(tries) < 16
    assert tries[-1] > 200
    # What was wrong turns right: it recovers.
    for _ in range(1200):
        limit = pace.limit(active=1, wanted=-1)
        pace.note(limit, limit)
    assert pace.limit(active=1, wanted=-1) == MAX_DRAFT


@pytest.mark.parametrize("draft_cost", [0.0, 0.1, 0.3, 1.0, 5.0])
@pytest.mark.parametrize("chance", [0.0, 0.2, 0.4, 0.6, 0.8, 0.95, 1.0])
def test_drafting_never_costs_much_and_gains_where_it_can(draft_cost: float, chance: float) -> None:
    cost, made = run(Pace(draft_cost), chance, 2000)
    assert cost / made < 1.06
    if chance >= 0.8 and draft_cost <= 0.1:
        assert cost / made < 0.85


@given(st.floats(0, 1), st.floats(0, 3), st.integers(0, 1000))
@settings(max_examples=50, deadline=None)
def test_the_loss_is_bounded_whatever_the_chance(chance: float, draft_cost: float, seed: int) -> None:
    steps = 400
    cost, made = run(Pace(draft_cost), chance, steps, seed)
    assert cost <= 1.1 * made + 40 * (1 + draft_cost)


@given(
    st.lists(st.tuples(st.integers(1, 4), st.integers(-1, 64), st.integers(0, 15), st.floats(0, 1)), max_size=80),
    st.floats(0, 2),
)
def test_limits_are_kept_and_repeated(steps: list[tuple[int, int, int, float]], draft_cost: float) -> None:
    one, other = Pace(draft_cost), Pace(draft_cost)
    for active, wanted, found, share in steps:
        limit = one.limit(active=active, wanted=wanted)
        assert limit == other.limit(active=active, wanted=wanted), "the same counts, the same decisions"
        assert 0 <= limit <= MAX_DRAFT
        assert limit <= wanted or wanted < 0
        assert active == 1 or limit == 0
        drafted = min(limit, found)
        for pace in (one, other):
            pace.note(drafted, int(drafted * share))


# The drafters of a request


class Fixed:
    """A drafter with one answer."""

    def __init__(self, answer: list[int]) -> None:
        self.answer = answer
        self.asked: list[int] = []
        self.ended = False

    def draft(self, tokens: array[int], limit: int) -> list[int]:
        self.asked.append(limit)
        return self.answer[:limit]

    def forget(self) -> None:
        self.ended = True


class Source:
    """A draft model that is not one."""

    relative_cost = 0.1

    def __init__(self, answer: list[int]) -> None:
        self.made = Fixed(answer)
        self.scopes: list[str] = []

    def drafter(self, scope: str) -> Drafter:
        self.scopes.append(scope)
        return self.made


def test_the_first_with_an_idea_drafts() -> None:
    first, second = Fixed([]), Fixed([5, 6])
    both = Speculation([(first, Pace()), (second, Pace())], wanted=-1, vocab_size=10)
    assert both.draft(tokens([1]), active=1, room=100) == [5, 6]
    assert first.asked
    both.note(2, 1)
    first.answer = [7]
    assert both.draft(tokens([1]), active=1, room=100) == [7]
    both.note(1, 1)
    assert (both.drafted_tokens, both.accepted_tokens) == (3, 2)
    both.forget()
    assert first.ended
    assert second.ended


def test_each_drafter_has_its_own_pace() -> None:
    poor, good = Fixed([1, 1]), Fixed([2, 2])
    both = Speculation([(poor, Pace()), (good, Pace())], wanted=-1, vocab_size=10)
    answers = []
    for _ in range(12):
        guess = both.draft(tokens([0]), active=1, room=100)
        answers.append(guess[0])
        both.note(len(guess), 0 if guess[0] == 1 else len(guess))
    assert answers[0] == 1
    assert answers[-1] == 2, "the poor one rests, the good one goes on"


@pytest.mark.parametrize(("wanted", "room", "most"), [(-1, 3, 3), (2, 9, 2), (-1, 0, 0), (5, -1, 0)])
def test_room_and_wishes_are_kept(wanted: int, room: int, most: int) -> None:
    drafter = Fixed([1] * 20)
    speculation = Speculation([(drafter, Pace())], wanted=wanted, vocab_size=10)
    for _ in range(20):
        guess = speculation.draft(tokens([0]), active=1, room=room)
        assert len(guess) <= most
        speculation.note(len(guess), len(guess))
    assert max(drafter.asked, default=0) == most


def test_nothing_is_drafted_beside_others() -> None:
    drafter = Fixed([1])
    speculation = Speculation([(drafter, Pace())], wanted=-1, vocab_size=10)
    assert speculation.draft(tokens([0]), active=2, room=9) == []
    assert drafter.asked == []


def test_tokens_that_the_model_does_not_have_are_left_out() -> None:
    for answer, expected in (([3, 10, 3], [3]), ([10], []), ([-1], [])):
        speculation = Speculation([(Fixed(answer), Pace())], wanted=5, vocab_size=10)
        for _ in range(9):
            found = speculation.draft(tokens([0]), active=1, room=9)
            speculation.note(len(found), len(found))
        assert speculation.draft(tokens([0]), active=1, room=9) == expected


def test_what_a_request_asks_for() -> None:
    source = Source([4])

    def made(draft_num_predict: int, *, prompt_lookup: bool, model: Source | None) -> Speculation | None:
        return make_speculation(
            draft_num_predict=draft_num_predict, prompt_lookup=prompt_lookup, model=model, scope="me", vocab_size=10
        )

    assert made(-1, prompt_lookup=False, model=None) is None
    assert made(0, prompt_lookup=True, model=source) is None
    assert made(4, prompt_lookup=False, model=None) is None
    assert source.scopes == []
    with_model = made(-1, prompt_lookup=False, model=source)
    assert with_model is not None
    assert source.scopes == ["me"]
    assert with_model.draft(tokens([1]), active=1, room=4) == [4]
    both = made(8, prompt_lookup=True, model=source)
    assert both is not None
    assert both.draft(tokens([1, 2, 3, 1, 2]), active=1, room=4) == [3], "looked up before the model is asked"
