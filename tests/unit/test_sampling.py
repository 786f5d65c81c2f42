"""The sampler, on logits that the tests write into a real engine's memory; all seeds are fixed."""

from __future__ import annotations

import ctypes
import math
import subprocess
import sys
from array import array
from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lmd.runner.sampling as sampling_module
from lmd.runner.adjust import Penalties
from lmd.runner.dry import Breakers, Dry, suffix_lengths
from lmd.runner.rows import best_of
from lmd.runner.sampling import SEEDS, find_problem
from tests.support.native_engine import NativeEngine, plain_sampling
from tests.support.tiny_models import EOS, make_tiny_llama, tiny_vocab

if TYPE_CHECKING:
    from lmd.runner.rows import Row

A, B, C, D = (tiny_vocab().id_of(piece) for piece in ("▁the", "▁of", "▁and", "▁to"))
NEWLINE = tiny_vocab().id_of(10)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> NativeEngine:
    return NativeEngine(make_tiny_llama(tmp_path_factory.mktemp("sampling") / "tiny.gguf"))


def logs(**probabilities: float) -> dict[int, float]:
    """Logits that make these probabilities of A, B, C, D."""
    return {globals()[name]: math.log(value) for name, value in probabilities.items()}


# Greedy


def test_temperature_zero_takes_the_best_and_of_equals_the_first(engine: NativeEngine) -> None:
    engine.set({C: 3.0, A: 3.0, B: 2.9}, rest=0.0)
    assert engine.draws(3, temperature=0.0) == [min(A, C)] * 3
    assert engine.draws(3, temperature=0.0, mirostat=2, top_k=5, xtc_probability=1.0) == [min(A, C)] * 3


@given(st.integers(0, 1000))
def test_the_engine_and_numpy_agree_on_the_best(engine: NativeEngine, seed: int) -> None:
    """Without numpy in the process the engine chooses; rounded, so that there are ties."""
    engine.rows[0][:] = np.random.default_rng(seed).standard_normal(engine.vocab.size).round(1)
    found = engine.draws(1, temperature=0.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling_module, "numpy_is_here", lambda: False)
        assert engine.draws(1, temperature=0.0) == found == [int(engine.rows[0].argmax())]


@pytest.mark.parametrize(
    ("row", "best"),
    [
        ([1.0, math.nan, 3.0, 2.0], 2),
        ([math.nan, -math.inf, -1.0], 2),
        ([math.nan, math.nan], 0),
        ([-math.inf, -math.inf], 0),
        ([1.0, math.inf, math.inf], 1),
    ],
)
def test_the_best_is_a_number(row: list[float], best: int) -> None:
    assert best_of(np.array(row, np.float32)) == best


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=50))
def test_the_best_is_what_python_finds(row: list[float]) -> None:
    assert best_of(np.array(row, np.float32)) == row.index(max(row))


def test_each_row_has_its_own_token(engine: NativeEngine) -> None:
    engine.set({A: 1.0})
    engine.set({B: 1.0}, row=1)
    for temperature in (0.0, 1.0):
        sampler = engine.sampler(temperature=temperature)
        assert [sampler.sample(engine.context, index) for index in (0, 1, 0)] == [A, B, A]
        sampler.free()


def test_a_token_without_logits_is_an_error(engine: NativeEngine) -> None:
    for temperature in (0.0, 1.0):
        sampler = engine.sampler(temperature=temperature)
        with pytest.raises(IndexError):
            sampler.sample(engine.context, 7)
        sampler.free()


# The distribution


def assert_frequencies(tokens: list[int], expected: dict[int, float]) -> None:
    """Check counts against probabilities: each within four standard deviations, which fixed seeds make a yes or no."""
    counts, size = Counter(tokens), len(tokens)
    assert set(counts) <= set(expected)
    for token, probability in expected.items():
        deviation = math.sqrt(size * probability * (1 - probability))
        assert abs(counts[token] - size * probability) <= 4 * deviation, (token, counts)


SHARES = {A: 0.5, B: 0.3, C: 0.15, D: 0.05}


