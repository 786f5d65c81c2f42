"""What a model can do, by what its header and its template say."""

from __future__ import annotations

import re

from lmd.gotemplate.survey import identifiers, is_go_template, writes_suffix
from lmd.registry.gguf import INSERT_NAMES, GgufHeader

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

# What a template does, as against what it says: statements and expressions without the texts and comments in them.
_COMMENT = re.compile(r"\{#.*?#\}", re.DOTALL)
_CODE = re.compile(r"\{%.*?%\}|\{\{.*?\}\}", re.DOTALL)
_TEXT = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\"""", re.DOTALL)
_TOOLS = re.compile(r"\btools\b")
_THINKING_SWITCHES = re.compile(r"\b(?:enable_thinking|reasoning_content|reasoning_effort|thinking_budget)\b")
# What families write around thoughts.
_THINKING_MARKS = (
    "<think>",
    "</think>",
    "<|channel|>",
    "<|channel>thought",
    "[THINK]",
    "<|START_THINKING|>",
    "<seed:think>",
    "<thinking>",
    "<thought>",
    "<reasoning>",
)
# What a Go template reads when it can tell of functions, or knows of thoughts.
_GO_NAMES = (("Tools", "tools"), ("Thinking", "thinking"), ("Think", "thinking"), ("IsThinkSet", "thinking"))
# Fill-in-the-middle needs all: what is before the gap, what is after it, and where it is filled.
_INSERT_IDS = (("fim_pre", "prefix"), ("fim_suf", "suffix"), ("fim_mid", "middle"))


def capabilities(header: GgufHeader, template: str | None, *, has_projector: bool) -> tuple[str, ...]:
    """List what the model can do, in a fixed order.

    *template* is the chat template in effect. "tools" means that it tells the model of functions, "thinking" that it
    knows of thoughts; neither says how well the model does. "insert" means that the vocabulary has the tokens for it,
    or that the template is Go's and writes what comes after a gap. Every model that generates can embed as well;
    "embedding" is for those that were made for it.
    """
    if header.arch_number("pooling_type") == RANK_POOLING:
        return ("rerank",)
    if is_embedding(header):
        return ("embedding",)
    found = ["completion"]
    go_names = identifiers(template) if template and is_go_template(template) else None
    if go_names is not None:
        found += ["chat", *(capability for name, capability in _GO_NAMES if name in go_names)]
        if any(mark in (template or "") for mark in _THINKING_MARKS):
            found.append("thinking")
    elif template:
        found.append("chat")
        code = _code_of(template)
        # A template of the manifest stands for both of the header's.
        if _TOOLS.search(code) or (header.tool_template and template == header.chat_template):
            found.append("tools")
        if _THINKING_SWITCHES.search(code) or any(mark in template for mark in _THINKING_MARKS):
            found.append("thinking")
    if _inserts(header) or writes_suffix(template or ""):
        found.append("insert")
    if has_projector:
        found.append("vision")
    return tuple(dict.fromkeys(found))


def is_embedding(header: GgufHeader) -> bool:
    """Whether the model only embeds or ranks: by its architecture, or because its header asks for pooling."""
    return header.architecture in EMBEDDING_ARCHITECTURES or header.arch_number("pooling_type") > 0


def _code_of(template: str) -> str:
    return "\n".join(_TEXT.sub("''", code) for code in _CODE.findall(_COMMENT.sub("", template)))


def _inserts(header: GgufHeader) -> bool:
    """Whether there are all three tokens for filling a gap, by their ids in the metadata or by their names."""
    return all(
        any(id_ in header.special_tokens for id_ in ids) or not header.insert_tokens.isdisjoint(names)
        for ids, names in zip(_INSERT_IDS, INSERT_NAMES, strict=True)
    )
