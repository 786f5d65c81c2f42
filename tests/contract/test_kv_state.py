"""Saving and restoring sequences with the real engine: what goes on after a restore is what would have gone on."""

from __future__ import annotations

import gc
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lmd.runner.batch import Batch
from lmd.runner.kv_files import KvFiles
from lmd.runner.kv_state import SequenceState, fingerprint
from lmd.runner.log import install_log
from lmd.runner.memory import Memory
from lmd.runner.native import load_bindings
from lmd.runner.saved_prefixes import WORTH_TOKENS, Candidate, SavedPrefixes
from tests.support.tiny_models import make_tiny_gemma, make_tiny_llama, make_tiny_mamba

CTX = 256
SEQUENCES = 4
STEP = 64

KINDS: dict[str, Callable[..., Path]] = {
    "llama": make_tiny_llama,
    "gemma": make_tiny_gemma,
    "mamba": make_tiny_mamba,
}


@pytest.fixture(scope="session")
def llama() -> Any:
    bindings = load_bindings()
    install_log(bindings, lambda level, text, data: None)
    bindings.llama_backend_init()
    return bindings


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory, llama: Any) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("models")
    loaded = {}
    for kind, make in KINDS.items():
        path = make(folder / f"{kind}.gguf")
        loaded[kind] = llama.llama_model_load_from_file(str(path).encode(), llama.llama_model_default_params())
        assert loaded[kind]
    return loaded


class Context:
    """A context with some sequences, as the runner makes it."""

    def __init__(self, llama: Any, native: Any, *, cells: int = CTX * 2, flash_attention: bool = False) -> None:
        self.llama, self.native = llama, native
        params = llama.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = cells, STEP, STEP
        params.n_seq_max = params.n_outputs_max = SEQUENCES
        params.kv_unified, params.swa_full, params.no_perf = True, False, True
        params.flash_attn_type = int(flash_attention)
        params.n_threads = params.n_threads_batch = 1
        self.context = llama.llama_init_from_model(native, params)
        self.memory = Memory(llama, self.context, native)
        self.state = SequenceState(llama, self.context)
        self.batch = Batch(llama, STEP, SEQUENCES)
        self.vocab_size = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(native))

    def read(self, tokens: list[int], sequence: int = 0, *, begin: int = 0) -> int:
        """Decode a prompt; return the greedy next token."""
        prompt = array("i", tokens)
        for at in range(0, len(prompt), STEP):
            chunk = prompt[at : at + STEP]
            self.batch.clear()
            last = at + STEP >= len(prompt)
            index = self.batch.add_chunk(chunk, begin + at, sequence, sample=last)
            assert self.llama.llama_decode(self.context, self.batch.finish()) == 0
        scores = self.llama.llama_get_logits_ith(self.context, index)
        return max(range(self.vocab_size), key=scores.__getitem__)

    def go_on(self, token: int, length: int, count: int = 24, sequence: int = 0) -> list[int]:
        """Generate greedily after *length* tokens, the next of which is *token*."""
        generated = [token]
        for position in range(length, length + count):
            generated.append(self.read([generated[-1]], sequence, begin=position))
        return generated

    def saved(self, length: int, sequence: int = 0) -> bytearray:
        buffer = bytearray(self.state.size(sequence))
        with memoryview(buffer) as view:
            assert self.state.save(sequence, length, view)
        return buffer

    def restores(self, state: bytearray, length: int, sequence: int = 0) -> bool:
        with memoryview(state) as view:
            return self.state.restore(sequence, view, length)

    def positions(self, sequence: int) -> tuple[int, int]:
        memory = self.llama.llama_get_memory(self.context)
        return (
            self.llama.llama_memory_seq_pos_min(memory, sequence),
            self.llama.llama_memory_seq_pos_max(memory, sequence),
        )

    def fingerprint(self, **settings: object) -> bytes:
        return fingerprint(self.llama, self.native, self.context, "1.2.3", **settings)

    def close(self) -> None:
        self.llama.llama_free(self.context)