def softmax(logits: dict[int, float]) -> dict[int, float]:
    total = sum(math.exp(logit) for logit in logits.values())
    return {token: math.exp(logit) / total for token, logit in logits.items()}


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, "ABCD"),
        ({"top_k": 2}, "AB"),
        ({"top_p": 0.79}, "AB"),
        ({"top_p": 0.81}, "ABC"),
        ({"min_p": 0.25}, "ABC"),
        # The least likely of those of at least a tenth stays.
        ({"xtc_probability": 1.0, "xtc_threshold": 0.1}, "CD"),
        ({"xtc_probability": 1.0, "xtc_threshold": 0.4}, "ABCD"),
        # Entropy 1.14; the surprise of B, 1.2, is nearest to it, then that of A, 0.69.
        ({"typical_p": 0.25}, "B"),
        # The other tokens have no probability, the logarithm of which once made all equally typical.
        ({"typical_p": 0.7}, "AB"),
        ({"logit_bias": {A: -math.inf}}, "BCD"),
        ({"top_k": 2, "logit_bias": {A: -math.inf}}, "BC"),
    ],
)
def test_what_is_kept_keeps_its_shares(engine: NativeEngine, options: dict[str, Any], kept: str) -> None:
    engine.set(logs(A=0.5, B=0.3, C=0.15, D=0.05))
    shares = {globals()[name]: SHARES[globals()[name]] for name in kept}
    total = sum(shares.values())
    expected = {token: share / total for token, share in shares.items()}
    assert_frequencies(engine.draws(2000, seed=3, **options), expected)


def test_temperature_sharpens_and_flattens(engine: NativeEngine) -> None:
    logits = logs(A=0.5, B=0.3, C=0.15, D=0.05)
    engine.set(logits)
    for temperature in (0.5, 2.0):
        expected = softmax({token: logit / temperature for token, logit in logits.items()})
        assert_frequencies(engine.draws(2000, seed=4, temperature=temperature), expected)


def test_xtc_cuts_as_often_as_asked(engine: NativeEngine) -> None:
    """With chance 1/2, A and B come only from the other half."""
    engine.set(logs(A=0.5, B=0.3, C=0.15, D=0.05))
    expected = {A: 0.25, B: 0.15, C: 0.075 + 0.5 * 0.75, D: 0.025 + 0.5 * 0.25}
    assert_frequencies(engine.draws(4000, seed=5, xtc_probability=0.5, xtc_threshold=0.1), expected)


@pytest.mark.parametrize("options", [{}, {"mirostat": 1}, {"mirostat": 2}, {"xtc_probability": 0.5, "min_p": 0.01}])
def test_seeds(engine: NativeEngine, options: dict[str, Any]) -> None:
    engine.rows[0][:] = np.random.default_rng(0).standard_normal(engine.vocab.size)
    first = engine.draws(30, seed=7, **options)
    assert engine.draws(30, seed=7, **options) == first
    # Choices of one request have neighbouring seeds.
    others = [engine.draws(30, seed=seed, **options) for seed in (8, 9, 0)]
    assert all(one != other for index, one in enumerate(others) for other in [first, *others[:index]])


def test_no_seed_is_the_engines_random_one(engine: NativeEngine) -> None:
    engine.rows[0][:] = np.random.default_rng(0).standard_normal(engine.vocab.size)
    assert engine.draws(30, seed=SEEDS) == engine.draws(30, seed=0)


@pytest.mark.parametrize("version", [1, 2])
def test_mirostat_aims_at_the_surprise_asked_for(engine: NativeEngine, version: int) -> None:
    """The mean surprise, in bits among what was kept, ends near tau; so a higher one gives more various tokens."""
    engine.rows[0][:] = np.random.default_rng(1).standard_normal(engine.vocab.size) * 3
    varieties = [len(set(engine.draws(400, mirostat=version, mirostat_tau=tau, mirostat_eta=0.1))) for tau in (1, 4)]
    assert varieties[0] * 2 < varieties[1]
    assert varieties[0] > 1


@pytest.mark.parametrize("options", [{"mirostat": 1}, {"mirostat": 2}, {"typical_p": 0.5}, {"top_p": 0.5}, {}])
def test_samplers_survive_tokens_that_cannot_be(engine: NativeEngine, options: dict[str, Any]) -> None:
    engine.set({B: 0.0})
    assert engine.draws(20, **options) == [B] * 20
    engine.set({A: 0.0, B: 0.0})
    assert set(engine.draws(50, **options)) <= {A, B}


