"""Unloads models by what users call them: what every adapter (gRPC, HTTP) offers."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Protocol

from lmd.daemon.residency.residency import Residency
from lmd.registry.errors import LmdError, ModelNotFound
from lmd.registry.ref import parse_ref
from lmd.registry.store import TagRecord


class Tags(Protocol):
    """The part of the catalog that is needed here."""

    async def find(self, text: str) -> TagRecord:
        """Return the tag that a reference means."""


@dataclass(frozen=True, slots=True)
class Stopped:
    """A model that was told to leave: its full name, and how many answers were running."""

    name: str
    running_answers: int


async def unload_model(tags: Tags, residency: Residency, text: str, *, force: bool) -> Stopped:
    """Unload a model; it need not be in the store any more.

    Without *force* running answers finish first, and this does not wait for them.

    Raises:
        InvalidRef: *text* is no model reference.
        ModelNotFound: the model is not resident.
    """
    ref = parse_ref(text)
    wanted = str(ref.digest or ref.name)
    try:
        running = await residency.unload(wanted, force=force)
    except ModelNotFound as not_resident:
        try:
            # Another name of the same model may have made it resident. Found, not resolved: a model whose files are
            # damaged can be stopped.
            tag = await tags.find(text)
            return Stopped(str(tag.name), await residency.unload(str(tag.manifest), force=force))
        except ModelNotFound:
            raise not_resident from None
    with contextlib.suppress(LmdError):  # it has stopped, whatever the store says of its name
        wanted = str((await tags.find(text)).name)
    return Stopped(wanted, running)
