"""Plain and speculative decoding in this process, as short as they can be: what the runner's engine is held against."""

from __future__ import annotations

import functools
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lmd.runner.batch import Batch
from lmd.runner.draft import DraftModel, load_draft
from lmd.runner.log import EngineLog
from lmd.runner.memory import Memory
from lmd.runner.native import load_bindings
from lmd.runner.speculation import Speculation, accepted
from lmd.runner.threads import Threads
from lmd.runner.v1 import frames_pb2

STEP_TOKENS = 64


@functools.cache
def engine() -> tuple[Any, EngineLog]:
    """Return the bindings and the log, which the engine calls until the process ends."""
    llama = load_bindings()
    log = EngineLog(llama)
    llama.llama_backend_init()
    return llama, log


def load(path: Path | Sequence[Path], *, target_bytes: int = 1 << 30, num_ctx: int = 256) -> DraftModel | None:
    """Load a draft as a runner does; by default it is tiny beside the model."""
    llama, log = engine()
    paths = [path] if isinstance(path, Path) else path
    return load_draft(
        llama,
        log,
        frames_pb2.Load(draft_paths=[str(each) for each in paths], use_mmap=True),
        num_ctx=num_ctx,
        step_tokens=STEP_TOKENS,
        threads=Threads(1, 1),
        target_bytes=target_bytes,
        on_progress=lambda fraction: True,
    )


@dataclass
class Decoded:
    """An answer, and how it came about: the tokens drafted and accepted in each step."""

    tokens: list[int] = field(default_factory=list)
    steps: list[tuple[int, int]] = field(default_factory=list)

    @property
    def acceptance(self) -> float:
        """Accepted of drafted tokens."""
        drafted = sum(step[0] for step in self.steps)
        return sum(step[1] for step in self.steps) / drafted if drafted else 0.0


class Target:
    """A model that answers, with a context of one sequence."""

    def __init__(self, path: Path, *, num_ctx: int = 256) -> None:
        llama, log = engine()
        self._llama = llama
        self._model = llama.llama_model_load_from_file(str(path).encode(), llama.llama_model_default_params())
        assert self._model, log.errors()
        params = llama.llama_context_default_params()
        params.n_ctx, params.n_seq_max = num_ctx, 1
        params.n_batch = params.n_ubatch = params.n_outputs_max = STEP_TOKENS
        params.flash_attn_type = llama.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self._context = llama.llama_init_from_model(self._model, params)
        llama.llama_set_n_threads(self._context, 1, 1)
        self._memory = Memory(llama, self._context, self._model)
        self._batch = Batch(llama, STEP_TOKENS, 1)
        self.size_bytes = int(llama.llama_model_size(self._model))

    def decode(
        self,
        prompt: Sequence[int],
        count: int,
        speculation: Speculation | None = None,
        *,
        temperature: float = 0.0,
        seed: int = 1,
    ) -> Decoded:
        """Return *count* tokens after *prompt*."""
        chain = self._sampler(temperature, seed)
        self._memory.clear_all()
        done = Decoded()
        # All tokens; the last one is not decoded yet.
        text = array("i", prompt)
        held = 0
        while len(text) - 1 - held >= STEP_TOKENS:
            self._step(text[held : held + STEP_TOKENS], held, all_rows=False)
            held += STEP_TOKENS
        while True:
            # The engine drafts once there is an answer, so never on top of a prompt.
            room = count - len(done.tokens) - 1 if done.tokens else 0
            guess = speculation.draft(text, active=1, room=room) if speculation else []
            first = self._step(text[held:] + array("i", guess), held, all_rows=True) + len(text) - held - 1
            sampled: list[int] = []
            for at in range(len(guess) + 1):
                sampled.append(self._llama.llama_sampler_sample(chain, self._context, first + at))
                if at < len(guess) and sampled[-1] != guess[at]:
                    break
            kept = accepted(guess, sampled)
            if speculation:
                speculation.note(len(guess), kept)
            done.steps.append((len(guess), kept))
            held = len(text) + kept
            assert self._memory.keep(0, held)
            text.extend(sampled)
            done.tokens.extend(sampled)
            if len(done.tokens) >= count:
                break
        self._llama.llama_sampler_free(chain)
        return done

    def contenders(self, prompt: Sequence[int], within: float) -> set[int]:
        """Return the tokens whose scores after *prompt* are at most *within* below the best."""
        self.decode(prompt, 1)
        row = self._llama.llama_get_logits_ith(self._context, -1)
        scores = row[: self._llama.llama_vocab_n_tokens(self._llama.llama_model_get_vocab(self._model))]
        return {token for token, score in enumerate(scores) if score >= max(scores) - within}

    def _step(self, tokens: array[int], position: int, *, all_rows: bool) -> int:
        self._batch.clear()
        if all_rows:
            for offset, token in enumerate(tokens):
                self._batch.add(token, position + offset, 0)
        else:
            self._batch.add_chunk(tokens, position, 0, sample=False)
        assert self._llama.llama_decode(self._context, self._batch.finish()) == 0
        return 0

    def _sampler(self, temperature: float, seed: int) -> Any:
        llama = self._llama
        chain = llama.llama_sampler_chain_init(llama.llama_sampler_chain_default_params())
        if temperature:
            llama.llama_sampler_chain_add(chain, llama.llama_sampler_init_temp(temperature))
            llama.llama_sampler_chain_add(chain, llama.llama_sampler_init_dist(seed))
        else:
            llama.llama_sampler_chain_add(chain, llama.llama_sampler_init_greedy())
        return chain
