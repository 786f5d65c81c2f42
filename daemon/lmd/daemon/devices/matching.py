"""Puts together what the engine, the drivers and the kernel say of devices. Pure: whoever asks brings the readings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from lmd.daemon.devices.values import Card, Device, EngineDevice, Probed

#: Which backends of the engine can use a vendor's cards, as people know them.
_WAYS = {"nvidia": ("cuda", "vulkan"), "amd": ("rocm", "vulkan"), "intel": ("sycl", "vulkan")}
_TITLES = {"cuda": "CUDA", "vulkan": "Vulkan", "rocm": "ROCm", "sycl": "SYCL"}

#: By how much the engine's and the driver's idea of a card's memory may differ, in parts of it. With more between them
#: the engine sees a slice of the card, or is held to one, and the driver's figures are not those of the slice.
_TOLERANCE = 0.1


@dataclass(frozen=True, slots=True)
class Readings:
    """What there is to know at one time.

    Attributes:
        probed: what the engine said when it was asked last; None when nobody asked yet.
        cards: what the drivers say now.
        memory: the machine's own.
        backends: what the engine was built with.
        held: what our runners hold of each device now, as far as its readings would show it.
        held_then: the same when the engine was asked.
        cards_then: the addresses of the cards that worked when the engine was asked.
    """

    probed: Probed | None
    cards: Sequence[Card]
    memory: Device
    backends: frozenset[str] = frozenset()
    held: Mapping[str, int] = field(default_factory=dict)
    held_then: Mapping[str, int] = field(default_factory=dict)
    cards_then: frozenset[str] = frozenset()


def devices_of(readings: Readings) -> list[Device]:
    """Return all devices: main memory, what the engine offers in its order, then the cards that it does not find.

    Of two ways to the same card, the first of the engine's is used. A device whose memory is the machine's is used only
    when there is no other: so does the engine, since it is seldom faster than the processor beside it.
    """
    engine = readings.probed.devices if readings.probed is not None else ()
    found = [readings.memory]
    for offered in engine:
        found.append(_judged(_measured(offered, readings), offered, readings, found[1:], engine))
    known = {offered.bus_id for offered in engine if offered.bus_id}
    found += [_unknown(card, readings) for card in readings.cards if not card.bus_id or card.bus_id not in known]
    return found


def shortfall(devices: Sequence[Device]) -> str:
    """Say why models go to main memory although there is an accelerator with memory of its own; "" when none is."""
    if any(device.usable for device in devices[1:]):
        return ""
    for device in devices[1:]:
        if device.total_bytes and not device.unified:
            return f"{device.id} ({device.description}) cannot be used: {device.reason}"
    return ""


def _measured(offered: EngineDevice, readings: Readings) -> Device:
    """Return a device with its memory now, from the best source there is."""
    device = Device(
        offered.id,
        offered.description,
        offered.total_bytes,
        offered.free_bytes,
        backend=offered.backend,
        unified=offered.kind == "igpu",
        bus_id=offered.bus_id,
    )
    since_then = readings.held.get(offered.id, 0) - readings.held_then.get(offered.id, 0)
    reckoned = min(max(offered.free_bytes - since_then, 0), offered.total_bytes)
    card = _card_of(offered, readings.cards)
    if device.unified:
        # What others take is seen in the machine's memory, and ours is missing there already.
        total_bytes = min(offered.total_bytes, readings.memory.total_bytes)
        room = total_bytes - readings.held.get(offered.id, 0)
        return replace(device, total_bytes=total_bytes, free_bytes=max(min(room, readings.memory.free_bytes), 0))
    if card is not None and card.total_bytes is not None and card.free_bytes is not None:
        if abs(card.total_bytes - offered.total_bytes) <= _TOLERANCE * card.total_bytes:
            return replace(device, total_bytes=card.total_bytes, free_bytes=card.free_bytes)
        reckoned = min(reckoned, card.free_bytes)
    return replace(device, free_bytes=reckoned)


def _judged(
    device: Device,
    offered: EngineDevice,
    readings: Readings,
    before: Sequence[Device],
    engine: Sequence[EngineDevice],
) -> Device:
    """Say whether a device can be used, given those *before* it."""
    card = _card_of(offered, readings.cards)
    if card is not None and card.fault:
        return _faulty(device, card.fault)
    if card is None and offered.bus_id in readings.cards_then:
        return _faulty(device, "its driver does not show it any more")
    if offered.total_bytes == 0:
        return _faulty(device, "the engine cannot read its memory")
    for other in before:
        if other.usable and offered.bus_id and other.bus_id == offered.bus_id:
            return replace(device, usable=False, reason=f"the same card as {other.id}, which is used")
    if device.unified:
        if any(other.kind == "gpu" for other in engine):
            return replace(device, usable=False, reason="shares main memory, and there is a card with its own")
        if any(other.usable for other in before):
            return replace(device, usable=False, reason="shares main memory, as does the one that is used")
    return device


def _unknown(card: Card, readings: Readings) -> Device:
    """Return a card that the engine does not offer, with the reason."""
    device = Device(
        f"{card.vendor}{card.number}",
        card.description,
        card.total_bytes or 0,
        card.free_bytes or 0,
        backend="",
        usable=False,
        bus_id=card.bus_id,
    )
    ways = _WAYS[card.vendor]
    if card.fault:
        return _faulty(device, card.fault)
    if readings.backends.isdisjoint(ways):
        built = " or ".join(_TITLES[way] for way in ways)
        return replace(device, reason=f"the engine is built without {built}")
    if readings.probed is None:
        return replace(device, reason="the engine has not been asked yet")
    if readings.probed.fault:
        return replace(device, reason=readings.probed.fault)
    if readings.probed.limits:
        hidden = " and ".join(f"{name}={value}" for name, value in sorted(readings.probed.limits.items()))
        return replace(device, reason=f"the engine does not find it; {hidden} may hide it")
    return replace(device, reason="the engine does not find it; its driver may be too old, or lack a part")


def _faulty(device: Device, why: str) -> Device:
    return replace(device, usable=False, reason=why, free_bytes=0)


def _card_of(offered: EngineDevice, cards: Sequence[Card]) -> Card | None:
    return next((card for card in cards if offered.bus_id and card.bus_id == offered.bus_id), None)