# Biases and ends


def test_a_bias_forces_and_forbids(engine: NativeEngine) -> None:
    engine.rows[0][:] = np.random.default_rng(2).standard_normal(engine.vocab.size)
    best = engine.draws(1, temperature=0.0)[0]
    for temperature in (0.0, 1.0):
        assert set(engine.draws(30, temperature=temperature, logit_bias={D: 100.0})) == {D}
        assert best not in engine.draws(300, temperature=temperature, logit_bias={best: -math.inf})
    # What was biased is as the model said it, for whoever looks next.
    assert engine.draws(1, temperature=0.0) == [best]


def test_ignore_eos_never_ends(engine: NativeEngine) -> None:
    engine.set({EOS: 50.0, A: 1.0, B: 1.0})
    assert EOS in engine.vocab.ends
    for temperature in (0.0, 1.0):
        assert engine.draws(5, temperature=temperature) == [EOS] * 5
        said = engine.draws(200, temperature=temperature, ignore_eos=True)
        assert not set(said) & set(engine.vocab.ends)
    # Nor when somebody wants the end.
    assert EOS not in engine.draws(50, ignore_eos=True, logit_bias={EOS: 100.0})


# Penalties and DRY


def test_penalties_see_prompt_and_answer(engine: NativeEngine) -> None:
    engine.set({A: 2.0, B: 1.5, C: 1.2}, rest=-50.0)
    options: dict[str, Any] = {"temperature": 0.0, "presence_penalty": 2.0}
    assert engine.draws(4, **options) == [A, B, C, A]
    assert engine.draws(1, [A, B], **options) == [C]
    assert engine.draws(1, [A, B, D], repeat_last_n=2, **options) == [A]
    assert engine.draws(1, [A, B], repeat_last_n=0, **options) == [A]
    assert engine.draws(1, [A] + [D] * 100, **options) == [A]
    assert engine.draws(1, [A] + [D] * 100, repeat_last_n=-1, **options) == [B]


small_tokens = st.lists(st.sampled_from([A, B, C, NEWLINE]), max_size=40)
rows = st.integers(0, 99).map(lambda seed: np.random.default_rng(seed).standard_normal(1200).astype(np.float32) * 3)


def after(row: Row, changed: tuple[Any, Row] | None) -> Row:
    row = row.copy()
    if changed is not None:
        ids, scores = changed
        assert len(set(ids.tolist())) == len(ids)
        row[ids] = scores
    return row


@given(
    small_tokens,
    small_tokens,
    st.integers(1, 12),
    st.floats(0.5, 3, width=16),
    st.floats(-2, 2, width=16),
    st.floats(-2, 2, width=16),
    rows,
)
def test_penalties_are_the_engines(
    engine: NativeEngine,
    prompt: list[int],
    answer: list[int],
    last_n: int,
    repeat: float,
    frequency: float,
    presence: float,
    row: Row,
) -> None:
    row = row[: engine.vocab.size]
    ours = Penalties(last_n=last_n, repeat=repeat, frequency=frequency, presence=presence, prompt=array("i", prompt))
    native = engine.llama.llama_sampler_init_penalties(engine.vocab.size, last_n, repeat, frequency, presence)
    for token in answer:
        ours.accept(token)
    for token in prompt + answer:
        engine.llama.llama_sampler_accept(native, token)
    np.testing.assert_allclose(after(row, ours.changes(row)), engine.adjusted(native, row), rtol=1e-6, atol=1e-6)


@settings(max_examples=300)
@given(
    small_tokens,
    small_tokens,
    st.sampled_from([1, 2, 5, 30, 1000]),
    st.sampled_from([1.0, 1.75, 3.0, 100.0]),
    st.integers(1, 4),
    st.lists(st.sampled_from(["\n", "the", "and", "x"]), max_size=3),
    rows,
)
def test_dry_is_the_engines(
    engine: NativeEngine,
    prompt: list[int],
    answer: list[int],
    last_n: int,
    base: float,
    allowed: int,
    breakers: list[str],
    row: Row,
) -> None:
    row = row[: engine.vocab.size]
    ours = Dry(
        Breakers(engine.vocab, breakers),
        multiplier=0.75,
        base=base,
        allowed=allowed,
        last_n=last_n,
        prompt=array("i", prompt),
    )
    native = native_dry(engine, 0.75, base, allowed, last_n, breakers)
    for token in answer:
        ours.accept(token)
    for token in prompt + answer:
        engine.llama.llama_sampler_accept(native, token)
    np.testing.assert_allclose(after(row, ours.changes(row)), engine.adjusted(native, row), rtol=1e-6, atol=1e-6)


