"""Structured output: what a model may say next so that its whole answer has the format that was asked for.

llguidance does the work: it keeps a parser beside each answer and computes, for each step, which tokens of the
vocabulary may follow. This module builds the parsers, bounds what a format may cost, and applies the masks to logits.
Formats come from strangers: compiling is bounded by the size of the input and by llguidance's limits, and everything
the parser does later is bounded per token.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any, TypeVar, overload

import llguidance

from lmd.runner.after_thinking import AfterThinking, GateTables
from lmd.runner.answer_style import CHANNEL_MARKERS, Gate
from lmd.runner.forced_calls import CallGrammar
from lmd.runner.format_error import FormatError, explain
from lmd.runner.gbnf import parse_gbnf
from lmd.runner.gbnf_forced import check_forced
from lmd.runner.gbnf_lark import to_lark
from lmd.runner.json_schema import OPTIONS, prepare_schema
from lmd.runner.marker_tokens import marker_tokens
from lmd.runner.token_mask import forbid
from lmd.runner.v1 import frames_pb2
from lmd.runner.vocab import Vocab

__all__ = ["Constraint", "FormatCompiler", "FormatError"]

_MAX_REGEX_CHARACTERS = 16 * 1024
_CACHED_FORMATS = 16
_CACHED_GATES = 4
_MAX_CACHED_CHARACTERS = 32 * 1024
# References can be nested as deep as there is room for in a schema. llguidance follows them recursively: 8,000 levels
# need less than 64 MB of stack, which no thread has by default. Only what is touched takes memory.
_COMPILE_STACK_BYTES = 256 * 1024 * 1024
_PIECE_BYTES = 256
# Marks a token for llguidance as one that stands for no text.
_SPECIAL = b"\xff"

_T = TypeVar("_T")


def _limits() -> llguidance.LLParserLimits:
    """Return the limits of work for one token and of memory."""
    return llguidance.LLParserLimits(
        initial_lexer_fuel=1_000_000,
        step_lexer_fuel=1_000_000,
        # A grammar of single characters needs the most: less than 50,000 in a JSON string with 128,000 tokens.
        step_max_items=100_000,
        # Four for each optional property of an object.
        max_items_in_row=10_000,
        max_lexer_states=50_000,
        max_grammar_size=200_000,
        verbose_errors=False,
    )


class Effort:
    """Ends answers whose format costs the engine too much time, since all answers wait for it.

    Each token may take 50 ms of processor time, and 1 s more may be overdrawn in the course of an answer. Formats that
    somebody means take well below 10 ms.
    """

    _PER_TOKEN_NS = 50_000_000
    _OVERDRAFT_NS = 1_000_000_000

    def __init__(self) -> None:
        self._debt_ns = 0

    def spend(self, time_ns: int) -> None:
        """Note what a token took.

        Raises:
            FormatError: it was too much.
        """
        self._debt_ns = max(0, self._debt_ns + time_ns - self._PER_TOKEN_NS)
        if self._debt_ns > self._OVERDRAFT_NS:
            raise FormatError("the format takes too much time; use smaller repeat counts or fewer alternatives")


class FormatCompiler:
    """Makes constraints for one model. Any thread may call it; it works for one at a time."""

    def __init__(self, llama: Any, vocab: Vocab) -> None:
        self._llama = llama
        self._vocab = vocab
        self._end_tokens: frozenset[int] = frozenset()
        self._end_bits = b""
        # Protects everything below, and the templates from being copied by two threads.
        self._lock = threading.Lock()
        self._tokenizer: llguidance.LLTokenizer | None = None
        self._templates: OrderedDict[bytes, Constraint] = OrderedDict()
        self._pieces: list[bytes] = []
        self._silent: frozenset[int] = frozenset()
        self._gates: OrderedDict[Gate, GateTables] = OrderedDict()

    @overload
    def compile(self, format: frames_pb2.Format | CallGrammar) -> Constraint: ...

    @overload
    def compile(self, format: frames_pb2.Format | CallGrammar, gate: Gate | None) -> Constraint | AfterThinking: ...

    def compile(self, format: frames_pb2.Format | CallGrammar, gate: Gate | None = None) -> Constraint | AfterThinking:
        """Return a constraint for a new answer, or for what it has after *gate*. Blocks: call it in a worker thread.

        The first call for a model builds the tokenizer: 0.3 s for 128,000 tokens, in two steps that each hold the
        interpreter's lock. Everything else lets other threads run.

        Raises:
            FormatError: the format cannot be honoured.
        """
        if isinstance(format, CallGrammar):
            key = b"calls" + format.key
        else:
            key = b"format" + format.SerializeToString(deterministic=True)
        with self._lock:
            template = self._templates.get(key)
            if template is None:
                template = self._compile(format)
                if len(key) <= _MAX_CACHED_CHARACTERS:
                    self._templates[key] = template
                    while len(self._templates) > _CACHED_FORMATS:
                        self._templates.popitem(last=False)
            else:
                self._templates.move_to_end(key)
            return template.copy() if gate is None else AfterThinking(self._tables_of(gate), template.copy())

    def _tables_of(self, gate: Gate) -> GateTables:
        """Return what a gate means here, once there is a tokenizer."""
        tables = self._gates.get(gate)
        if tables is None:
            pieces = list(self._pieces)
            written = "".join((gate.opener, gate.closer, gate.lead, gate.lead_after)).encode()
            tokens = self._vocab.tokenize(written, add_special=False, parse_special=True)
            for token, piece in zip(tokens, self._vocab.pieces(tokens), strict=True):
                if token in self._silent:
                    pieces[token] = piece
            tables = self._gates[gate] = GateTables(gate, pieces, self._end_tokens)
            while len(self._gates) > _CACHED_GATES:
                self._gates.popitem(last=False)
        return tables

    def _compile(self, format: frames_pb2.Format | CallGrammar) -> Constraint:
        if self._tokenizer is None:
            self._tokenizer = self._build_tokenizer()
        tokenizer = self._tokenizer
        if isinstance(format, CallGrammar):
            markers = marker_tokens(self._vocab, dict.fromkeys((*format.markers, *CHANNEL_MARKERS)))
            special = {marker: token for token, marker in markers.items() if token in self._silent}
            grammar = llguidance.LLMatcher.grammar_from_lark(format.lark(special))
            fail = _failing("the grammar of the functions", format.patterns)
        else:
            grammar, fail = _grammar_of(format)
        matcher = _with_deep_stack(lambda: llguidance.LLMatcher(tokenizer, grammar, log_level=0, limits=_limits()))
        if matcher.is_error():
            raise fail(matcher.get_error())
        constraint = Constraint(matcher, self._vocab, self._end_tokens, self._end_bits)
        try:
            _with_deep_stack(constraint.try_out)
        except FormatError as error:
            raise fail(matcher.get_error()) if matcher.is_error() else error from None
        return constraint

    def _build_tokenizer(self) -> llguidance.LLTokenizer:
        """Tell llguidance the bytes of each token, exactly as the engine puts them out."""
        llama, handle, size = self._llama, self._vocab.handle, self._vocab.size
        end_tokens = [token for token in range(size) if llama.llama_vocab_is_eog(handle, token)]
        self._pieces = self._read_pieces()
        self._silent = frozenset(token for token, piece in enumerate(self._pieces) if not piece) - set(end_tokens)
        # A token without text would let a model go on for ever without saying anything.
        tokens = [piece or _SPECIAL + b"%d" % token for token, piece in enumerate(self._pieces)]
        for token in end_tokens:
            tokens[token] = _SPECIAL + tokens[token]
        self._end_tokens = frozenset(end_tokens)
        if not end_tokens:
            # llguidance needs one; the model cannot say it, so its answers end when they are complete.
            end_tokens = [size]
            tokens.append(_SPECIAL + b"end")
        self._end_bits = sum(1 << token for token in end_tokens).to_bytes(-(-len(tokens) // 32) * 4, "little")
        # Its own tokenizer comes from a function pointer: what a format forces is then written with the tokens that
        # the model knows, and not character by character. The vocabulary must outlive this object.
        build = llguidance.LLTokenizer.from_llamacpp  # type: ignore[attr-defined]
        tokenizer: llguidance.LLTokenizer = build(
            tokens=tokens,
            vocab_ptr=handle,
            tokenize_fptr=ctypes.cast(llama._lib.llama_tokenize, ctypes.c_void_p).value,
            eos_token=end_tokens,
            slices=[],
        )
        # Slices are sets of tokens that are allowed or forbidden together. These two save walking through the whole
        # vocabulary inside a JSON string: 50 instead of 800 us a token.
        return tokenizer.with_slices(llguidance.LLTokenizer.json_slices()[1::2])

    def _read_pieces(self) -> list[bytes]:
        """Return the bytes of each token. Not through `Vocab`: its cache and buffer belong to the engine's thread."""
        llama, handle = self._llama, self._vocab.handle
        buffer = ctypes.create_string_buffer(_PIECE_BYTES)
        pieces = []
        for token in range(self._vocab.size):
            size = llama.llama_token_to_piece(handle, token, buffer, len(buffer), 0, False)
            if size < 0:
                buffer = ctypes.create_string_buffer(-size)
                size = llama.llama_token_to_piece(handle, token, buffer, len(buffer), 0, False)
            pieces.append(buffer.raw[: max(size, 0)])
        return pieces


