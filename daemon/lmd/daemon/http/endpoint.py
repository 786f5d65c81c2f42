"""Wraps the handlers of an adapter, so that whatever goes wrong in them is answered in the adapter's own shape."""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable

import structlog
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from lmd.daemon.http.bodies import BodyError
from lmd.daemon.http.errors import CLIENT_CLOSED_REQUEST, retry_after, status_of
from lmd.daemon.outcomes import note_failure
from lmd.registry.errors import LmdError

log = structlog.get_logger(__name__)

Handler = Callable[[Request], Awaitable[Response]]
#: Makes the answer to a failure: the status, what to tell, and the error where there is one.
RenderError = Callable[[int, str, LmdError | BodyError | None], Response]


def endpoint(handler: Handler, render_error: RenderError) -> Handler:
    """Return *handler* with its errors rendered by *render_error*.

    What nobody expected is logged, and answered with 500 and the id under which the log has it.
    """

    async def handle(request: Request) -> Response:
        try:
            return await handler(request)
        except BodyError as error:
            return render_error(error.status, error.message, error)
        except LmdError as error:
            note_failure(error)
            if error.reason == "INTERNAL":
                return _defect(request, error, render_error)
            response = render_error(status_of(error), error.message, error)
            if value := retry_after(error):
                response.headers.setdefault("retry-after", value)
            return response
        except ClientDisconnect:
            return render_error(CLIENT_CLOSED_REQUEST, "request canceled", None)
        except Exception as error:  # the boundary: whatever happens inside becomes an answer
            return _defect(request, error, render_error)

    return handle


def _defect(request: Request, error: Exception, render_error: RenderError) -> Response:
    error_id = secrets.token_hex(6)
    log.error("http_failed", method=request.method, path=request.url.path, error_id=error_id, exc_info=error)
    return render_error(500, f"internal error in the daemon; its log has more under error_id {error_id}", None)
