"""A draft model and the engine it runs in, with tiny models: what it guesses, and that answers stay what they were."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmd.runner import draft
from lmd.runner.draft import DraftModel, likelihood, load_draft
from lmd.runner.model import LoadError
from lmd.runner.speculation import MAX_DRAFT, Pace, Speculation, make_speculation
from lmd.runner.threads import Threads
from lmd.runner.v1 import frames_pb2
from lmd.runner.weights import LoadAborted
from tests.support.gguf_bytes import TinyModel
from tests.support.speculative import STEP_TOKENS, Target, engine, load
from tests.support.tiny_models import (
    make_scripted_llama,
    make_tiny_gemma,
    make_tiny_llama,
    make_tiny_mamba,
    split_model,
    tiny_vocab,
)

VOCAB = tiny_vocab()
PROMPT = [1, *(VOCAB.id_of(word) for word in (" the", " people", " went", " to", " the", " house", " and", " saw"))]
COUNT = 60


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models")
    make_tiny_llama(directory / "tiny.gguf")
    make_tiny_llama(directory / "other.gguf", seed=2)
    make_tiny_llama(directory / "short.gguf", n_ctx=32)
    make_tiny_gemma(directory / "gemma.gguf")
    make_tiny_mamba(directory / "mamba.gguf")
    make_scripted_llama(directory / "script.gguf", [" one", " two", " three", " four"])
    return directory


@pytest.fixture(scope="module")
def target(models: Path) -> Target:
    return Target(models / "tiny.gguf")


def loaded(path: Path) -> DraftModel:
    model = load(path)
    assert model is not None
    return model


def drafting(model: DraftModel, wanted: int = -1, scope: str = "") -> Speculation:
    made = make_speculation(
        draft_num_predict=wanted, prompt_lookup=False, model=model, scope=scope, vocab_size=len(VOCAB.pieces)
    )
    assert made is not None
    return made


def guess_of(model: DraftModel, tokens: Sequence[int], limit: int = 4, scope: str = "") -> list[int]:
    return model.drafter(scope).draft(array("i", tokens), limit)


# Answers stay what they were


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("name", ["tiny", "other", "gemma", "script"])
def test_the_answer_is_that_of_plain_decoding(models: Path, target: Target, name: str, temperature: float) -> None:
    plain = target.decode(PROMPT, COUNT, temperature=temperature, seed=7)
    drafted = target.decode(PROMPT, COUNT, drafting(loaded(models / f"{name}.gguf")), temperature=temperature, seed=7)
    assert drafted.tokens == plain.tokens
    assert sum(step[0] for step in drafted.steps) > 0


@pytest.mark.parametrize("architecture", ["gemma"])
def test_a_window_does_not_get_in_the_way_of_taking_guesses_back(models: Path, architecture: str) -> None:
    """Every other layer of this model forgets what is 16 tokens back; wrong guesses must not take more with them."""
    target = Target(models / f"{architecture}.gguf")
    plain = target.decode(PROMPT, 100)
    wrong = target.decode(PROMPT, 100, Speculation([(_Wrong(), _Always())], wanted=15, vocab_size=len(VOCAB.pieces)))
    assert wrong.tokens == plain.tokens
    assert wrong.steps.count((15, 0)) > 50


class _Wrong:
    """Guesses that are hardly ever right, and many of them."""

    def draft(self, tokens: array[int], limit: int) -> list[int]:
        return [5] * limit

    def forget(self) -> None:
        pass


class _Always(Pace):
    def limit(self, *, active: int, wanted: int) -> int:
        return min(wanted, MAX_DRAFT)


def test_the_same_model_is_always_right_and_another_one_hardly_ever(models: Path, target: Target) -> None:
    same = target.decode(PROMPT, COUNT, drafting(loaded(models / "tiny.gguf")))
    assert same.acceptance == 1.0
    assert len(same.steps) < COUNT / 2, "no more of them when the draft itself is in doubt"
    other = target.decode(PROMPT, COUNT, drafting(loaded(models / "other.gguf")))
    assert other.acceptance < 0.2
    assert sum(step[0] for step in other.steps) < COUNT / 4, "it has been switched off"


def test_a_request_that_is_repeated_is_decoded_in_the_same_steps(models: Path, target: Target) -> None:
    model = loaded(models / "tiny.gguf")
    first, again = (target.decode(PROMPT, COUNT, drafting(model), temperature=0.9) for _ in range(2))
    assert first == again


def test_prompt_lookup_finds_what_the_prompt_says(models: Path) -> None:
    """The script is in the prompt, so the answer is guessed from it."""
    target = Target(models / "script.gguf")
    script = [VOCAB.id_of(word) for word in (" one", " two", " three", " four")]
    prompt = [1, *script, 2, VOCAB.id_of(" the"), *script, 2, VOCAB.id_of(" house")]
    lookup = make_speculation(
        draft_num_predict=-1, prompt_lookup=True, model=None, scope="", vocab_size=len(VOCAB.pieces)
    )
    plain = target.decode(prompt, 24)
    found = target.decode(prompt, 24, lookup)
    assert found.tokens == plain.tokens
    assert found.acceptance > 0.6
    assert len(found.steps) < len(plain.steps) / 2


# What it guesses


def test_the_draft_says_what_it_would_say_itself(models: Path, target: Target) -> None:
    expected = target.decode(PROMPT, 12).tokens
    model = loaded(models / "tiny.gguf")
    found = guess_of(model, PROMPT, 12)
    assert 1 <= len(found) <= 12
    assert found == expected[: len(found)]


def test_a_guess_that_it_doubts_is_its_last_but_the_first_is_made(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = loaded(models / "tiny.gguf")
    monkeypatch.setattr(draft, "_LEAST_LIKELY", 1.1)
    assert len(guess_of(model, PROMPT, 5)) == 1
    monkeypatch.setattr(draft, "_LEAST_LIKELY", 0.0)
    assert len(guess_of(model, PROMPT, 5)) == 5


def test_it_keeps_what_it_has_read(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = loaded(models / "tiny.gguf")
    read = _watch(model, monkeypatch)
    monkeypatch.setattr(draft, "_LEAST_LIKELY", 0.0)
    found = guess_of(model, PROMPT, 3)
    assert read == [len(PROMPT), 1, 1]
    read.clear()
    # Accepted as far as it was guessed, and one token more.
    guess_of(model, [*PROMPT, *found, 300], 1)
    assert sum(read) == 2
    read.clear()
    # All of it was wrong.
    guess_of(model, [*PROMPT, 301], 1)
    assert read == [1]
    read.clear()
    # Another caller learns nothing from how fast this one is served.
    guess_of(model, [*PROMPT, 301], 1, scope="somebody else")
    assert read == [len(PROMPT) + 1]


@given(st.data())
def test_cuts_and_changes_never_lead_it_astray(models: Path, target: Target, data: st.DataObject) -> None:
    """Whatever was drafted before, the first guess is the model's own best token.

    Or one as good: the draft reads tokens in other pieces than the target, and of two scores that are all but equal
    (0.0012 apart was seen) rounding then decides.
    """
    model = loaded_once(models / "tiny.gguf")
    text = list(PROMPT)
    for _ in range(data.draw(st.integers(1, 4))):
        cut = data.draw(st.integers(1, len(text)))
        text = text[:cut] + data.draw(st.lists(st.integers(300, 320), max_size=5))
        [guess] = guess_of(model, text, data.draw(st.integers(1, 6)))[:1]
        assert guess in target.contenders(text, within=0.01)


_LOADED: dict[Path, DraftModel] = {}


def loaded_once(path: Path) -> DraftModel:
    return _LOADED.setdefault(path, _LOADED.get(path) or loaded(path))


def test_a_context_that_is_full_ends_the_drafting(models: Path) -> None:
    model = loaded(models / "short.gguf")
    assert model.num_ctx == 32
    long = [1, *range(300, 330)]
    assert len(guess_of(model, long, 9)) == 1
    assert guess_of(model, [*long, 330], 9) == []
    assert guess_of(model, long, 0) == []


def test_tokens_that_the_draft_does_not_have_end_the_drafting(models: Path) -> None:
    model = loaded(models / "tiny.gguf")
    assert guess_of(model, [*PROMPT, len(VOCAB.pieces) + 3]) == []
    assert guess_of(model, PROMPT)


def test_it_does_not_guess_beyond_an_end(models: Path) -> None:
    model = loaded(models / "script.gguf")
    assert guess_of(model, [1, VOCAB.id_of(" two")], 9) == [VOCAB.id_of(" three"), VOCAB.id_of(" four")]
    assert guess_of(model, [1, VOCAB.id_of(" four")], 9) == []


def test_a_long_prompt_is_read_in_chunks_and_only_when_it_pays(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = [1, *(300 + number % 30 for number in range(150))]
    model = loaded(models / "tiny.gguf")
    read = _watch(model, monkeypatch)
    drafter = model.drafter("")
    text = array("i", prompt)
    answers = []
    for token in range(300, 304):
        text.append(token)
        answers.append(drafter.draft(text, 2))
    assert [bool(answer) for answer in answers] == [False, False, True, True]
    assert read[:2] == [STEP_TOKENS, STEP_TOKENS]
    # As large as the model: reading 151 tokens costs 30 steps, so that is left until the answer has as many.
    model.relative_cost = 1.0
    read.clear()
    dear, text, calls = model.drafter("another"), array("i", prompt), 0
    while not read:
        text.append(300)
        calls += 1
        dear.draft(text, 2)
    assert 25 <= calls <= 40


def _watch(model: DraftModel, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that grows with the size of every batch that is decoded."""
    sizes: list[int] = []
    decode = model._decode

    def watched(chunk: array[int]) -> bool:
        sizes.append(len(chunk))
        return decode(chunk)

    monkeypatch.setattr(model, "_decode", watched)
    return sizes


