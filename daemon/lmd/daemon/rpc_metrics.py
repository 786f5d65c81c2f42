"""Counts the requests that come through gRPC."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from lmd.daemon.metrics import Metrics
from lmd.daemon.rpc_handlers import AroundInterceptor

_OWN = "/lmd.v1."


def metrics_interceptor(metrics: Metrics) -> AroundInterceptor:
    """Return the interceptor that counts calls; it belongs inside of the one that translates errors."""

    @asynccontextmanager
    async def counted(method: str, context: Any) -> AsyncIterator[None]:
        # Only methods that exist come this far, so this is a name of ours or of a standard service.
        with metrics.request("grpc", "grpc", method.removeprefix(_OWN).lstrip("/")):
            yield

    return AroundInterceptor(counted)
