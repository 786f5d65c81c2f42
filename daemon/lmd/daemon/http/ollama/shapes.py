"""What Ollama's answers say about a model."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

from lmd.daemon.summaries import Summary
from lmd.registry.inspect import ModelFacts


def details(facts: Summary | ModelFacts) -> dict[str, object]:
    """Return the facts that stand under `details`; the first six are always there."""
    shown: dict[str, object] = {
        "parent_model": "",
        "format": "gguf",
        "family": facts.architecture,
        "families": [facts.architecture] if facts.architecture else [],
        "parameter_size": count_text(facts.parameter_count),
        "quantization_level": facts.quantization,
    }
    if facts.context_length:
        shown["context_length"] = facts.context_length
    if facts.embedding_length:
        shown["embedding_length"] = facts.embedding_length
    return shown


def shown_capabilities(names: Sequence[str]) -> list[str]:
    """Return what a model can do in Ollama's words, which have none for a model that has a template of chats."""
    return [name for name in names if name != "chat"]


def count_text(count: int) -> str:
    """Return a number of parameters for people, rounded as Ollama does: `134.52M`, `8.0B`; "" when it is not known."""
    if not count:
        return ""
    if count >= 10**9:
        return f"{count / 10**9:.1f}B"
    if count >= 10**6:
        return f"{count / 10**6:.2f}M"
    return f"{count / 10**3:.0f}K" if count >= 10**3 else str(count)


def time_text(seconds: float) -> str:
    """Return a time given in seconds since the epoch."""
    return moment_text(datetime.fromtimestamp(seconds, UTC))


def moment_text(moment: datetime) -> str:
    """Return a moment as RFC 3339 with six digits and a numeric zone: old readers know nothing else."""
    return moment.astimezone(UTC).isoformat(timespec="microseconds")
