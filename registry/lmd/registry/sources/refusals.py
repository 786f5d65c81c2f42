"""What a source's refusals mean, in words for people and with a next step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from lmd.registry.connect import TransportFailed
from lmd.registry.errors import (
    SourceDenied,
    SourceError,
    SourceInvalid,
    SourceNotFound,
    SourceRateLimited,
    SourceUnavailable,
)
from lmd.registry.http import ReplyRefused
from lmd.registry.http_headers import retry_after_s

_TOKEN_HINT = "give a token: set `HF_TOKEN` for `lm` or for the daemon"  # noqa: S105 - words, not a secret


def refusal(
    status: int, headers: Mapping[str, str], *, ref: str, what: str, has_token: bool, page: str = ""
) -> SourceError:
    """Return the error for a reply that is neither success nor redirect.

    *headers* have lower-case names; *what* is what was asked for, such as "repository org/repo"; *page* is where a
    person can ask for access. The Hub names its reasons in X-Error-Code.
    """
    code = headers.get("x-error-code", "")
    if code == "GatedRepo":
        where = f" at {page}" if page else ""
        if has_token:
            return SourceDenied(
                f"the token has no access to the gated {what}", ref=ref, hint=f"ask for access{where}, then try again"
            )
        return SourceDenied(f"{what} is gated", ref=ref, hint=f"accept its terms{where}, then {_TOKEN_HINT}")
    if code in ("RepoNotFound", "RevisionNotFound", "EntryNotFound") or status in (404, 410):
        private = "make sure that the token in `HF_TOKEN` may read it" if has_token else _TOKEN_HINT
        hint = f"check the spelling; if it is private, {private}"
        return SourceNotFound(f"{what} does not exist, or is private", ref=ref, hint=hint)
    if status == 401 and has_token:
        return SourceDenied("the source does not accept the token", ref=ref, hint="check the token in `HF_TOKEN`")
    if status in (401, 403):
        return SourceDenied(f"the source refuses access to {what}", ref=ref, hint=_TOKEN_HINT)
    if status == 429:
        wait_s = retry_after_s(headers)
        when = f" for {wait_s:.0f} s" if wait_s is not None else ""
        return SourceRateLimited(
            f"the source asks to slow down{when}",
            ref=ref,
            hint="" if has_token else f"with a token the limits are higher: {_TOKEN_HINT}",
            retry_after_s=wait_s,
        )
    if status in (408, 425) or status >= 500:
        return SourceUnavailable(
            f"the source fails with status {status}",
            ref=ref,
            hint="try again later",
            retry_after_s=retry_after_s(headers),
        )
    return SourceInvalid(f"the source answers with status {status} for {what}", ref=ref)


@contextmanager
def blamed_on(ref: str) -> Iterator[None]:
    """Turn failures of the HTTP layer into errors of the source of *ref*."""
    try:
        yield
    except TransportFailed as error:
        raise unreachable(error, ref) from error
    except ReplyRefused as error:
        raise SourceInvalid(str(error), ref=ref) from error


def unreachable(error: TransportFailed, ref: str) -> SourceError:
    """Return the error for a connection that failed."""
    if error.permanent:
        return SourceInvalid(str(error), ref=ref, hint="check the network's proxy and certificate settings")
    return SourceUnavailable(str(error), ref=ref, hint="check the network, then try again")
