"""How long who has memory may keep it while others wait for it.

Four numbers decide, all of them from what loads cost:

- A model that answers keeps its memory for a *turn*: eight times as long as its load took, from two seconds to two
  minutes. Loads then take at most about a ninth of the time, however many models compete.
- Who waits has *patience*: twice as long as the load of the model that would have to go, from one second to half a
  minute. For less than that nobody is disturbed.
- After both, the model with the longest turn *yields*: it takes no new requests, finishes the running answers and
  leaves. Its own requests wait for their turn, and all that gathered are answered in one.
- An idle model that is asked again and again is worth keeping for three of its usual pauses, when that is no longer
  than its load takes (or a second). One that was asked once, or seldom, goes at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from lmd.daemon.residency.plans import Ask, Resident

TURN_LOADS = 8.0
MIN_TURN_S, MAX_TURN_S = 2.0, 120.0
PATIENCE_LOADS = 2.0
MIN_PATIENCE_S, MAX_PATIENCE_S = 1.0, 30.0
LINGER_PAUSES = 3.0


def turn_s(reload_s: float) -> float:
    """Return how long a model may answer while others wait for its memory."""
    return min(max(MIN_TURN_S, TURN_LOADS * reload_s), MAX_TURN_S)


def patience_s(reload_s: float) -> float:
    """Return how long an ask waits before it disturbs a model whose load takes *reload_s*."""
    return min(max(MIN_PATIENCE_S, PATIENCE_LOADS * reload_s), MAX_PATIENCE_S)


def stay_s(*, pause_s: float, idle_s: float, reload_s: float) -> float:
    """Return how much longer an idle model is worth keeping; *pause_s* is how soon it is asked again, 0 for never."""
    whole_s = LINGER_PAUSES * pause_s
    return max(0.0, whole_s - idle_s) if whole_s <= max(reload_s, MIN_PATIENCE_S) else 0.0


def is_patient(ask: Ask, resident: Resident) -> bool:
    """Tell whether *ask* can still wait for *resident*."""
    return ask.waited_s < patience_s(resident.reload_s)


def must_yield(ask: Ask, resident: Resident) -> bool:
    """Tell whether a busy model has to make room for *ask* as soon as its answers are done."""
    return (
        resident.busy
        and not (resident.pinned or resident.leaving)
        and 0 < resident.resident_s
        and turn_s(resident.reload_s) <= resident.resident_s
        and resident.priority <= ask.priority
        and not is_patient(ask, resident)
    )


def next_change_s(ask: Ask, residents: Iterable[Resident]) -> float:
    """Return after how many seconds *ask* may get another plan though nobody has moved; infinity for never."""
    times = []
    for resident in residents:
        times.append(patience_s(resident.reload_s) - ask.waited_s)
        times.append(resident.stay_s)
        if resident.resident_s > 0:
            times.append(turn_s(resident.reload_s) - resident.resident_s)
    return min((time for time in times if time > 0), default=math.inf)
