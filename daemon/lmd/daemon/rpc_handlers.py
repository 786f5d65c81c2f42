"""Puts something around every gRPC handler, whatever its shape."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, aclosing
from typing import Any

import grpc
import grpc.aio

#: Makes what surrounds one call, from the full method name and the call's context.
Around = Callable[[str, Any], AbstractAsyncContextManager[None]]

_BUILDERS: dict[tuple[bool, bool], tuple[str, Callable[..., Any]]] = {
    (False, False): ("unary_unary", grpc.unary_unary_rpc_method_handler),
    (False, True): ("unary_stream", grpc.unary_stream_rpc_method_handler),
    (True, False): ("stream_unary", grpc.stream_unary_rpc_method_handler),
    (True, True): ("stream_stream", grpc.stream_stream_rpc_method_handler),
}


class AroundInterceptor(grpc.aio.ServerInterceptor):
    """A server interceptor that runs every handler inside a context manager."""

    def __init__(self, around: Around) -> None:
        self._around = around

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: grpc.HandlerCallDetails
    ) -> Any:
        """Return the handler of a call, wrapped; None for an unknown method, which gRPC answers itself."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        attribute, build = _BUILDERS[handler.request_streaming, handler.response_streaming]
        behaviour = _wrap(getattr(handler, attribute), self._around, handler_call_details.method)
        return build(behaviour, handler.request_deserializer, handler.response_serializer)


def _wrap(inner: Callable[[Any, Any], Any], around: Around, method: str) -> Callable[[Any, Any], Any]:
    if inspect.isasyncgenfunction(inner):

        async def stream(request: Any, context: Any) -> None:
            # gRPC leaves a generator suspended when a call is cancelled during a write, and its `finally` would wait
            # for the garbage collector. Written this way it runs at once.
            async with around(method, context), aclosing(inner(request, context)) as messages:
                async for message in messages:
                    try:
                        await context.write(message)
                    except grpc.aio.InternalError:  # what gRPC says when the client has hung up before the write
                        raise asyncio.CancelledError from None

        return stream
    if inspect.iscoroutinefunction(inner):

        async def call(request: Any, context: Any) -> Any:
            async with around(method, context):
                return await inner(request, context)

        return call
    raise TypeError(f"the handler of {method} is not async")
