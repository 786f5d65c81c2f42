"""Real vocabularies for tests of formats, and a model that says anything it may."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
from llguidance import LLMatcher

from lmd.runner.after_thinking import AfterThinking
from lmd.runner.log import install_log
from lmd.runner.native import load_bindings
from lmd.runner.structured import Constraint, FormatCompiler
from lmd.runner.v1.frames_pb2 import Format
from lmd.runner.vocab import Vocab


class Tokenizer:
    """The vocabulary of a model file, without its weights."""

    def __init__(self, path: Path) -> None:
        self.llama: Any = load_bindings()
        install_log(self.llama, lambda level, text, data: None)
        parameters = self.llama.llama_model_default_params()
        parameters.vocab_only = True
        self._model = self.llama.llama_model_load_from_file(str(path).encode(), parameters)
        assert self._model, path
        self.vocab = Vocab(self.llama, self._model)
        self.compiler = FormatCompiler(self.llama, self.vocab)
        self.ends = {token for token in range(self.vocab.size) if self.vocab.piece(token) is None}
        self._logits = np.zeros(self.vocab.size, dtype=np.float32)

    def compile(self, **format_: Any) -> Constraint:
        return self.compiler.compile(Format(**format_))

    def parser_of(self, lark: str) -> LLMatcher:
        """Return the parser below a constraint for a grammar in Lark."""
        self.compile(regex="a")
        tokenizer = self.compiler._tokenizer
        assert tokenizer is not None
        return LLMatcher(tokenizer, LLMatcher.grammar_from_lark(lark), log_level=0)

    def tokenize(self, text: str) -> list[int]:
        """Return tokens that are exactly *text*, the way the model was trained to write it where that is possible."""
        tokens = list(self.vocab.tokenize_rendered(text.encode(), 10_000))
        while tokens and not self.vocab.piece(tokens[0]):
            del tokens[0]
        if self.text(tokens) == text.encode():
            return tokens
        single = {self.vocab.piece(token): token for token in reversed(range(self.vocab.size))}
        return [single[bytes([byte])] for byte in text.encode()]

    def spell(self, text: str) -> set[int]:
        """Return the tokens that are exactly *text*; a character has its own and that of its byte."""
        return {token for token in range(self.vocab.size) if self.vocab.piece(token) == text.encode()}

    def text(self, tokens: list[int]) -> bytes:
        return b"".join(self.vocab.piece(token) or b"" for token in tokens)

    def allowed(self, constraint: Constraint | AfterThinking) -> list[int]:
        """Return the tokens whose logits a constraint leaves alone."""
        self._logits.fill(0)
        constraint.mask(self._logits.ctypes.data, self.vocab.size)
        allowed: list[int] = np.flatnonzero(self._logits == 0).tolist()
        return allowed

    def ramble(self, constraint: Constraint | AfterThinking, seed: int, length: int) -> tuple[bytes, bool]:
        """Say any token that is allowed, until nothing may follow; return the text and whether it was ended.

        After *length* tokens it prefers what ends things.
        """
        choices = random.Random(seed)
        said: list[int] = []
        while not constraint.complete:
            allowed = self.allowed(constraint)
            assert allowed, (self.text(said), "nothing may follow, and the constraint is not complete")
            closing = [token for token in allowed if token in self.ends or self.vocab.piece(token) in _CLOSING]
            if len(said) >= 4 * length:
                return self.text(said), False
            token = choices.choice(closing if closing and len(said) >= length else allowed)
            assert constraint.accept(token), self.text([*said, token])
            said.append(token)
        return self.text(said), True


_CLOSING = {b'"', b"}", b"]", b")", b"\n"}
