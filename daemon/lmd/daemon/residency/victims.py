"""Who leaves: those that are cheapest to bring back for the bytes they free."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from lmd.daemon.residency.plans import Resident

#: A load whose length is not known is taken to read so much a second.
GUESSED_BYTES_PER_S = 1 << 30
#: Shorter loads count as alike: what they cost is noise.
SHORT_LOAD_S = 1.0
#: A model that nobody has used for so long is half as likely to be missed.
HALF_LIFE_S = 60.0


def cost(resident: Resident) -> float:
    """Return the seconds that evicting it is expected to cost: of its load, less the longer it is idle."""
    reload_s = resident.reload_s or resident.held_bytes / GUESSED_BYTES_PER_S
    return max(reload_s, SHORT_LOAD_S) / (1 + resident.idle_s / HALF_LIFE_S)


def turn_cost(resident: Resident) -> float:
    """Return what interrupting a busy one costs: the longer its turn has been, the less."""
    return 1 / max(resident.resident_s, 1e-3)


def cheapest(
    candidates: Sequence[Resident], gaps: Mapping[str, int], price: Callable[[Resident], float] = cost
) -> list[Resident] | None:
    """Return who has to leave to free *gaps* bytes of each device; None when all of them do not suffice.

    Lower priorities go first. Within one, who costs least for each byte that is needed; or a single one, where that is
    cheaper. None of them is redundant.
    """
    open_gaps = {device: bytes_ for device, bytes_ in gaps.items() if bytes_ > 0}
    if not open_gaps:
        return []
    helpful = [(resident, price(resident)) for resident in candidates if _useful(resident, open_gaps)]
    chosen: list[tuple[Resident, float]] = []
    left = list(helpful)
    while open_gaps:
        ranked = [
            (resident.priority, price_ / useful, -resident.idle_s, resident.key, place)
            for place, (resident, price_) in enumerate(left)
            if (useful := _useful(resident, open_gaps))
        ]
        if not ranked:
            return None
        taken = left.pop(min(ranked)[-1])
        chosen.append(taken)
        open_gaps = _without(open_gaps, taken[0])
    chosen = _needed(chosen, gaps)
    alone = [
        (resident.priority, price_, -resident.idle_s, resident.key, resident)
        for resident, price_ in helpful
        if not _without(gaps, resident)
    ]
    if alone and len(chosen) > 1:
        priority, price_, *_, single = min(alone, key=lambda found: found[:4])
        if (priority, price_) < (max(r.priority for r, _ in chosen), sum(p for _, p in chosen)):
            return [single]
    return [resident for resident, _ in chosen]


def _needed(chosen: Sequence[tuple[Resident, float]], gaps: Mapping[str, int]) -> list[tuple[Resident, float]]:
    """Spare who is not needed after all, the dearest first."""
    kept = list(chosen)
    for entry in sorted(chosen, key=lambda entry: (-entry[0].priority, -entry[1], entry[0].key)):
        rest = dict(gaps)
        for other in kept:
            if other is not entry:
                rest = _without(rest, other[0])
        if not any(bytes_ > 0 for bytes_ in rest.values()):
            kept = [other for other in kept if other is not entry]
    return kept


def _useful(resident: Resident, gaps: Mapping[str, int]) -> int:
    return sum(min(part.held_bytes, gaps.get(part.device, 0)) for part in resident.held)


def _without(gaps: Mapping[str, int], resident: Resident) -> dict[str, int]:
    """Return the gaps that are left when *resident* is gone."""
    left = dict(gaps)
    for part in resident.held:
        if part.device in left:
            left[part.device] -= part.held_bytes
    return {device: bytes_ for device, bytes_ in left.items() if bytes_ > 0}