class Constraint:
    """Follows one answer and says which tokens may come next. For one thread, the engine's."""

    def __init__(
        self, matcher: llguidance.LLMatcher, vocab: Vocab, end_tokens: frozenset[int], end_bits: bytes
    ) -> None:
        self._matcher = matcher
        self._vocab = vocab
        self._end_tokens = end_tokens
        # What is allowed when the answer is complete.
        self._end_bits = end_bits
        self._effort = Effort()
        self._count = 0
        self._ended = False
        # How many tokens had been accepted when only the end could follow; -1 while that is not known.
        self._complete_at = -1

    @property
    def complete(self) -> bool:
        """Nothing but the end can follow."""
        return self._ended or self._complete_at == self._count or self._matcher.is_stopped()

    @property
    def accepting(self) -> bool:
        """The text so far is valid as a whole."""
        return self._ended or self._matcher.is_accepting()

    def allowed(self) -> bytes:
        """Return a bit for each token, lowest first, in whole 32-bit words: whether it may come next.

        Raises:
            FormatError: the format turns out to be too complex here.
        """
        if self.complete:
            return self._end_bits
        started_ns = time.thread_time_ns()
        bits = self._matcher.compute_bitmask()
        self._check()
        self._effort.spend(time.thread_time_ns() - started_ns)
        if bits == self._end_bits:
            self._complete_at = self._count
        return bits

    def mask(self, logits_address: int, count: int) -> None:
        """Set the logits of tokens that may not come next to negative infinity.

        *logits_address* is where *count* float32 values lie, one for each token.

        Raises:
            FormatError: the format turns out to be too complex here.
        """
        forbid(self.allowed(), logits_address, count)

    def accept(self, token: int) -> bool:
        """Go on with a token. Returns False, and stays where it is, when the token may not come next.

        Raises:
            FormatError: the format turns out to be too complex here.
        """
        if token in self._end_tokens:
            if self._ended or not self.accepting:
                return False
            self._ended = True
        elif self.complete or not 0 <= token < self._vocab.size:
            return False
        elif self._matcher.try_consume_tokens([token]) != 1:
            self._check()
            return False
        self._count += 1
        return True

    def try_out(self) -> None:
        """Take a first step and take it back: what is too large often shows only then.

        Raises:
            FormatError: no text can have the format, or it is too complex.
        """
        allowed = int.from_bytes(self.allowed(), "little")
        if not allowed:
            raise FormatError("nothing can have this format")
        if not self.complete:
            self.accept((allowed & -allowed).bit_length() - 1)
            self.rollback(1)

    def rollback(self, count: int) -> None:
        """Take back the last *count* tokens that were accepted."""
        if not 0 <= count <= self._count:
            raise ValueError(f"cannot take back {count} of {self._count} tokens")
        if count == 0:
            return
        self._count -= count
        self._complete_at = -1
        if self._ended:
            # The parser never saw the end token.
            self._ended = False
            count -= 1
        if count and not self._matcher.rollback(count):
            raise RuntimeError(self._matcher.get_error())

    def copy(self) -> Constraint:
        """Return an independent constraint at the same place."""
        other = Constraint(self._matcher.deep_copy(), self._vocab, self._end_tokens, self._end_bits)
        other._count, other._ended, other._complete_at = self._count, self._ended, self._complete_at
        return other

    def _check(self) -> None:
        if self._matcher.is_error():
            raise explain("the format", self._matcher.get_error())