def test_a_draft_that_cannot_decode_stops_and_says_so(
    models: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = loaded(models / "tiny.gguf")
    llama, _ = engine()
    monkeypatch.setattr(llama, "llama_decode", lambda context, batch: -3)
    assert guess_of(model, PROMPT) == []
    assert capsys.readouterr().err == ("lmd-runner: drafting stops, for the draft model failed to decode (code -3)\n")
    monkeypatch.undo()
    assert guess_of(model, PROMPT) == []


@given(st.lists(st.floats(-50, 50), min_size=1, max_size=8))
def test_likelihood(logits: list[float]) -> None:
    ordered = sorted(logits, reverse=True)
    assert likelihood(ordered) == pytest.approx(math.exp(ordered[0]) / sum(math.exp(each) for each in ordered))
    assert 1 / len(ordered) - 1e-9 <= likelihood(ordered) <= 1


def test_a_likelihood_of_what_is_no_number_is_none() -> None:
    assert likelihood([math.nan, 1.0]) == 0.0
    assert likelihood([math.inf, 1.0]) == 0.0


# Loading


def test_what_a_draft_costs_is_told_from_its_size(models: Path, target: Target) -> None:
    same = load(models / "tiny.gguf", target_bytes=target.size_bytes)
    assert same is not None
    assert same.relative_cost == 1.0


def test_shards(models: Path, tmp_path: Path) -> None:
    whole = make_tiny_llama(tmp_path / "d.gguf")
    shards = split_model(whole, 2)
    model = load(shards)
    assert model is not None
    assert guess_of(model, PROMPT) == guess_of(loaded(models / "tiny.gguf"), PROMPT)


def test_without_a_draft_there_is_none() -> None:
    assert load([]) is None


def test_what_cannot_draft_is_left_out_and_reported(
    models: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    _, log = engine()
    log.gpu_layers = 7
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(TinyModel().to_bytes())
    for path, why in ((models / "mamba.gguf", "cannot take a token back"), (bad, "")):
        assert load(path) is None
        assert "lmd-runner: nothing is drafted, for the draft model cannot be used: " in (err := capfd.readouterr().err)
        assert why in err
    assert log.gpu_layers == 7, "where the model is, not the draft"
    log.gpu_layers = 0


def test_no_memory_for_the_draft_fails_the_load(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llama, log = engine()

    def fail(path: bytes, params: object) -> None:
        log._receive(4, b"ggml: unable to allocate buffer\n", None)

    monkeypatch.setattr(llama, "llama_model_load_from_file", fail)
    with pytest.raises(LoadError, match=r"the draft model: .*unable to allocate") as caught:
        load(models / "tiny.gguf")
    assert caught.value.kind == frames_pb2.LoadFailed.KIND_OUT_OF_MEMORY
    log.out_of_memory = False


def test_a_load_that_nobody_wants_any_more_ends(models: Path) -> None:
    llama, log = engine()
    with pytest.raises(LoadAborted):
        load_draft(
            llama,
            log,
            frames_pb2.Load(draft_paths=[str(models / "tiny.gguf")]),
            num_ctx=64,
            step_tokens=STEP_TOKENS,
            threads=Threads(1, 1),
            target_bytes=1,
            on_progress=lambda fraction: False,
        )
