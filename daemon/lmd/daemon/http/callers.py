"""Who makes an HTTP request; found out once, before any adapter sees it."""

from __future__ import annotations

from starlette.requests import Request

from lmd.daemon import model_calls
from lmd.daemon.callers import Caller, user_name
from lmd.daemon.errors import PermissionDenied

#: Where the caller of a request stands in its scope.
CALLER_KEY = "lmd.caller"
_UID = "uid:"


def caller_of(request: Request) -> str:
    """Return the authenticated identity: "uid:1000" for a user of this machine, "token:NAME" for a token's bearer.

    Raises:
        PermissionDenied: the request did not come through the gateway's guard.
    """
    caller: str | None = request.scope.get(CALLER_KEY)
    if not caller:
        raise PermissionDenied("the caller of this request is not known", action="connect")
    return caller


def http_caller(request: Request) -> model_calls.Caller:
    """Return the caller as embedding and tokenizing want it: HTTP clients set no deadline, they hang up."""
    return model_calls.Caller(name=caller_of(request))


def local_user_of(request: Request) -> Caller | None:
    """Return the user of this machine who asks, as pulls and uploads want it; None for the bearer of a token."""
    caller = caller_of(request)
    if not caller.startswith(_UID):
        return None
    uid = int(caller.removeprefix(_UID))
    return Caller(uid=uid, pid=None, user=user_name(uid))
