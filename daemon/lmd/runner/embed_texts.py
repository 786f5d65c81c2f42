"""Makes tokens of what an `embed` brings: texts, or pairs of a query and a document."""

from __future__ import annotations

from array import array
from dataclasses import dataclass

from lmd.runner.v1 import frames_pb2
from lmd.runner.vocab import Vocab

# Cutting a document of a template by the tokens it has too many may leave it a little too long, as tokens merge anew.
_CUTS = 8


class TextError(Exception):
    """Raised for a text that cannot be embedded; *tokens* is set when it is too long."""

    def __init__(self, message: str, *, field: str = "", tokens: int = 0) -> None:
        super().__init__(message)
        self.field = field
        self.tokens = tokens


@dataclass(frozen=True, slots=True)
class Texts:
    """Reads texts for one model.

    Attributes:
        limit: the most tokens of one text.
        template: how a reranker wants its pairs, with `{query}` and `{document}` in it; empty for the usual form.
    """

    vocab: Vocab
    limit: int
    template: str = ""

    def tokens(self, embed: frames_pb2.Embed) -> list[array[int]]:
        """Return the tokens of each input, in order.

        Raises:
            TextError: one of them is too long, or has no token at all.
        """
        if embed.HasField("query"):
            query = embed.query.encode()
            if self.template:
                return [
                    self._templated(embed.query, text, n, cut=embed.truncate) for n, text in enumerate(embed.inputs)
                ]
            query_tokens = self.vocab.tokenize(query, add_special=False, parse_special=False)
            return [self._pair(query_tokens, text, n, cut=embed.truncate) for n, text in enumerate(embed.inputs)]
        tail = self._tail() if embed.truncate else array("i")
        return [self._text(text, n, tail, cut=embed.truncate) for n, text in enumerate(embed.inputs)]

    def _text(self, text: str, number: int, tail: array[int], *, cut: bool) -> array[int]:
        tokens = self.vocab.tokenize(text.encode(), add_special=True, parse_special=True) or self.vocab.start()
        if len(tokens) > self.limit and cut and len(tail) < self.limit:
            tokens = tokens[: self.limit - len(tail)] + tail
        return self._checked(tokens, number)

    def _pair(self, query: array[int], text: str, number: int, *, cut: bool) -> array[int]:
        """Join a query and a document as rerankers are trained: `<bos> query <eos> <sep> document <eos>`.

        Each special token only where the model's metadata asks for it. Source: llama-server's `format_prompt_rerank`.
        """
        vocab = self.vocab
        document = vocab.tokenize(text.encode(), add_special=False, parse_special=False)
        end = array("i", [vocab.eos if vocab.eos >= 0 else vocab.sep] if vocab.adds_eos else [])
        head = array("i", [vocab.bos] if vocab.adds_bos else []) + query + end
        if vocab.adds_sep:
            head.append(vocab.sep)
        room = self.limit - len(head) - len(end)
        if cut and 0 < room < len(document):
            document = document[:room]
        return self._checked(head + document + end, number)

    def _templated(self, query: str, text: str, number: int, *, cut: bool) -> array[int]:
        vocab = self.vocab
        document = vocab.tokenize(text.encode(), add_special=False, parse_special=False) if cut else array("i")
        kept = len(document)
        for _ in range(_CUTS):
            # Filled in one pass: a query that names {document} stays as it is.
            before, _, after = self.template.partition("{document}")
            filled = before.replace("{query}", query) + text + after.replace("{query}", query)
            tokens = vocab.tokenize(filled.encode(), add_special=False, parse_special=True)
            kept -= len(tokens) - self.limit
            if not cut or len(tokens) <= self.limit or kept <= 0:
                break
            text = vocab.detokenize(document[:kept]).decode(errors="ignore")
        return self._checked(tokens, number)

    def _tail(self) -> array[int]:
        """Return the tokens that the model wants after every text; a text that is cut keeps them."""
        around = self.vocab.tokenize(b"", add_special=True, parse_special=True)
        return around[1:] if around and self.vocab.adds_bos and around[0] == self.vocab.bos else around

    def _checked(self, tokens: array[int], number: int) -> array[int]:
        if not tokens:
            raise TextError(f"text {number + 1} is empty, and the model has no token to put for it", field="inputs")
        if len(tokens) > self.limit:
            raise TextError("too long", tokens=len(tokens))
        return tokens
