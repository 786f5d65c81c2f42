"""Finds the tokens of markers in a vocabulary."""

from __future__ import annotations

from collections.abc import Iterable

from lmd.runner.vocab import Vocab


def marker_tokens(vocab: Vocab, markers: Iterable[str]) -> dict[int, str]:
    """Return the tokens that are markers, each with its text; those that end an answer are left out.

    Most are special tokens, of which nothing is seen in an answer unless it is asked for. Any thread may call this.
    """
    found = {}
    for marker in markers:
        tokens = vocab.tokenize(marker.encode(), add_special=False, parse_special=True)
        if len(tokens) == 1 and tokens[0] not in vocab.ends and vocab.pieces(tokens) == [marker.encode()]:
            found[tokens[0]] = marker
    return found
