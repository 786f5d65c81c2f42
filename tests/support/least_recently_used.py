"""What plain eviction of the least recently used model would do: what residency is held against."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence


def lru_loads(models: Sequence[str], room: int) -> int:
    """Return how many loads *models* take, in this order, where *room* fit and the least recently used leaves."""
    resident: OrderedDict[str, None] = OrderedDict()
    loads = 0
    for model in models:
        if model not in resident:
            loads += 1
            if len(resident) >= room:
                resident.popitem(last=False)
        resident[model] = None
        resident.move_to_end(model)
    return loads
