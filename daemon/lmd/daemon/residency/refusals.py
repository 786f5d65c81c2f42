"""Why there is no place for a model, as an error with numbers and the next step."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lmd.daemon.errors import DeviceMemoryShort, DeviceUnavailable
from lmd.daemon.residency.decisions import LEASE_PREFIX
from lmd.daemon.residency.plans import Ask, DeviceMemory, Plan, Resident
from lmd.registry.errors import size_text


def too_large(
    ask: Ask, refused: Plan, residents: Sequence[Resident], *, by_name: Callable[[str], bool]
) -> DeviceMemoryShort:
    """Return that *ask* does not fit whoever leaves, with who may be let go so that it does.

    *by_name* tells of a pinned resident whether somebody has pinned it, or a keep-alive without end.
    """
    return DeviceMemoryShort(
        ask.name,
        needed_bytes=refused.needed_bytes,
        free_bytes=refused.free_bytes,
        device=refused.device,
        hint=_who_stays(refused, residents, by_name),
    )


def waited_too_long(
    ask: Ask,
    decided: Plan,
    devices: Sequence[DeviceMemory],
    residents: Sequence[Resident],
    *,
    reserve_bytes: int,
    waited_s: float,
) -> DeviceMemoryShort:
    """Return that the memory was in use for as long as *ask* may wait for it."""
    free = {device.id: device.free_bytes - reserve_bytes for device in devices}
    for resident in residents:
        for part in resident.held:
            # A reading shows it as free, and it is not to be had.
            free[part.device] = free.get(part.device, 0) - part.unseen_bytes
    share = max(decided.placement.shares, key=lambda share: share.bytes - free.get(share.device, 0))
    return DeviceMemoryShort(
        ask.name,
        needed_bytes=share.bytes,
        free_bytes=max(0, free.get(share.device, 0)),
        device=share.device,
        waited_s=waited_s,
        hint="other models answer with that memory; try again when they are done, or stop one with `lm stop`",
    )


def devices_gone(ask: Ask) -> DeviceUnavailable:
    """Return that the devices are gone which were there when it asked."""
    gone = " and ".join(ask.devices or ("every device",))
    return DeviceUnavailable(ask.name, f"{gone} cannot be used any more")


def _who_stays(refused: Plan, residents: Sequence[Resident], by_name: Callable[[str], bool]) -> str:
    """Name the models that may not leave and hold what is missing; nothing when it is too large without them."""
    held_bytes = {
        resident.key: sum(part.held_bytes for part in resident.held if part.device == refused.device)
        for resident in residents
        if resident.pinned and not resident.key.startswith(LEASE_PREFIX)
    }
    staying = [resident for resident in residents if held_bytes.get(resident.key)]
    if refused.free_bytes + sum(held_bytes.values()) < refused.needed_bytes:
        return ""
    texts = []
    for resident in staying:
        how, command = ("pinned", "unpin") if by_name(resident.key) else ("kept for ever", "stop")
        size = size_text(held_bytes[resident.key])
        texts.append(f"{resident.label} is {how} and holds {size}: `lm {command} {resident.name}` lets it go")
    return "; ".join(texts)
