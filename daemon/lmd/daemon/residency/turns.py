"""How long who has memory may keep it while others wait for it.

The times are multiples of what loads and answers take: what is much for one machine and model is little for another.
They are set so that, where clients ask for any of three models of which two fit, nobody waits three times as long as a
fair share, and so that there are three times fewer loads than where the least recently used model leaves at once.
Where a load takes as long as ten answers no choice has both: waits are a little longer and the loads spared fewer.

- Who waits has *patience*: 2.8 answers of the model that would have to go and four tenths of its load. For less than
  that nobody is disturbed, and requests for the one that waits gather meanwhile, to be answered in one turn.
- A model that answers keeps its memory for a *turn*, one answer and half a load at least.
- After both, the model with the longest turn *yields*: it takes no new requests, finishes the running answers and
  leaves. Its own requests wait for their turn.
- What only batch requests have used since it was loaded gives way to an interactive one without patience: idle, at
  once; busy, after its turn. A batch asks for no turn of an interactive model before it has aged.
- An idle model *stays* for a moment when it is likely to be asked again: as long as six answers take when it had two
  requests at once; as long as its load takes when it is asked again and again and others want its memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from lmd.daemon.residency.plans import Ask, Resident

PATIENCE_LOADS, PATIENCE_ANSWERS = 0.4, 2.8
MIN_PATIENCE_S, MAX_PATIENCE_S = 0.1, 60.0
TURN_LOADS, TURN_ANSWERS = 0.5, 1.0
MIN_TURN_S, MAX_TURN_S = 0.5, 120.0
STAY_ANSWERS = 6.0
MIN_AGAIN_S, MAX_STAY_S = 0.25, 60.0
#: How much the newest answer counts in the mean: it has to be steady, because waits end with it.
NEWEST = 1 / 16


class AnswerTimes:
    """How long a model's answers take, in the long run: over reloads, and whatever the last few were."""

    def __init__(self) -> None:
        self.mean_s = 0.0

    def note(self, answer_s: float) -> None:
        """Take in how long an answer took."""
        self.mean_s += (answer_s - self.mean_s) * (NEWEST if self.mean_s else 1.0)


def turn_s(resident: Resident) -> float:
    """Return how long a model may answer while others wait for its memory."""
    wanted_s = TURN_LOADS * resident.reload_s + TURN_ANSWERS * resident.answer_s
    return min(max(MIN_TURN_S, wanted_s), MAX_TURN_S)


def patience_s(resident: Resident) -> float:
    """Return how long an ask waits before it disturbs a model."""
    wanted_s = PATIENCE_LOADS * resident.reload_s + PATIENCE_ANSWERS * resident.answer_s
    return min(max(MIN_PATIENCE_S, wanted_s), MAX_PATIENCE_S)


def stay_s(*, idle_s: float, reload_s: float, answer_s: float) -> float:
    """Return how much longer an idle model is worth keeping that had two requests at once."""
    return max(0.0, min(max(reload_s, STAY_ANSWERS * answer_s), MAX_STAY_S) - idle_s)


def again_s(*, pause_s: float, idle_s: float, reload_s: float) -> float:
    """Return how much longer an idle model may be asked again soon, when its requests come *pause_s* apart."""
    whole_s = min(max(reload_s, MIN_AGAIN_S), MAX_STAY_S)
    return max(0.0, whole_s - idle_s) if 0 < pause_s <= whole_s else 0.0


def stays(ask: Ask, resident: Resident) -> bool:
    """Tell whether an idle model is not evicted yet for *ask*.

    One that is asked by one client alone stays only when it was asked while *ask* waited. Where a client is all by
    himself that never happens, and each of his swaps begins at once.
    """
    if resident.priority < ask.priority:
        return False
    others_ask = resident.stay_s > 0 or (resident.again_s > 0 and ask.waited_s > resident.idle_s)
    return others_ask and is_patient(ask, resident)


def is_patient(ask: Ask, resident: Resident) -> bool:
    """Tell whether *ask* can still wait for *resident*."""
    return ask.waited_s < patience_s(resident)


def must_yield(ask: Ask, resident: Resident) -> bool:
    """Tell whether a busy model has to make room for *ask* as soon as its answers are done."""
    return (
        resident.busy
        and not (resident.pinned or resident.leaving)
        and 0 < resident.resident_s
        and turn_s(resident) <= resident.resident_s
        and resident.priority <= ask.priority
        and (resident.priority < ask.priority or not is_patient(ask, resident))
    )


def next_change_s(ask: Ask, residents: Iterable[Resident]) -> float:
    """Return after how many seconds *ask* may get another plan though nobody has moved; infinity for never."""
    times = []
    for resident in residents:
        times.append(patience_s(resident) - ask.waited_s)
        times += [resident.stay_s, resident.again_s]
        if resident.resident_s > 0:
            times.append(turn_s(resident) - resident.resident_s)
    return min((time for time in times if time > 0), default=math.inf)
