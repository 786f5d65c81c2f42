"""Whose cached prefixes are whose: a scope is a caller, and for requests with other adapters than the model's, those.

What memory holds of a token depends on the weights that decoded it. So prefixes that were decoded with different
adapters share nothing, not even what the manifest puts before every chat.
"""

from __future__ import annotations

from collections.abc import Sequence

# No caller's name has it.
_SEPARATOR = "\0"


def adapted_scope(caller: str, scales: Sequence[float]) -> str:
    """Return the scope of a caller's requests with these scales of adapters."""
    return caller + _SEPARATOR + ",".join(repr(scale) for scale in scales)


def uses_public(scope: str | None) -> bool:
    """Tell whether what everybody may use is of use to a scope: it was decoded with the model's own adapters."""
    return scope is None or _SEPARATOR not in scope
