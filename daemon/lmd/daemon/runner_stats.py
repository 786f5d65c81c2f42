"""What a runner's engine did since it was loaded, and what it holds."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Self

from lmd.runner.v1 import frames_pb2 as frames


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Counts since the load, and what the KV cache holds now; see `EngineStats` of the API."""

    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    cache_hits: int
    cache_misses: int
    prefixes: int
    kv_used: int
    kv_size: int
    drafted_tokens: int
    accepted_tokens: int
    parked_bytes: int

    @classmethod
    def of(cls, stats: frames.Stats) -> Self:
        """Return what a pong says."""
        return cls(**{field.name: getattr(stats, field.name) for field in fields(cls)})