def _grammar_of(format: frames_pb2.Format) -> tuple[str, Callable[[str], FormatError]]:
    """Return what llguidance is to compile, and what makes an error of its complaints."""
    kind = format.WhichOneof("format")
    build = llguidance.LLMatcher
    if kind == "json_object" and format.json_object:
        return build.grammar_from_json_schema('{"type":"object"}', overrides=OPTIONS), _failing("JSON mode")
    if kind == "json_schema":
        schema = prepare_schema(format.json_schema)
        return build.grammar_from_json_schema(schema.text, overrides=OPTIONS), _failing("the schema", schema.patterns)
    if kind == "regex":
        what = "the regular expression"
        _check_regex(format.regex)
        return build.grammar_from_regex(format.regex), _failing(what, {format.regex: what})
    if kind == "gbnf":
        rules = parse_gbnf(format.gbnf)
        check_forced(rules)
        return build.grammar_from_lark(to_lark(rules)), _failing("the grammar")
    raise FormatError("the format is empty; set one of its kinds")


def _failing(what: str, patterns: Mapping[str, str] | None = None) -> Callable[[str], FormatError]:
    return lambda error: explain(what, error, patterns)


def _check_regex(pattern: str) -> None:
    if len(pattern) > _MAX_REGEX_CHARACTERS:
        raise FormatError(
            f"the regular expression has {len(pattern):,} characters, but at most {_MAX_REGEX_CHARACTERS:,} are allowed"
        )
    if (len(pattern) - len(pattern.rstrip("\\"))) % 2:
        # llguidance would take the last backslash for its own delimiter's.
        raise FormatError("the regular expression is no usable regular expression: it ends with a backslash")


def _with_deep_stack(work: Callable[[], _T]) -> _T:
    """Run *work* in a thread with a large stack and return what it returns or raise what it raises."""
    outcome: Future[_T] = Future()

    def run() -> None:
        try:
            outcome.set_result(work())
        except BaseException as error:
            outcome.set_exception(error)

    usual = threading.stack_size(_COMPILE_STACK_BYTES)
    try:
        thread = threading.Thread(target=run, name="compile-format", daemon=True)
        thread.start()
    finally:
        threading.stack_size(usual)
    thread.join()
    return outcome.result()
