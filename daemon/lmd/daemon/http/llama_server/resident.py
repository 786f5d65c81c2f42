"""Which model a request means that names none."""

from __future__ import annotations

from lmd.daemon.residency.residency import Residency
from lmd.daemon.residency.values import RunnerState
from lmd.registry.errors import InvalidRequest


def model_of(named: str | None, residency: Residency) -> str:
    """Return the model of a request: the one it names, or else the one that is resident.

    Raises:
        InvalidRequest: it names none, and not exactly one is resident.
    """
    if named:
        return named
    states = (RunnerState.LOADING, RunnerState.READY)
    resident = [status.name for status in residency.list() if status.state in states]
    if len(resident) == 1:
        return resident[0]
    raise InvalidRequest(
        f"`model` is missing, and {len(resident) or 'no'} models are resident", field="model", hint="name a model"
    )
