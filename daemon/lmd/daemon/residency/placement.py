"""Where the parts of a model go, given the room there is.

The engine puts layers on accelerators from the end: the output first, then the last repeating layer, and so on. What
is left, and the token embedding always, is in main memory. Across several accelerators the layers lie in order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate

from lmd.daemon.residency.plans import CPU, Need, Placement, Share

#: An accelerator has to take this part of a model to be worth its memory: below that, answers come less than a third
#: faster than from main memory alone, and what it would hold is missed by models that fit it whole.
WORTH = 0.25


def in_main_memory(need: Need) -> Placement:
    """Place all of it in main memory."""
    return Placement(need.num_ctx, (Share(CPU, need.cpu_bytes, need.layer_count),))


def on_one(need: Need, device: str, gpu_layers: int) -> Placement:
    """Place the last *gpu_layers* on *device* and the rest in main memory."""
    if gpu_layers >= need.layer_count:
        shares = [Share(device, need.gpu_bytes, need.layer_count)]
        host = Share(CPU, need.host_bytes)
    else:
        first = need.layer_count - gpu_layers
        placed_bytes = sum(need.layers[first:]) + need.output_bytes
        shares = [Share(device, placed_bytes + need.compute_bytes + need.beside_bytes, gpu_layers)]
        host = _rest(need, gpu_layers)
    return Placement(need.num_ctx, (*shares, *([host] if host.bytes > 0 else [])))


def on_several(need: Need, room: Mapping[str, int], gpu_layers: int) -> Placement | None:
    """Place the last *gpu_layers* on as few of the devices in *room* as hold them, the roomiest first.

    Each gets layers in proportion to its room, so that none is filled to the brim while another stays empty; only when
    that does not come out even, the first ones are filled. None when they do not fit.
    """
    gpu_layers = min(gpu_layers, need.layer_count)
    sizes = [*need.layers[need.layer_count - gpu_layers :], need.output_bytes]
    if len(sizes) < 2:
        return None
    total_bytes = sum(sizes)
    ranked = sorted(room.items(), key=lambda item: (-item[1], item[0]))
    for count in range(2, min(len(ranked), len(sizes)) + 1):
        chosen = ranked[:count]
        usable = [bytes_ - need.compute_bytes for _, bytes_ in chosen]
        usable[0] -= need.beside_bytes
        if min(usable) <= 0:
            return None
        if sum(usable) < total_bytes:
            continue
        counts = _in_proportion(sizes, usable) or _to_the_brim(sizes, usable)
        if counts is not None:
            return _split(need, [device for device, _ in chosen], counts, sizes)
    return None


def most_layers(need: Need, room: Mapping[str, int]) -> Placement | None:
    """Place as many layers as fit on the devices in *room*, of one backend; None when that is not worth it."""
    best: Placement | None = None
    for device, free_bytes in room.items():
        count = _layers_within(need, free_bytes - need.compute_bytes - need.beside_bytes)
        if count > (best.gpu_layers if best is not None else 0):
            best = on_one(need, device, count)
    if len(room) > 1:
        low, high = best.gpu_layers if best is not None else 0, need.layer_count - 1
        while low < high:
            middle = (low + high + 1) // 2
            split = on_several(need, room, middle)
            if split is None:
                high = middle - 1
            else:
                low, best = middle, split
    return best if best is not None and is_worth_it(need, best) else None


def is_worth_it(need: Need, placement: Placement) -> bool:
    """Tell whether accelerators take enough of a model."""
    first = need.layer_count - placement.gpu_layers
    placed_bytes = sum(need.layers[first:]) + need.output_bytes
    return placed_bytes >= WORTH * (sum(need.layers) + need.output_bytes)


def fits(placement: Placement, room: Mapping[str, int]) -> bool:
    """Tell whether each part has its room."""
    return all(share.bytes <= room.get(share.device, -1) for share in placement.shares)


def _rest(need: Need, gpu_layers: int) -> Share:
    """Return what main memory holds when the last *gpu_layers* are elsewhere."""
    layers = need.layer_count - gpu_layers
    bytes_ = need.input_bytes + need.parked_bytes + sum(need.layers[:layers])
    return Share(CPU, bytes_ + need.compute_bytes if layers else bytes_, layers)


def _layers_within(need: Need, free_bytes: int) -> int:
    sums = accumulate([need.output_bytes, *reversed(need.layers)])
    return sum(1 for bytes_ in sums if bytes_ <= free_bytes) if free_bytes > 0 else 0


def _in_proportion(sizes: Sequence[int], usable: Sequence[int]) -> list[int] | None:
    """Return how many layers each device gets, or None when one gets too much, or nothing."""
    whole, total = sum(usable), sum(sizes)
    counts, taken, place = [], 0, 0
    reach = 0
    for number, bytes_ in enumerate(usable):
        reach += bytes_
        target = total * reach / whole
        start, here = place, 0
        last = number == len(usable) - 1
        while place < len(sizes) and (last or taken + sizes[place] / 2 <= target):
            here += sizes[place]
            taken += sizes[place]
            place += 1
        if here > bytes_ or place == start:
            return None
        counts.append(place - start)
    return counts


def _to_the_brim(sizes: Sequence[int], usable: Sequence[int]) -> list[int] | None:
    counts, place = [], 0
    for bytes_ in usable:
        start, here = place, 0
        while place < len(sizes) and here + sizes[place] <= bytes_:
            here += sizes[place]
            place += 1
        counts.append(place - start)
    return counts if place == len(sizes) and all(counts) else None


def _split(need: Need, devices: Sequence[str], counts: Sequence[int], sizes: Sequence[int]) -> Placement:
    shares, place = [], 0
    for number, (device, count) in enumerate(zip(devices, counts, strict=True)):
        bytes_ = sum(sizes[place : place + count]) + need.compute_bytes + (need.beside_bytes if number == 0 else 0)
        shares.append(Share(device, bytes_, count))
        place += count
    host = _rest(need, len(sizes))
    return Placement(need.num_ctx, (*shares, *([host] if host.bytes > 0 else [])))
