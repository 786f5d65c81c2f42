"""What a model can do, by what its header and its template say."""

from __future__ import annotations

from lmd.registry.gguf import GgufHeader

EMBEDDING_ARCHITECTURES = frozenset(
    {
        "bert",
        "eurobert",
        "gemma-embedding",
        "jina-bert-v2",
        "jina-bert-v3",
        "modern-bert",
        "neo-bert",
        "nomic-bert",
        "nomic-bert-moe",
        "t5encoder",
    }
)
"""Architectures that turn text into vectors and cannot generate."""

RANK_POOLING = 4
"""The `pooling_type` of models that score how well a document answers a query."""

_TOOL_MARKS = ("tools", "tool_call")
_THINKING_MARKS = ("<think>", "</think>", "enable_thinking", "reasoning_content", "<|channel|>")
# Fill-in-the-middle needs both: what comes before the gap, and what comes after.
_INSERT_TOKENS = (("fim_pre", "fim_suf"), ("prefix", "suffix"))


def capabilities(header: GgufHeader, template: str | None, *, has_projector: bool) -> tuple[str, ...]:
    """List what the model can do, in a fixed order.

    *template* is the chat template in effect. "tools" and "thinking" go by what the template mentions, so they say that
    the model was made for it, not how well it does it. Every model that generates can embed as well; "embedding" is for
    those that were made for it.
    """
    if header.arch_number("pooling_type") == RANK_POOLING:
        return ("rerank",)
    if is_embedding(header):
        return ("embedding",)
    found = ["completion"]
    if template:
        found.append("chat")
        if any(mark in template for mark in _TOOL_MARKS):
            found.append("tools")
        if any(mark in template for mark in _THINKING_MARKS):
            found.append("thinking")
    tokens = header.special_tokens
    if any(before in tokens and after in tokens for before, after in _INSERT_TOKENS):
        found.append("insert")
    if has_projector:
        found.append("vision")
    return tuple(found)


def is_embedding(header: GgufHeader) -> bool:
    """Whether the model only embeds or ranks: by its architecture, or because its header asks for pooling."""
    return header.architecture in EMBEDDING_ARCHITECTURES or header.arch_number("pooling_type") > 0
