"""Small files of a repository that go into a model's configuration: licence, system prompt, parameters.

The convention is that of Hub repositories made for Ollama: `system` is a text, `params` a JSON object. `template` is
left alone: there it is a Go template, and the GGUF brings its own. None of them may break a pull: what is too large
or does not parse is left out.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from lmd.registry.cancel import CancelScope
from lmd.registry.errors import DigestMismatch, InvalidRequest
from lmd.registry.http import Credentials, Http
from lmd.registry.parameters import ParameterValue, validate
from lmd.registry.sources.hub import HubModel, HubSource
from lmd.registry.sources.refusals import blamed_on, refusal

_log = logging.getLogger(__name__)


class TextKind(Enum):
    """What a small file is for."""

    LICENSE = "license"
    SYSTEM = "system"
    PARAMETERS = "params"


_MAX_BYTES = {TextKind.LICENSE: 256 << 10, TextKind.SYSTEM: 64 << 10, TextKind.PARAMETERS: 64 << 10}
#: In order of preference, in lower case.
_NAMES = {
    TextKind.LICENSE: ("license", "license.txt", "license.md", "licence", "licence.txt", "licence.md", "copying"),
    TextKind.SYSTEM: ("system",),
    TextKind.PARAMETERS: ("params",),
}


@dataclass(frozen=True, slots=True)
class RemoteText:
    """A small file at the Hub."""

    kind: TextKind
    filename: str
    url: str
    ref: str
    git_sha1: str | None
    sha256: str | None
    credentials: Credentials | None


@dataclass(frozen=True, slots=True)
class Texts:
    """What the small files say."""

    license: str | None = None
    system: str | None = None
    parameters: tuple[tuple[str, ParameterValue], ...] = ()


def choose_texts(
    source: HubSource, model: HubModel, *, ref: str, credentials: Credentials | None
) -> tuple[RemoteText, ...]:
    """Pick the small files in the repository's root that are worth fetching."""
    by_name = {entry.name.lower(): entry for entry in model.entries}
    chosen = []
    for kind, names in _NAMES.items():
        entry = next((by_name[name] for name in names if name in by_name), None)
        if entry is None or entry.size_bytes is None or not 0 < entry.size_bytes <= _MAX_BYTES[kind]:
            continue
        chosen.append(
            RemoteText(
                kind, entry.name, source.file_url(model, entry.name), ref, entry.git_sha1, entry.sha256, credentials
            )
        )
    return tuple(chosen)


def fetch_text(http: Http, text: RemoteText, cancel: CancelScope) -> bytes:
    """Fetch and verify a small file; one try.

    Raises:
        SourceError: the source refuses, fails, or sends too much.
        DigestMismatch: the content is not what was announced.
        PullCancelled: cancelled.
    """
    with (
        blamed_on(text.ref),
        http.follow("GET", text.url, cancel=cancel, credentials=text.credentials) as reply,
    ):
        if reply.status != 200:
            has_token = text.credentials is not None
            raise refusal(reply.status, reply.headers, ref=text.ref, what=text.filename, has_token=has_token)
        data = reply.read_all(_MAX_BYTES[text.kind])
    if text.sha256 is not None:
        expected, actual = f"sha256:{text.sha256}", f"sha256:{hashlib.sha256(data).hexdigest()}"
    else:
        blob = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False)
        expected, actual = f"git:{text.git_sha1}", f"git:{blob.hexdigest()}"
    if actual != expected and (text.sha256 or text.git_sha1):
        raise DigestMismatch(expected=expected, actual=actual, what=text.filename)
    return data


def read_texts(contents: Sequence[tuple[RemoteText, bytes]]) -> Texts:
    """Interpret the small files, leaving out what is not usable."""
    license_text = system = None
    parameters: tuple[tuple[str, ParameterValue], ...] = ()
    for text, data in contents:
        try:
            content = data.decode("utf-8-sig")
        except UnicodeDecodeError:
            _log.warning("%s: %s is not UTF-8 and was left out", text.ref, text.filename)
            continue
        if text.kind is TextKind.PARAMETERS:
            parameters = _parameters(content, text)
        elif text.kind is TextKind.SYSTEM:
            system = content.strip() or None
        else:
            license_text = content.strip() or None
    return Texts(license_text, system, parameters)


def _parameters(content: str, text: RemoteText) -> tuple[tuple[str, ParameterValue], ...]:
    try:
        values = json.loads(content)
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        _log.warning("%s: %s is not a JSON object and was left out", text.ref, text.filename)
        return ()
    kept: list[tuple[str, ParameterValue]] = []
    for name, value in values.items():
        try:
            kept.extend(validate({name: value}).items())
        except InvalidRequest as error:
            _log.warning("%s: %s: %s; left out", text.ref, text.filename, error.message)
    return tuple(kept)
