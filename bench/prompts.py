"""Prompts of exact lengths: random common words, each of which is one token, after the token that begins every text."""

from __future__ import annotations

import random

from tests.support.tiny_models import WORDS

# At the start of a text, where no space is before them, these are two tokens with the tokenizer of Llama 3.
_WORDS = sorted(set(WORDS) - {"saw", "looked", "together", "asked"})


def words(count: int, *seed: object) -> str:
    """Return *count* words, different for every seed from the first word on."""
    choose = random.Random("/".join(map(str, seed)))
    return " ".join(choose.choices(_WORDS, k=count))


def prompt(tokens: int, *seed: object) -> str:
    """Return a text of *tokens* tokens, the first of all texts included."""
    return words(tokens - 1, *seed)


def shared_prompts(clients: int, shared_tokens: int, own_tokens: int, *seed: object) -> list[str]:
    """Return prompts that begin with the same *shared_tokens* and go on with *own_tokens* of their own."""
    beginning = prompt(shared_tokens, "shared", *seed)
    return [f"{beginning} {words(own_tokens, 'own', client, *seed)}" for client in range(clients)]