Make = Callable[..., Context]


@pytest.fixture
def make(llama: Any, models: dict[str, Any]) -> Iterator[Make]:
    made: list[Context] = []

    def make(kind: str = "llama", **options: Any) -> Context:
        made.append(Context(llama, models[kind], **options))
        return made[-1]

    yield make
    for context in made:
        context.close()


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return [1] + [300 + (position * 37 + seed * 11) % 150 for position in range(length - 1)]


kinds = pytest.mark.parametrize("kind", sorted(KINDS))


@kinds
@pytest.mark.parametrize("flash_attention", [False, True])
def test_what_follows_is_the_same_after_a_restore(make: Make, kind: str, flash_attention: bool) -> None:
    prompt = prompt_of(100)
    before = make(kind, flash_attention=flash_attention)
    token = before.read(prompt)
    state = before.saved(len(prompt))
    expected = before.go_on(token, len(prompt))
    assert len(set(expected)) > 3, "a model that repeats itself shows nothing"

    after = make(kind, flash_attention=flash_attention)
    assert after.restores(state, len(prompt))
    assert after.positions(0)[1] == len(prompt) - 1
    assert after.go_on(token, len(prompt)) == expected


@kinds
def test_a_state_goes_in_beside_other_sequences_and_changes_none(make: Make, kind: str) -> None:
    """Into free cells between theirs, and under another number."""
    prompt, other = prompt_of(100), prompt_of(90, seed=1)
    before = make(kind)
    token = before.read(prompt)
    state = before.saved(len(prompt))
    expected = before.go_on(token, len(prompt))

    after = make(kind)
    after.read(prompt_of(50, seed=2), sequence=0)
    other_token = after.read(other, sequence=1)
    after.read(prompt_of(30, seed=3), sequence=3)
    after.memory.clear(0)  # a gap that is too short for the state
    assert after.restores(state, len(prompt), sequence=2)
    assert after.go_on(token, len(prompt), sequence=2) == expected

    alone = make(kind)
    alone_token = alone.read(other)
    assert after.go_on(other_token, len(other), sequence=1) == alone.go_on(alone_token, len(other))


@kinds
def test_a_restore_replaces_what_the_sequence_held(make: Make, kind: str) -> None:
    prompt = prompt_of(100)
    context = make(kind)
    token = context.read(prompt)
    state = context.saved(len(prompt))
    expected = context.go_on(token, len(prompt))
    context.memory.clear(0)
    context.read(prompt_of(120, seed=5))
    assert context.restores(state, len(prompt))
    assert context.go_on(token, len(prompt)) == expected


def test_cells_that_are_shared_are_saved_with_each_sequence(make: Make) -> None:
    """A unified cache: the copy moves no data, and both states are whole."""
    shared, tail = prompt_of(80), prompt_of(20, seed=4)
    context = make()
    context.read(shared, sequence=0)
    assert context.memory.copy(0, 1, len(shared))
    token = context.read(tail, sequence=1, begin=len(shared))
    state = context.saved(len(shared) + len(tail), sequence=1)
    expected = context.go_on(token, 100, sequence=1)

    after = make()
    assert after.restores(state, 100)
    assert after.go_on(token, 100) == expected


def test_the_beginning_of_a_sequence_is_saved_through_a_copy(make: Make) -> None:
    prompt = prompt_of(100)
    context = make()
    context.read(prompt)
    assert context.memory.copy(0, 3, 60)
    state = context.saved(60, sequence=3)
    context.memory.clear(3)

    after = make()
    assert after.restores(state, 60)
    token = after.read(prompt[60:], begin=60)
    alone = make()
    assert after.go_on(token, 100) == alone.go_on(alone.read(prompt), 100)


def test_the_beginning_of_what_was_restored_can_be_used(make: Make) -> None:
    prompt = prompt_of(100)
    context = make()
    context.read(prompt)
    after = make()
    assert after.restores(context.saved(100), 100)
    assert after.memory.keep(0, 60)
    other = prompt_of(30, seed=6)
    token = after.read(other, begin=60)
    alone = make()
    assert after.go_on(token, 90) == alone.go_on(alone.read(prompt[:60] + other), 90)


