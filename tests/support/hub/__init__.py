"""A Hub for tests and the demo: real HTTP servers on loopback that speak the Hub's protocol, and misbehave on request.

The Hub listens on 127.0.0.1 and its CDN on 127.0.0.2, so that they are two origins, as in life: whoever sends the
Hub's token to the CDN is caught by the request log.
"""

from tests.support.hub.content import HubFile, HubRepo
from tests.support.hub.faults import (
    Answer,
    Corrupt,
    Cut,
    Drip,
    Expire,
    Gzip,
    Lie,
    NoRange,
    Redirect,
    Resize,
    Silence,
    Stall,
    Trigger,
    WrongStart,
)
from tests.support.hub.server import HubServer, RequestRecord

__all__ = [
    "Answer",
    "Corrupt",
    "Cut",
    "Drip",
    "Expire",
    "Gzip",
    "HubFile",
    "HubRepo",
    "HubServer",
    "Lie",
    "NoRange",
    "Redirect",
    "RequestRecord",
    "Resize",
    "Silence",
    "Stall",
    "Trigger",
    "WrongStart",
]
