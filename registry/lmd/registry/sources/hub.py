"""The Hub: what a repository holds, in one request through `huggingface_hub`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from lmd.registry.addresses import AddressRefused, origin_of
from lmd.registry.cancel import CancelScope
from lmd.registry.errors import InvalidRequest, SourceInvalid, SourceUnavailable
from lmd.registry.http import Credentials, Http, Reply
from lmd.registry.http_headers import git_sha1_from_etag, parse_length, sha256_from_etag
from lmd.registry.quant import check_name
from lmd.registry.sources.refusals import blamed_on, refusal

_COMMIT = re.compile(r"[0-9a-f]{40}", re.ASCII)
_SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)
_TOKEN = re.compile(r"[\x21-\x7e]{1,512}", re.ASCII)
_MAX_FILES = 100_000
_MAX_LICENSE_NAME = 200


@dataclass(frozen=True, slots=True)
class HubEntry:
    """A file of a repository as the API announces it; None is what it leaves out."""

    name: str
    size_bytes: int | None
    sha256: str | None
    git_sha1: str | None


@dataclass(frozen=True, slots=True)
class HubModel:
    """A repository at one commit."""

    org: str
    repo: str
    commit: str
    entries: tuple[HubEntry, ...]
    license: str | None

    @property
    def repo_id(self) -> str:
        """The name with its owner, as URLs have it."""
        return f"{self.org}/{self.repo}"


class HubSource:
    """One Hub endpoint. Thread-safe."""

    def __init__(self, http: Http, endpoint: str) -> None:
        self._http = http
        self.endpoint = endpoint.rstrip("/")
        try:
            self._origin = origin_of(self.endpoint)
        except AddressRefused as error:
            raise InvalidRequest(f"the Hub endpoint is not usable: {error}", field="endpoint") from error

    def credentials(self, token: str | None) -> Credentials | None:
        """Return *token* bound to the endpoint's origin.

        Raises:
            InvalidRequest: the token holds characters that no token has.
        """
        if not token:
            return None
        if _TOKEN.fullmatch(token) is None:
            raise InvalidRequest(
                "the token holds spaces or characters that are not ASCII",
                field="token",
                hint="check the token in `HF_TOKEN`",
            )
        return Credentials(f"Bearer {token}", self._origin)

    def page(self, repo_id: str) -> str:
        """Return where people read about a repository."""
        return f"{self.endpoint}/{repo_id}"

    def file_url(self, model: HubModel, name: str) -> str:
        """Return where the bytes of a file are, pinned to the commit that was looked at.

        Raises:
            SourceInvalid: *name* could lead elsewhere: clients resolve dots and slashes in URLs.
        """
        check_name(name, ref=model.repo_id)
        return f"{self.endpoint}/{model.repo_id}/resolve/{model.commit}/{quote(name)}"

    def describe(self, org: str, repo: str, *, ref: str, token: str | None, cancel: CancelScope) -> HubModel:
        """Ask for commit, files, sizes and digests of a repository's main branch: one request, one try.

        Raises:
            SourceError: the source refuses, fails, or answers nonsense.
            PullCancelled: cancelled.
        """
        # Late: the package costs 20 MB, and a daemon that never pulls does not need it.
        import huggingface_hub
        from huggingface_hub.errors import HfHubHTTPError

        from lmd.registry.sources import hub_client

        if huggingface_hub.constants.is_offline_mode():
            raise SourceUnavailable("offline mode is on", ref=ref, hint="unset `HF_HUB_OFFLINE` for the daemon")
        repo_id = f"{org}/{repo}"
        api = huggingface_hub.HfApi(endpoint=self.endpoint, token=token or False)
        with blamed_on(ref), hub_client.using(self._http, self._origin, cancel):
            try:
                info = api.model_info(repo_id, files_metadata=True)
            except HfHubHTTPError as error:
                headers = {name.lower(): value for name, value in error.response.headers.items()}
                raise refusal(
                    error.response.status_code,
                    headers,
                    ref=ref,
                    what=f"repository {repo_id}",
                    has_token=token is not None,
                    page=self.page(repo_id),
                ) from error
            except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
                raise SourceInvalid("the source's description of the repository does not parse", ref=ref) from error
        return _model(org, repo, info, ref)

    def complete(
        self, model: HubModel, entry: HubEntry, *, ref: str, credentials: Credentials | None, cancel: CancelScope
    ) -> HubEntry:
        """Ask for what the API left out about a file: the headers of its resolve reply say more.

        Raises:
            SourceError: the source refuses or fails.
            PullCancelled: cancelled.
        """
        hops: list[Reply] = []
        with blamed_on(ref):
            reply = self._http.follow(
                "HEAD",
                self.file_url(model, entry.name),
                cancel=cancel,
                credentials=credentials,
                on_redirect=hops.append,
            )
            reply.close()
        linked = next((hop.headers for hop in hops if "x-linked-size" in hop.headers), None)
        if linked is None and reply.status >= 400:
            raise refusal(
                reply.status,
                reply.headers,
                ref=ref,
                what=f"file {entry.name} of {model.repo_id}",
                has_token=credentials is not None,
                page=self.page(model.repo_id),
            )
        if linked is not None:
            # The ETag of such a reply, like the API's blob id, is that of an LFS pointer and not of the bytes.
            size_bytes, git_sha1 = parse_length(linked["x-linked-size"]), None
        else:
            size_bytes = parse_length(reply.headers.get("content-length"))
            git_sha1 = git_sha1_from_etag(reply.headers.get("etag"))
        sha256 = sha256_from_etag((linked or {}).get("x-linked-etag"))
        return HubEntry(entry.name, size_bytes if size_bytes is not None else entry.size_bytes, sha256, git_sha1)


def _model(org: str, repo: str, info: Any, ref: str) -> HubModel:
    # `info` is a ModelInfo, whose annotations promise more than it checks.
    if not isinstance(info.sha, str) or _COMMIT.fullmatch(info.sha) is None:
        raise SourceInvalid("the source does not name the commit of the repository", ref=ref)
    siblings = info.siblings or []
    if len(siblings) > _MAX_FILES:
        raise SourceInvalid(f"the repository has more than {_MAX_FILES} files", ref=ref)
    entries = []
    for sibling in siblings:
        size = sibling.lfs.size if sibling.lfs is not None else sibling.size
        sha256 = sibling.lfs.sha256 if sibling.lfs is not None else None
        # The git id of an LFS file is that of its pointer: no use for checking bytes.
        git_sha1 = sibling.blob_id if sibling.lfs is None else None
        well_formed = (
            isinstance(sibling.rfilename, str)
            and (size is None or (type(size) is int and 0 <= size < 1 << 63))
            and (sha256 is None or (isinstance(sha256, str) and _SHA256.fullmatch(sha256) is not None))
            and (git_sha1 is None or (isinstance(git_sha1, str) and _COMMIT.fullmatch(git_sha1) is not None))
        )
        if not well_formed:
            raise SourceInvalid("the source describes a file with a bad name, size or digest", ref=ref)
        entries.append(HubEntry(sibling.rfilename, size, sha256, git_sha1))
    return HubModel(org, repo, info.sha, tuple(entries), _license(info))


def _license(info: Any) -> str | None:
    """Return the licence that the repository's tags name; "other" is replaced by the name its card gives."""
    named = None
    if getattr(info.card_data, "license", None) == "other":
        named = getattr(info.card_data, "license_name", None)
    tags = [tag for tag in info.tags if isinstance(tag, str)] if isinstance(info.tags, list) else []
    tagged = next((tag.removeprefix("license:") for tag in tags if tag.startswith("license:")), None)
    name = named if isinstance(named, str) else tagged
    return name if name and len(name) <= _MAX_LICENSE_NAME and name.isprintable() else None
