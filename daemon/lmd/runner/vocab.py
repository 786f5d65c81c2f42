"""The tokenizer of a loaded model."""

from __future__ import annotations

import ctypes
import functools
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

_PIECE_BYTES = 256
_NO_LIMIT = (1 << 31) - 1


class TooManyTokens(Exception):
    """Raised when a text has more tokens than asked for; *count* says how many."""

    def __init__(self, count: int) -> None:
        super().__init__(f"{count} tokens")
        self.count = count


@dataclass(frozen=True, slots=True)
class InsertTokens:
    """The tokens that stand before the text before a gap, before the text after it, and where the gap is filled."""

    before: int
    after: int
    gap: int


class Vocab:
    """Tokens of a model. `piece` may be called from the engine's thread only, everything else from any."""

    def __init__(self, llama: Any, model: Any) -> None:
        self._llama = llama
        self._vocab = llama.llama_model_get_vocab(model)
        self.size = int(llama.llama_vocab_n_tokens(self._vocab))
        self.bos = int(llama.llama_vocab_bos(self._vocab))
        self.eos = int(llama.llama_vocab_eos(self._vocab))
        self.adds_bos = bool(llama.llama_vocab_get_add_bos(self._vocab))
        self.sep = int(llama.llama_vocab_sep(self._vocab))
        self.adds_eos = bool(llama.llama_vocab_get_add_eos(self._vocab))
        self.adds_sep = bool(llama.llama_vocab_get_add_sep(self._vocab))
        self._pieces: dict[int, bytes | None] = {}
        self._buffer = ctypes.create_string_buffer(_PIECE_BYTES)

    def text_of(self, token: int) -> str:
        """Return how a token is written, specials included; empty when the model lacks it."""
        if not 0 <= token < self.size:
            return ""
        text: bytes = self._llama.llama_vocab_get_text(self._vocab, token)
        return text.decode(errors="replace")

    def piece(self, token: int) -> bytes | None:
        """Return the bytes that a token adds to the output, none for a special token; None for one that ends it."""
        if token not in self._pieces:
            self._pieces[token] = self._read_piece(token)
        return self._pieces[token]

    def _read_piece(self, token: int) -> bytes | None:
        if self._llama.llama_vocab_is_eog(self._vocab, token):
            return None
        size = self._llama.llama_token_to_piece(self._vocab, token, self._buffer, len(self._buffer), 0, False)
        if size < 0:
            self._buffer = ctypes.create_string_buffer(-size)
            size = self._llama.llama_token_to_piece(self._vocab, token, self._buffer, len(self._buffer), 0, False)
        return self._buffer.raw[: max(size, 0)]

    def tokenize_prompt(self, text: bytes, limit: int) -> array[int]:
        """Return the tokens of a raw prompt, with the specials that the model's metadata asks for around it.

        Raises:
            TooManyTokens: more than *limit*.
        """
        tokens = self._tokenize(text, limit, add_special=True)
        return tokens or self.start()

    def tokenize_rendered(self, text: bytes, limit: int) -> array[int]:
        """Return the tokens of a rendered template.

        A model that wants a first token gets it once, whether or not the template has written it. Nothing is added at
        the end: the model is to go on there.

        Raises:
            TooManyTokens: more than *limit*.
        """
        tokens = self._tokenize(text, limit, add_special=False)
        if self.adds_bos and self.bos >= 0 and (not tokens or tokens[0] != self.bos):
            if len(tokens) == limit:
                raise TooManyTokens(limit + 1)
            tokens.insert(0, self.bos)
        return tokens or self.start()

    def tokenize(self, text: bytes, *, add_special: bool, parse_special: bool) -> array[int]:
        """Return the tokens of a text, however many.

        *add_special* adds what the model's metadata asks for around a prompt; *parse_special* makes text that names a
        special token that token.
        """
        return self._tokenize(text, _NO_LIMIT, add_special=add_special, parse_special=parse_special)

    def detokenize(self, tokens: array[int]) -> bytes:
        """Return the text of tokens as the tokenizer writes it, specials included.

        All of them must be tokens of the model.
        """
        native = (ctypes.c_int32 * len(tokens)).from_buffer(tokens) if tokens else (ctypes.c_int32 * 0)()
        room = _PIECE_BYTES + 8 * len(tokens)
        while True:
            buffer = ctypes.create_string_buffer(room)
            size = self._llama.llama_detokenize(self._vocab, native, len(tokens), buffer, room, False, True)
            if size >= 0:
                return buffer.raw[:size]
            room = -size

    def hidden_tokens(self, texts: Iterable[str]) -> dict[int, bytes]:
        """Return the special tokens in these texts that add nothing to the output and do not end it, as written."""
        found: dict[int, bytes] = {}
        for text in texts:
            for token in self.tokenize(text.encode(), add_special=False, parse_special=True):
                if self.piece(token) == b"" and (written := self._written(token)):
                    found[token] = written
        return found

    def pieces(self, tokens: array[int]) -> list[bytes]:
        """Return the bytes of each token, specials as they are written."""
        known = {token: self._written(token) for token in set(tokens)}
        return [known[token] for token in tokens]

    def _written(self, token: int) -> bytes:
        room = _PIECE_BYTES
        while True:
            # Not the engine's buffer: this may be another thread.
            buffer = ctypes.create_string_buffer(room)
            size = self._llama.llama_token_to_piece(self._vocab, token, buffer, room, 0, True)
            if size >= 0:
                return buffer.raw[:size]
            room = -size

    def start(self) -> array[int]:
        """Return what an empty prompt begins with, so that there is something to continue."""
        start = self.bos if self.bos >= 0 else self.eos
        return array("i", [start] if start >= 0 else [])

    def _tokenize(self, text: bytes, limit: int, *, add_special: bool, parse_special: bool = True) -> array[int]:
        # A token has at least one byte, save those that are added, so short texts need no large buffer.
        room = min(limit, len(text) + 8)
        buffer = (ctypes.c_int32 * room)()
        count = self._llama.llama_tokenize(self._vocab, text, len(text), buffer, room, add_special, parse_special)
        if count < 0:
            if -count > limit or -count <= room:
                raise TooManyTokens(max(-count, limit + 1))
            buffer = (ctypes.c_int32 * -count)()
            count = self._llama.llama_tokenize(self._vocab, text, len(text), buffer, -count, add_special, parse_special)
        tokens = array("i")
        tokens.frombytes(memoryview(buffer).cast("B")[: count * tokens.itemsize])
        return tokens

    @functools.cached_property
    def ends(self) -> tuple[int, ...]:
        """The tokens that end an answer. Asking for them the first time takes 30 ms with 128,256 tokens (measured)."""
        is_end, vocab = self._llama.llama_vocab_is_eog, self._vocab
        return tuple(token for token in range(self.size) if is_end(vocab, token))

    @functools.cached_property
    def suppressed(self) -> tuple[int, ...]:
        """The tokens that the model's metadata forbids to say (`tokenizer.ggml.suppress_tokens`)."""
        count = ctypes.c_int32()
        tokens = self._llama.llama_vocab_get_suppress_tokens(self._vocab, ctypes.byref(count))
        return tuple(token for token in tokens[: count.value] if 0 <= token < self.size) if count.value else ()

    @functools.cached_property
    def insert_tokens(self) -> InsertTokens | None:
        """The tokens with which the model fills gaps; None when it lacks one of them."""
        llama, vocab = self._llama, self._vocab
        found = InsertTokens(
            int(llama.llama_vocab_fim_pre(vocab)),
            int(llama.llama_vocab_fim_suf(vocab)),
            int(llama.llama_vocab_fim_mid(vocab)),
        )
        return found if min(found.before, found.after, found.gap) >= 0 else None

    @property
    def handle(self) -> Any:
        """The engine's pointer."""
        return self._vocab
