"""Tokens of callers that the kernel cannot name: their hashes in a file, one name each."""

from __future__ import annotations

import hashlib
import os
import re
import stat
from pathlib import Path

import structlog

from lmd.registry.errors import LmdError

log = structlog.get_logger(__name__)

MAX_FILE_BYTES = 256 * 1024
_LINE = re.compile(r"([A-Za-z0-9_.-]{1,64})\s+sha256:([0-9a-fA-F]{64})")


class TokensUnusable(LmdError):
    """Raised when a file of tokens cannot be used."""


class Tokens:
    """Names the bearers of tokens. The file is read again when it changes; while it cannot be read, nobody has one."""

    def __init__(self, file: Path | None) -> None:
        self._file = file
        self._seen: tuple[int, ...] | None = None
        self._names: dict[bytes, str] = {}

    def name_of(self, token: str) -> str | None:
        """Return whose token this is."""
        if self._file is None or not token:
            return None
        self._refresh(self._file)
        # Looking up the hash tells nothing about the token that timing could reveal: hashes of guesses are unrelated.
        return self._names.get(hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest())

    def _refresh(self, file: Path) -> None:
        try:
            seen = _identity(file)
            if seen == self._seen:
                return
            self._seen = seen
            self._names = read_tokens(file)
        except (OSError, TokensUnusable) as error:
            if self._names or self._seen is None:
                log.error("tokens_unusable", file=str(file), error=str(error))
            self._names = {}
            self._seen = self._seen or ()


def read_tokens(file: Path) -> dict[bytes, str]:
    """Return the name of each hash.

    Raises:
        TokensUnusable: the file is not there, others may read or write it, or a line of it is wrong.
    """
    try:
        with file.open("rb") as stream:
            status = os.fstat(stream.fileno())
            content = stream.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise TokensUnusable(f"{file} cannot be read: {error.strerror}") from None
    if not stat.S_ISREG(status.st_mode):
        raise TokensUnusable(f"{file} is not a regular file")
    if status.st_mode & 0o077:
        raise TokensUnusable(f"{file} can be read by others", hint=f"run `chmod 600 {file}`")
    if status.st_uid not in (os.getuid(), 0):
        raise TokensUnusable(f"{file} belongs to another user (uid {status.st_uid})")
    if len(content) > MAX_FILE_BYTES:
        raise TokensUnusable(f"{file} is larger than {MAX_FILE_BYTES} bytes")
    names: dict[bytes, str] = {}
    for number, line in enumerate(content.decode("utf-8", "replace").splitlines(), 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        match = _LINE.fullmatch(text)
        if match is None:
            raise TokensUnusable(f"{file}, line {number}: expected a name and sha256: with 64 hexadecimal digits")
        digest = bytes.fromhex(match[2])
        if digest in names or match[1] in names.values():
            raise TokensUnusable(f"{file}, line {number}: this name or token is there already")
        names[digest] = match[1]
    return names


def _identity(file: Path) -> tuple[int, ...]:
    status = file.stat()
    return status.st_ino, status.st_mtime_ns, status.st_ctime_ns, status.st_size
