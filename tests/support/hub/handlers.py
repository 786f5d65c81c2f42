"""How requests are answered, on both origins."""

from __future__ import annotations

import gzip
import json
import os
import re
import socket
import ssl
import struct
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, quote, unquote, urlsplit

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
    Stage,
    Stall,
    Trigger,
    WrongStart,
)
from tests.support.hub.server import RequestRecord

if TYPE_CHECKING:
    from tests.support.hub.server import _Listener

#: Bytes per sendfile call: large, because each call passes through Python.
SEND_BYTES = 8 << 20


class HubHandler(BaseHTTPRequestHandler):
    """Serves the Hub's API, resolve redirects, the CDN's signed files, and ordinary files below `/plain/`."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Listener

    def setup(self) -> None:
        super().setup()
        self.hub = self.server.hub

    def log_message(self, format: str, *args: object) -> None:
        """Keep quiet; the request log is in memory."""

    def do_GET(self) -> None:
        self._dispatch()

    def do_HEAD(self) -> None:
        self._dispatch()

    # -- routing ------------------------------------------------------------------------------------------------

    def _dispatch(self) -> None:
        url = urlsplit(self.path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.record = RequestRecord(self.server.role, self.command, url.path, url.query, headers)
        self.hub.log(self.record)
        self.hub.on_request(self.record)
        path = unquote(url.path)
        if self.server.role == "cdn":
            self._cdn(path, url.query)
            return
        if self.hub.prefix:
            if not path.startswith(self.hub.prefix + "/"):
                self._json(404, {"error": "Not Found"})
                return
            path = path[len(self.hub.prefix) :]
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path):
            self._api(match[1], match[2] or "", match[3] or "main", url.query)
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._resolve(match[1], match[2], match[3])
        elif match := re.fullmatch(r"/plain/(.+)", path):
            self._plain(match[1])
        else:
            self._json(404, {"error": "Not Found"})

    def _api(self, repo_id: str, kind: str, revision: str, query: str) -> None:
        if self._fault_answer("api", repo_id, None):
            return
        repo = self._readable(repo_id, api=True)
        if repo is None:
            return
        if kind == "tree":
            answer: object = repo.tree(revision)
        else:
            answer = repo.describe(revision, blobs=parse_qs(query).get("blobs") == ["true"])
        if answer is None:
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return
        self._json(200, answer)

    def _resolve(self, repo_id: str, revision: str, filename: str) -> None:
        if self._fault_answer("resolve", repo_id, filename):
            return
        repo = self._readable(repo_id, api=False)
        if repo is None:
            return
        found = repo.at(revision)
        if found is None:
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return
        commit, files = found
        if filename not in files:
            self._refuse(404, "EntryNotFound", "Entry not found")
            return
        file = files[filename]
        lie = self.hub.faults.take(Lie, repo_id, filename) or Lie()
        headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        redirect = self.hub.faults.take(Redirect, repo_id, filename)
        if redirect is None and not file.lfs:
            headers["ETag"] = f'"{file.git_sha1}"'
            self._file(repo_id, file, headers)
            return
        if lie.no_etag:
            headers["ETag"] = f'"{file.git_sha1}"'
        else:
            headers["X-Linked-ETag"] = f'"{lie.sha256 or file.sha256}"'
            headers["ETag"] = f'"{file.pointer_sha1}"'
        headers["X-Linked-Size"] = str(file.size_bytes if lie.size_bytes is None else lie.size_bytes)
        where = f"{self.hub.cdn}/{repo_id}/{commit}/{quote(filename)}?X-Signature={self.hub.sign()}"
        if redirect is not None:
            here = f"{self._scheme}://{self.headers.get('Host', '')}{self.path}"
            where = redirect.location.replace("{self}", here)
        headers["Location"] = where
        self._send(302, headers, f"Found. Redirecting to {where}".encode())

    def _cdn(self, path: str, query: str) -> None:
        match = re.fullmatch(r"/([^/]+/[^/]+)/([0-9a-f]{40})/(.+)", path)
        repo = self.hub.repos.get(match[1]) if match else None
        if match is None or repo is None or match[3] not in repo.commits.get(match[2], {}):
            self._send(404, {}, b"NoSuchKey")
            return
        if not self.hub.accepts(parse_qs(query).get("X-Signature", [""])[0]):
            self._send(403, {"Content-Type": "application/xml"}, b"<Error><Code>AccessDenied</Code></Error>")
            return
        if self._fault_answer("data", repo.id, match[3]):
            return
        file = repo.commits[match[2]][match[3]]
        self._file(repo.id, file, {"ETag": f'"{file.sha256[:32]}"', "Accept-Ranges": "bytes"})

    def _plain(self, name: str) -> None:
        if self._fault_answer("data", "plain", name):
            return
        if name not in self.hub.plain:
            self._send(404, {}, b"no such file")
            return
        redirect = self.hub.faults.take(Redirect, "plain", name)
        if redirect is not None:
            here = f"{self._scheme}://{self.headers.get('Host', '')}{self.path}"
            self._send(302, {"Location": redirect.location.replace("{self}", here)}, b"")
            return
        etag = self.hub.plain_etags.get(name)
        headers = {"Accept-Ranges": "bytes"} if etag is None else {"Accept-Ranges": "bytes", "ETag": etag}
        self._file("plain", self.hub.plain[name], headers, if_range=etag)

    @property
    def _scheme(self) -> str:
        return "https" if isinstance(self.connection, ssl.SSLSocket) else "http"

    # -- access -------------------------------------------------------------------------------------------------

    def _readable(self, repo_id: str, *, api: bool) -> HubRepo | None:
        """Return the repository when the caller may see it; answers otherwise, as the real Hub does."""
        authorization = self.headers.get("Authorization", "")
        token = authorization.removeprefix("Bearer ")
        if authorization and token not in self.hub.tokens:
            self._refuse(401, "", "Invalid credentials in Authorization header")
            return None
        repo = self.hub.repos.get(repo_id)
        allowed = repo is not None and token in repo.allowed
        if repo is None or (repo.private and not allowed):
            self._refuse(404 if authorization else 401, "RepoNotFound", "Repository not found")
            return None
        if repo.gated and not allowed and not api:
            text = f"Access to model {repo_id} is restricted"
            self._refuse(403 if authorization else 401, "GatedRepo", text)
            return None
        return repo

    # -- answers ------------------------------------------------------------------------------------------------

    def _fault_answer(self, stage: Stage, repo: str, filename: str | None) -> bool:
        if self.hub.faults.take(Silence, repo, filename, lambda silence: silence.stage == stage) is not None:
            self.hub.stopping.wait()
            self.close_connection = True
            return True
        fault = self.hub.faults.take(Answer, repo, filename, lambda answer: answer.stage == stage)
        if fault is None:
            return False
        self._send(fault.status, dict(fault.headers), fault.body)
        return True

    def _refuse(self, status: int, code: str, message: str) -> None:
        headers = {"X-Error-Message": message, "Content-Type": "application/json"}
        if code:
            headers["X-Error-Code"] = code
        self._send(status, headers, json.dumps({"error": message}).encode())

    def _json(self, status: int, answer: object) -> None:
        self._send(status, {"Content-Type": "application/json"}, json.dumps(answer).encode())

    def _send(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self._head(status, {"Content-Length": str(len(body)), **headers})
        if self.command != "HEAD":
            self.wfile.write(body)
            self.record.sent_bytes += len(body)

    def _head(self, status: int, headers: dict[str, str]) -> None:
        self.record.status = status
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    # -- file bodies --------------------------------------------------------------------------------------------

    def _file(self, repo: str, file: HubFile, headers: dict[str, str], if_range: str | None = None) -> None:
        faults = self.hub.faults
        resize = faults.take(Resize, repo, file.name)
        size = max(0, file.size_bytes + (resize.delta if resize else 0))
        start, end, status = 0, size, 200
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        condition = self.headers.get("If-Range")
        if condition is not None and condition != if_range:
            asked = None
        if asked and faults.take(NoRange, repo, file.name) is None:
            start = int(asked[1])
            end = min(size, int(asked[2]) + 1) if asked[2] else size
            if start >= size:
                self._send(416, {**headers, "Content-Range": f"bytes */{size}"}, b"out of range")
                return
            wrong = faults.take(WrongStart, repo, file.name)
            if wrong is not None:
                start, end = max(0, start + wrong.shift), max(0, end + wrong.shift)
            status = 206
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
            self.record.byte_range = (start, end)
        if faults.take(Gzip, repo, file.name) is not None:
            body = gzip.compress(_read(file, start, min(end, file.size_bytes)))
            self._send(status, {**headers, "Content-Encoding": "gzip"}, body)
            return
        self._head(status, {**headers, "Content-Length": str(end - start)})
        if self.command == "HEAD":
            return
        corrupt = {fault.offset for fault in faults.all(Corrupt, repo, file.name)}
        real_end = min(end, file.size_bytes)
        if not self._body(repo, file, start, real_end, corrupt):
            self.close_connection = True
        elif end > real_end:
            self.wfile.write(bytes(end - real_end))

    def _body(self, repo: str, file: HubFile, start: int, end: int, corrupt: set[int]) -> bool:
        """Send the bytes from *start* to *end*; False when a fault ended it early."""
        hub, faults = self.hub, self.hub.faults
        cut = faults.take(Cut, repo, file.name, lambda fault: fault.after_bytes < end - start)
        stall = faults.take(Stall, repo, file.name, lambda fault: fault.after_bytes < end - start)
        drip = faults.take(Drip, repo, file.name)
        stop = min([end, *(start + fault.after_bytes for fault in (cut, stall) if fault)])
        watched = bool(faults.all(Trigger, repo, file.name) or faults.all(Expire, repo, file.name))
        by_sendfile = file.path is not None and not corrupt and not isinstance(self.connection, ssl.SSLSocket)
        fd = os.open(file.path, os.O_RDONLY) if file.path is not None and by_sendfile else None
        try:
            offset = start
            while offset < stop:
                want = 1 if drip else min(SEND_BYTES if by_sendfile else 1 << 20, stop - offset)
                if watched:
                    want = hub.bytes_until_event(repo, file.name, min(want, 1 << 20))
                if fd is None:
                    self.wfile.write(_flip(_read(file, offset, offset + want), offset, corrupt))
                    sent = want
                else:
                    sent = os.sendfile(self.connection.fileno(), fd, offset, want)
                    if sent == 0:
                        return False
                offset += sent
                self.record.sent_bytes += sent
                hub.count_sent(repo, file.name, sent)
                if drip:
                    time.sleep(1 / drip.bytes_per_s)
        finally:
            if fd is not None:
                os.close(fd)
        if cut is not None and stop < end:
            if cut.reset:
                with suppress(OSError):
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            return False
        if stall is not None and stop < end:
            hub.stopping.wait()
            return False
        return True


def _read(file: HubFile, start: int, end: int) -> bytes:
    if file.data is not None:
        return file.data[start:end]
    assert file.path is not None
    with file.path.open("rb") as source:
        source.seek(start)
        return source.read(end - start)


def _flip(data: bytes, offset: int, corrupt: set[int]) -> bytes:
    hits = [at - offset for at in corrupt if offset <= at < offset + len(data)]
    if not hits:
        return data
    changed = bytearray(data)
    for at in hits:
        changed[at] ^= 0xFF
    return bytes(changed)