def test_dry_is_the_engines_after_a_long_answer(engine: NativeEngine) -> None:
    """The window slides, and its buffer is renewed several times; the prompt is longer than both."""
    random = np.random.default_rng(6)
    prompt, answer = (random.choice([A, B, C], count).tolist() for count in (400, 1000))
    row = random.standard_normal(engine.vocab.size).astype(np.float32)
    ours = Dry(Breakers(engine.vocab, []), multiplier=0.5, base=1.5, allowed=2, last_n=300, prompt=array("i", prompt))
    native = native_dry(engine, 0.5, 1.5, 2, 300, [])
    for token in prompt:
        engine.llama.llama_sampler_accept(native, token)
    for token in answer:
        ours.accept(token)
        engine.llama.llama_sampler_accept(native, token)
        expected = engine.adjusted(engine.llama.llama_sampler_clone(native), row)
        np.testing.assert_allclose(after(row, ours.changes(row)), expected, rtol=1e-6, atol=1e-6)
    engine.llama.llama_sampler_free(native)


def native_dry(
    engine: NativeEngine, multiplier: float, base: float, allowed: int, last_n: int, breakers: list[str]
) -> Any:
    texts = (ctypes.c_char_p * len(breakers))(*(text.encode() for text in breakers))
    return engine.llama.llama_sampler_init_dry(
        engine.vocab.handle, multiplier, base, allowed, last_n, texts, len(breakers)
    )


def test_dry_keeps_the_model_from_going_on_with_a_repetition(engine: NativeEngine) -> None:
    """`A B C D A B C` asks for D, which would go on with a repetition: it loses 2 * 1.75 ** (3 - 2)."""
    engine.set({D: 3.0, A: 1.0}, rest=-50.0)
    story = [A, B, C, D, A, B, C]
    options: dict[str, Any] = {"temperature": 0.0, "dry_multiplier": 2.0}
    assert engine.draws(1, story, temperature=0.0) == [D]
    assert engine.draws(1, story, **options) == [A]
    assert engine.draws(1, story, **options, dry_allowed_length=4) == [D]
    assert engine.draws(1, story, **options, dry_penalty_last_n=0) == [D]
    assert engine.draws(1, story, **options, dry_penalty_last_n=4) == [D]
    # A newline in between ends the repetition: only `C` is repeated.
    lines = [A, B, NEWLINE, C, D, A, B, NEWLINE, C]
    assert engine.draws(1, lines, **options) == [A]
    assert engine.draws(1, lines, **options, dry_sequence_breakers=["\n"]) == [D]
    # A breaker itself is never made less likely.
    assert engine.draws(1, story, **options, dry_sequence_breakers=["to"]) == [D]


def test_a_breaker_may_span_tokens(engine: NativeEngine) -> None:
    engine.set({D: 3.0, A: 1.0}, rest=-50.0)
    options: dict[str, Any] = {"temperature": 0.0, "dry_multiplier": 2.0}
    story = [A, B, C, D, A, B, C]
    assert engine.draws(1, story, **options, dry_sequence_breakers=["of an"]) == [D]
    assert engine.draws(1, story, **options, dry_sequence_breakers=["the of "]) == [D]
    assert engine.draws(1, story, **options, dry_sequence_breakers=["the and"]) == [A]


def test_a_breaker_far_back_in_a_prompt_is_found(engine: NativeEngine) -> None:
    """The prompt is searched from its end, in growing parts."""
    for tail in (0, 1, 63, 64, 65, 300):
        breakers = Breakers(engine.vocab, ["\n"])
        assert breakers.read(array("i", [A] * 500 + [NEWLINE] + [B] * tail)) == tail
    assert Breakers(engine.vocab, ["\n"]).read(array("i", [A] * 500)) == 500