def test_a_window_leaves_out_what_it_has_passed(make: Make) -> None:
    context = make("gemma")
    context.read(prompt_of(100))
    whole = make("gemma")
    assert whole.restores(context.saved(100), 100)
    first, last = whole.positions(0)
    assert 100 - 16 <= first + 1 <= last == 99


# Refusals


@kinds
def test_a_sequence_that_is_not_what_was_thought_is_not_saved(make: Make, kind: str) -> None:
    context = make(kind)
    context.read(prompt_of(40))
    with memoryview(bytearray(context.state.size(0))) as right:
        assert not context.state.save(0, 39, right)
        assert not context.state.save(0, 41, right)
        assert not context.state.save(1, 40, right)
        assert context.state.save(0, 40, right)
    with memoryview(bytearray(context.state.size(0) - 1)) as short:
        assert not context.state.save(0, 40, short)


@kinds
def test_a_state_of_another_length_is_refused_and_leaves_nothing(make: Make, kind: str) -> None:
    context = make(kind)
    context.read(prompt_of(40))
    state = context.saved(40)
    assert not context.restores(state, 41, sequence=1)
    assert context.positions(1) == (-1, -1)
    assert context.restores(state, 40, sequence=1)


@kinds
def test_a_cut_state_is_refused_and_harms_no_other_sequence(make: Make, kind: str) -> None:
    context = make(kind)
    prompt = prompt_of(40)
    token = context.read(prompt)
    state = context.saved(40)
    for length in (0, 1, 8, 20, len(state) // 2, len(state) - 1):
        if length:
            assert not context.restores(state[:length], 40, sequence=1)
        assert context.positions(1) == (-1, -1)
    assert not context.restores(state + b"\0", 40, sequence=1)
    alone = make(kind)
    assert context.go_on(token, 40) == alone.go_on(alone.read(prompt), 40)


def test_a_memory_that_is_too_full_refuses_and_keeps_the_others(make: Make) -> None:
    context = make(cells=256)
    other = prompt_of(180, seed=1)
    token = context.read(other, sequence=0)
    assert context.memory.copy(0, 1, 100)
    state = context.saved(100, sequence=1)
    context.memory.clear(1)
    assert not context.restores(state, 100, sequence=1)
    assert context.positions(1) == (-1, -1)
    alone = make(cells=256)
    assert context.go_on(token, 180) == alone.go_on(alone.read(other), 180)


def test_a_state_of_another_model_or_attention_is_refused(make: Make) -> None:
    context = make()
    context.read(prompt_of(40))
    state = context.saved(40)
    assert not make(flash_attention=True).restores(state, 40)
    assert not make("gemma").restores(state, 40)
    assert not make("mamba").restores(state, 40)


def test_nothing_holds_a_buffer_afterwards(make: Make) -> None:
    """`ctypes.cast` makes a cycle that keeps a mapped file open until the next collection."""
    context = make()
    context.read(prompt_of(40))
    gc.disable()
    try:
        state = context.saved(40)  # releases its view, which fails while something holds it
        assert context.restores(state, 40, sequence=1)
        state.append(0)
    finally:
        gc.enable()


# Fingerprints


def test_a_fingerprint_tells_engines_contexts_models_and_settings_apart(make: Make) -> None:
    context = make()
    assert context.fingerprint() == make().fingerprint()
    others = {
        context.fingerprint(),
        make(cells=CTX * 4).fingerprint(),
        make("gemma").fingerprint(),
        make("mamba").fingerprint(),
        context.fingerprint(flash_attention=True),
        fingerprint(context.llama, context.native, context.context, "1.2.4"),
    }
    assert len(others) == 6
    assert {len(value) for value in others} == {16}


# Files and states together


def files_of(path: Path, context: Context, *, quota_bytes: int = 1 << 30) -> KvFiles:
    files = KvFiles(path, quota_bytes, context.fingerprint(), divisible=context.memory.shares_freely, keep_free_bytes=0)
    files.open()
    return files


def opened(path: Path, context: Context) -> SavedPrefixes:
    return SavedPrefixes(files_of(path, context), context.state)


def candidate(tokens: list[int], sequence: int = 0, *, used_at: float = 1, scope: str = "a") -> Candidate:
    return Candidate(sequence, array("i", tokens), scope, False, used_at)


@kinds
def test_prefixes_come_back_from_disk(make: Make, kind: str, tmp_path: Path) -> None:
    prompt, other = prompt_of(100), prompt_of(80, seed=1)
    before = make(kind)
    token = before.read(prompt, sequence=0)
    before.read(other, sequence=1)
    candidates = [candidate(prompt, 0), candidate(other, 1, used_at=2)]
    assert opened(tmp_path, before).save(candidates, allowed_s=60) == 2
    expected = before.go_on(token, len(prompt))

    after = make(kind)
    prefixes = opened(tmp_path, after)
    asked = array("i", [*prompt, token])
    match = prefixes.find(asked, "a", in_memory=len(prompt) - WORTH_TOKENS)
    assert match is not None
    saved, shared = match
    assert shared == len(prompt)
    assert prefixes.find(asked, "a", in_memory=len(prompt) - WORTH_TOKENS + 1) is None
    assert prefixes.find(asked, "b", in_memory=0) is None
    assert prefixes.restore(saved, 2, make_room=lambda: False)
    assert after.go_on(token, len(prompt), sequence=2) == expected


def test_a_file_that_does_not_go_in_is_removed(make: Make, tmp_path: Path) -> None:
    """The fingerprint says that it fits, and yet: nothing that fails once is tried with every request."""
    before = make()
    before.read(prompt_of(50))
    assert opened(tmp_path, before).save([candidate(prompt_of(50))], allowed_s=60) == 1
    other = make(flash_attention=True)
    files = files_of(tmp_path, before)
    room = iter([True, True, False])
    assert not SavedPrefixes(files, other.state).restore(files.saved[0], 0, make_room=lambda: next(room))
    assert other.positions(0) == (-1, -1)
    assert list(tmp_path.iterdir()) == []


def test_a_full_memory_makes_room_for_what_is_restored(make: Make, tmp_path: Path) -> None:
    before = make(cells=256)
    token = before.read(prompt_of(100))
    opened(tmp_path, before).save([candidate(prompt_of(100))], allowed_s=60)
    expected = before.go_on(token, 100)

    after = make(cells=256)
    for sequence in (0, 1, 2):
        after.read(prompt_of(80, seed=sequence + 1), sequence)
    held = [2, 1, 0]

    def make_room() -> bool:
        after.memory.clear(held.pop())
        return True

    files = files_of(tmp_path, after)
    assert SavedPrefixes(files, after.state).restore(files.saved[0], 3, make_room=make_room)
    assert held == [2]
    assert after.go_on(token, 100, sequence=3) == expected


def test_the_most_recently_used_are_saved_first_and_short_ones_not_at_all(make: Make, tmp_path: Path) -> None:
    context = make()
    prompts = [prompt_of(WORTH_TOKENS - 1), prompt_of(60, seed=1), prompt_of(60, seed=2)]
    for sequence, prompt in enumerate(prompts):
        context.read(prompt, sequence)
    candidates = [candidate(prompt, sequence, used_at=sequence) for sequence, prompt in enumerate(prompts)]
    room_for_one = context.state.size(1) + 8192
    files = files_of(tmp_path, context, quota_bytes=room_for_one)
    assert SavedPrefixes(files, context.state).save(candidates, allowed_s=60) == 1
    assert [saved.used_at for saved in files.saved] == [2]


def test_no_time_saves_nothing(make: Make, tmp_path: Path) -> None:
    context = make()
    context.read(prompt_of(60))
    assert opened(tmp_path, context).save([candidate(prompt_of(60))], allowed_s=0) == 0
    assert list(tmp_path.iterdir()) == []
