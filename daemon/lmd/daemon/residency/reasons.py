"""Decisions in words and numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lmd.daemon.residency.plans import CPU, Action, Ask, Level, Placement, Plan, Resident, Room
from lmd.registry.errors import size_text


def of(plan: Plan, ask: Ask, residents: Sequence[Resident], rooms: Mapping[str, Room]) -> str:
    """Say why *plan* is what it is."""
    if plan.action is Action.REFUSE:
        return (
            f"does not fit on {device_text(plan.device)}{_context_text(plan.placement, ask, even='even ')}: "
            f"{size_text(plan.needed_bytes)} needed, {size_text(plan.free_bytes)} can be freed"
        )
    others = [resident for resident in residents if resident.key in plan.others]
    where = f"{place_text(plan.placement, ask)}: {_need_text(plan.placement, rooms)}"
    match plan.action:
        case Action.LOAD | Action.HOLD:
            return f"fits {where}"
        case Action.EVICT:
            return f"{_list([_idle_text(r) for r in others])} for a place {where}"
        case Action.TURN:
            return f"{_list([_turn_text(r) for r in others])}, after a wait of {seconds_text(ask.waited_s)}, {where}"
        case Action.WAIT:
            if not others:
                return f"waits for memory {where}"
            return f"waits for memory that {_list([_holder_text(r, ask) for r in others])}, {where}"


def place_text(placement: Placement, ask: Ask) -> str:
    """Say where a model goes: "on cuda0", "on cuda0 and cuda1", "with 20 of 33 layers on cuda0"."""
    accelerators = placement.accelerators
    layers = sum(share.layers for share in placement.shares)
    text = "on " + _list([device_text(share.device) for share in accelerators] or [device_text(CPU)])
    if accelerators and placement.gpu_layers < layers:
        text = f"with {placement.gpu_layers} of {layers} layers {text}"
    return text + _context_text(placement, ask)


def _context_text(placement: Placement, ask: Ask, *, even: str = "") -> str:
    wanted = ask.needs[0].num_ctx
    if placement.num_ctx >= wanted:
        return ""
    return f" {even}with a context of {placement.num_ctx} tokens instead of {wanted}"


def device_text(device: str) -> str:
    """Return how people call a device."""
    return "main memory" if device == CPU else device


def seconds_text(seconds: float) -> str:
    """Return a time for people: "0.4 s", "12 s", "3 min"."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def _need_text(placement: Placement, rooms: Mapping[str, Room]) -> str:
    shares = placement.accelerators or placement.shares
    host = [share for share in placement.shares if share.bytes > rooms[share.device].now and share not in shares]
    return "; ".join(
        f"{size_text(share.bytes)} needed"
        + (f" on {device_text(share.device)}" if len(shares) + len(host) > 1 else "")
        + f", {size_text(max(0, rooms[share.device].after(Level.NOW)))} free"
        for share in (*shares, *host)
    )


def _idle_text(resident: Resident) -> str:
    reload_text = f", loads in {seconds_text(resident.reload_s)}" if resident.reload_s else ""
    return (
        f"{resident.label} leaves (idle for {seconds_text(resident.idle_s)}, holds {size_text(resident.held_bytes)}"
        f"{reload_text})"
    )


def _turn_text(resident: Resident) -> str:
    return f"{resident.label} yields (its turn has lasted {seconds_text(resident.resident_s)})"


def _holder_text(resident: Resident, ask: Ask) -> str:
    if resident.leaving:
        return f"{resident.label} is about to free"
    if not resident.busy:
        return f"{resident.label} holds (others use it)"
    return f"{resident.label} holds"


def _list(texts: Sequence[str]) -> str:
    return f"{', '.join(texts[:-1])} and {texts[-1]}" if len(texts) > 1 else "".join(texts)
