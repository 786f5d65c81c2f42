"""The HTTP client that `huggingface_hub` uses in this process: our own connections below its API.

What the package asks passes through `Http`, so that its requests obey the same address rules, limits, proxies and
cancel scopes as the transfers. Imported late, because it imports `huggingface_hub`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import httpx2
from huggingface_hub import set_client_factory

from lmd.registry.addresses import AddressRefused, Origin, origin_of
from lmd.registry.cancel import CancelScope
from lmd.registry.http import Http, ReplyRefused

#: What `model_info` of a repository with tens of thousands of files takes, several times over.
MAX_REPLY_BYTES = 32 << 20

_FORWARDED = ("authorization", "accept")


@dataclass(frozen=True, slots=True)
class _Call:
    http: Http
    origin: Origin
    cancel: CancelScope


_call: ContextVar[_Call] = ContextVar("lmd_hub_call")


@contextmanager
def using(http: Http, origin: Origin, cancel: CancelScope) -> Iterator[None]:
    """Send what this thread asks of `huggingface_hub` through *http*, and only to *origin*."""
    token = _call.set(_Call(http, origin, cancel))
    try:
        yield
    finally:
        _call.reset(token)


class _Transport(httpx2.BaseTransport):
    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        call = _call.get(None)
        if call is None or origin_of(str(request.url)) != call.origin:
            # The package has errands of its own, such as usage pings, where its settings were read too early.
            raise httpx2.ConnectError("only the endpoint is asked", request=request)
        headers = {name: request.headers[name] for name in _FORWARDED if name in request.headers}
        with call.http.send(request.method, str(request.url), cancel=call.cancel, headers=headers) as reply:
            body = reply.read_all(MAX_REPLY_BYTES)
        return httpx2.Response(reply.status, headers=reply.headers, content=body, request=request)


def _refuse_foreign_redirect(response: httpx2.Response) -> None:
    """Let the API's redirects (a renamed repository) lead nowhere but to the API's own origin."""
    if not response.has_redirect_location:
        return
    here = str(response.request.url)
    there = str(response.request.url.join(response.headers["location"]))
    try:
        same = origin_of(here) == origin_of(there)
    except AddressRefused as error:
        raise ReplyRefused(f"redirected to a place that is off limits: {error}") from error
    if not same:
        raise ReplyRefused("the API redirects to another server")


def _client() -> httpx2.Client:
    return httpx2.Client(
        transport=_Transport(),
        follow_redirects=True,
        max_redirects=5,
        event_hooks={"response": [_refuse_foreign_redirect]},
        trust_env=False,
    )


set_client_factory(_client)