@given(st.lists(st.integers(0, 2), max_size=30))
def test_common_suffixes(tokens: list[int]) -> None:
    def slow(place: int) -> int:
        length = 0
        while length <= place and tokens[place - length] == tokens[len(tokens) - 1 - length]:
            length += 1
        return length

    assert suffix_lengths(tokens) == [slow(place) for place in range(len(tokens) - 1)]


# One sampler


ALL: dict[str, Any] = {
    "presence_penalty": 0.5,
    "repeat_penalty": 1.1,
    "dry_multiplier": 0.8,
    "dry_sequence_breakers": ["\n"],
    "logit_bias": {A: 1.0},
    "xtc_probability": 0.3,
    "top_k": 40,
    "top_p": 0.95,
    "min_p": 0.01,
    "typical_p": 0.9,
    "ignore_eos": True,
}


@pytest.mark.parametrize("temperature", [0.0, 1.2])
def test_logits_stay_as_they_are(engine: NativeEngine, temperature: float) -> None:
    engine.rows[0][:] = np.random.default_rng(3).standard_normal(engine.vocab.size)
    before = engine.rows[0].copy()
    engine.draws(20, [A, B, A, B, A], temperature=temperature, **ALL)
    assert engine.rows[0].tobytes() == before.tobytes()


@pytest.mark.parametrize("options", [ALL, {"mirostat": 1}, {"mirostat": 2}, {"temperature": 0.0, **ALL}])
def test_a_clone_says_what_the_original_says(engine: NativeEngine, options: dict[str, Any]) -> None:
    engine.rows[0][:] = np.random.default_rng(4).standard_normal(engine.vocab.size)
    sampler = engine.sampler([A, B, A, B], **options)
    for _ in range(10):
        sampler.sample(engine.context, 0)
    clone = sampler.clone()
    # One after the other, so that what they share would show.
    said = [sampler.sample(engine.context, 0) for _ in range(20)]
    sampler.free()
    assert [clone.sample(engine.context, 0) for _ in range(20)] == said
    clone.free()
    clone.free()


def test_drawing_is_not_saying(engine: NativeEngine) -> None:
    engine.set({A: 2.0, B: 1.5}, rest=-50.0)
    sampler = engine.sampler(temperature=0.0, presence_penalty=2.0)
    assert [sampler.draw(engine.context, 0) for _ in range(3)] == [A, A, A]
    sampler.accept(A)
    assert sampler.draw(engine.context, 0) == B
    sampler.free()


# What cannot be


@pytest.mark.parametrize(
    ("values", "field", "words"),
    [
        ({name: value}, name, "not a finite number")
        for name in ("temperature", "top_p", "xtc_probability", "xtc_threshold", "dry_multiplier", "dry_base")
        for value in (math.nan, math.inf)
    ]
    + [
        ({"repeat_penalty": 0.0}, "repeat_penalty", "above 0"),
        ({"mirostat": 3}, "mirostat", "0, 1 or 2"),
        ({"dry_multiplier": 1.0, "dry_base": 0.5}, "dry_base", "at least 1"),
        ({"dry_multiplier": 1.0, "dry_allowed_length": 0}, "dry_allowed_length", "at least 1"),
        ({"logit_bias": {100: 1.0}}, "logit_bias", "token 100, but the model has the tokens 0 to 99"),
        ({"logit_bias": {-1: 1.0}}, "logit_bias", "token -1"),
        ({"logit_bias": {5: math.nan}}, "logit_bias", "token 5"),
        ({"logit_bias": {5: math.inf}}, "logit_bias", "token 5"),
        ({"stop_tokens": [3, 100]}, "stop_tokens", "token 100"),
        ({"stop_tokens": [-3]}, "stop_tokens", "token -3"),
    ],
)
def test_nonsense_is_named(values: dict[str, Any], field: str, words: str) -> None:
    problem = find_problem(plain_sampling(**values), 100)
    assert problem is not None
    assert problem.field == field
    assert words in problem.message


def test_what_is_off_needs_no_sense() -> None:
    assert find_problem(plain_sampling(dry_base=0.0, dry_allowed_length=0, logit_bias={5: -math.inf}), 100) is None


def test_numpy_waits_for_a_request() -> None:
    """Importing is left to the first request that needs it."""
    program = "import sys, lmd.runner.engine, lmd.runner.sampling, lmd.runner.logprobs; print('numpy' in sys.modules)"
    output = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    assert output.strip() == "False"
