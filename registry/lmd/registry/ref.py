"""Model references: what people type to name a model.

    llama3   llama3:8b   me/llama3:8b           a name, with a tag; an alias or a model made here
    hf.co/org/repo   hf.co/org/repo:Q4_K_M      a repository of the Hub, with a quantization or a file of it
    https://host/path/x.gguf                    a file on a web server
    file:/path/x.gguf   /path/x.gguf   ./x.gguf a file on this machine
    ...@sha256:<64 hex digits>                  any of them, asserting the digest

A digest alone, or its first digits, is not a reference: it names bytes, not a model.

Names travel into terminals, logs, URLs and listings, so the grammar is strict ASCII, and every refusal says at which
position and what is expected there. The canonical name of a reference is itself a reference with the same name.
"""

from __future__ import annotations

import ipaddress
import re
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote_to_bytes

from lmd.registry.digest import Digest
from lmd.registry.ref_text import RefText

MAX_PART_CHARS = 80
MAX_HUB_PART_CHARS = 96
MAX_QUERY_CHARS = 2048
"""Signed URLs are long; the query is no part of a name."""
DEFAULT_TAG = "latest"
HUB_HOST = "hf.co"

_HUB_PREFIX = re.compile(r"(?:hf|huggingface)\.co/", re.IGNORECASE | re.ASCII)
# What the address bar of a browser holds for a repository or one of its files.
_HUB_PAGE = re.compile(
    r"https://(?:www\.)?(?:hf|huggingface)\.co/([^/]+/[^/?#]+)"
    r"(?:/?|/tree/main/?|/(?:resolve|blob)/main/([^?#]+)(?:[?#].*)?)",
    re.IGNORECASE | re.ASCII,
)
_OLLAMA_REGISTRY = re.compile(
    r"(?:https?://)?(?:registry\.ollama\.ai|(?:www\.)?ollama\.com)/", re.IGNORECASE | re.ASCII
)
_URL_PREFIX = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_DIGEST_SUFFIX = re.compile(r"@sha256:([0-9a-f]{64})$")
_SHORT_ID = re.compile(r"[0-9a-f]{8,64}")
_SHARD_SUFFIX = re.compile(r"-\d{5}-of-\d{5}$")
_PERCENT = re.compile(r"%(?![0-9A-Fa-f]{2})")
_NAME_CHARS = frozenset("abcdefghijklmnopqrstuvwxyz0123456789_.-")
_HUB_CHARS = _NAME_CHARS | frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
_HUB_FILE_CHARS = _HUB_CHARS | frozenset("+=,()[]~")
_URL_PATH_CHARS = _HUB_CHARS | frozenset("~!$&'()*+,;=:@%")


@dataclass(frozen=True, slots=True)
class NameRef:
    """A plain name: ``[namespace/]model:tag``, in lower case."""

    model: str
    tag: str = DEFAULT_TAG
    digest: Digest | None = None

    @property
    def name(self) -> str:
        """The canonical name, tag included."""
        return f"{self.model}:{self.tag}"


@dataclass(frozen=True, slots=True)
class HubRef:
    """A repository of the Hub; *selector* is a quantization or a file name, None leaves the choice to the rules.

    The case is kept; the Hub and the store compare without it.
    """

    org: str
    repo: str
    selector: str | None = None
    digest: Digest | None = None

    @property
    def name(self) -> str:
        """The canonical name: ``hf.co/org/repo:selector``, or ``:latest`` without one."""
        return f"{HUB_HOST}/{self.org}/{self.repo}:{self.selector or DEFAULT_TAG}"

    @property
    def repo_id(self) -> str:
        """``org/repo``, as the Hub's API wants it."""
        return f"{self.org}/{self.repo}"


@dataclass(frozen=True, slots=True)
class UrlRef:
    """A file on a web server.

    *url* is what to fetch, with a query or credentials if there are any: never log it. The name has neither.
    """

    url: str = field(repr=False)
    name: str
    digest: Digest | None = None


@dataclass(frozen=True, slots=True)
class FileRef:
    """A file on this machine; its name is made of the file's."""

    path: Path
    digest: Digest | None = None

    @property
    def name(self) -> str:
        """``<stem>:latest``, in the characters of names."""
        return f"{name_from_filename(self.path.name)}:{DEFAULT_TAG}"


ModelRef = NameRef | HubRef | UrlRef | FileRef


def parse_ref(text: str) -> ModelRef:
    """Parse a model reference.

    Raises:
        InvalidRef: when *text* is none; the message says where and why, the hint what a right one looks like.
    """
    RefText(text).check_characters()
    body, digest = _split_digest(text)
    if page := _HUB_PAGE.fullmatch(body):
        RefText(text).check_length(len(body))
        text = body = f"{HUB_HOST}/{page[1]}" + (f":{page[2]}" if page[2] else "")
    where = RefText(text)
    if body.lower().startswith("file:") or body.startswith(("/", "./")):
        return _parse_file(where, body, digest)
    # Before any change of case: some letters outside of ASCII have a lower case inside of it.
    where.check_ascii(body)
    if registry := _OLLAMA_REGISTRY.match(body):
        name = body[registry.end() :].removeprefix("library/")
        hint = f"`{name}` alone may stand for a repository of the Hub" if re.fullmatch(r"[\w.:-]+", name) else ""
        where.fail(0, "nothing can be pulled from Ollama's registry", hint or "name a repository of the Hub: `hf.co/…`")
    if hub := _HUB_PREFIX.match(body):
        return _parse_hub(where, body, hub.end(), digest)
    if url := _URL_PREFIX.match(body):
        return _parse_url(where, body, url, digest)
    return _parse_name(where, body, digest)


def name_from_filename(filename: str) -> str:
    """Make a model name (without tag) of a file's name: "Llama 3.Q4_K_M.gguf" becomes "llama-3.q4_k_m".

    The number of a shard is dropped. The result is always a valid name; "model" when nothing usable is left.
    """
    stem = filename[: -len(".gguf")] if filename.lower().endswith(".gguf") else filename
    stem = _SHARD_SUFFIX.sub("", stem)
    plain = unicodedata.normalize("NFKD", stem).encode("ascii", "ignore").decode("ascii").lower()
    slug = re.sub(r"[^a-z0-9_.-]+", "-", plain)
    slug = re.sub(r"\.{2,}", ".", slug).lstrip(".-")[:MAX_PART_CHARS].rstrip(".-")
    if _names_bytes(slug):
        slug = f"model-{slug}"[:MAX_PART_CHARS]
    return slug or "model"


def _names_bytes(model: str) -> bool:
    """Whether *model* reads as a digest or the start of one."""
    return model == "sha256" or _SHORT_ID.fullmatch(model) is not None


def _split_digest(text: str) -> tuple[str, Digest | None]:
    if match := _DIGEST_SUFFIX.search(text):
        return text[: match.start()], Digest(match[1])
    position = text.lower().rfind("@sha256:")
    if position >= 0:
        RefText(text).fail(position + 1, "a digest is `sha256:` and 64 lower-case hex digits")
    return text, None


def _parse_name(where: RefText, body: str, digest: Digest | None) -> NameRef:
    if not body or _names_bytes(body.partition(":")[0].lower()):
        where.fail(0, "a digest or its first digits name bytes, not a model", "put the model's name before it")
    where.check_length(len(body))
    if "@" in body:
        where.fail(body.index("@") + 1, "only a digest follows `@`: `sha256:` and 64 hex digits")
    path, colon, tag = body.partition(":")
    lowered = path.lower()
    namespace, slash, model = lowered.rpartition("/")
    if slash:
        if "/" in namespace:
            where.fail(
                len(namespace.rpartition("/")[0]),
                "a name has one `/` at most",
                "put `hf.co/` before a repository of the Hub, `./` before a file",
            )
        hint = "a namespace is a word without dots; put `hf.co/` or `https://` before what lies elsewhere"
        where.check_part(0, namespace, "namespace", _NAME_CHARS - {"."}, MAX_PART_CHARS, hint)
    where.check_part(len(namespace) + len(slash), model, "model name", _NAME_CHARS, MAX_PART_CHARS)
    if colon:
        where.check_part(len(path) + 1, tag.lower(), "tag", _NAME_CHARS, MAX_PART_CHARS)
    return NameRef(lowered, tag.lower() or DEFAULT_TAG, digest)


def _parse_hub(where: RefText, body: str, start: int, digest: Digest | None) -> HubRef:
    where.check_length(len(body))
    hint = "it looks like `hf.co/org/repo`, `hf.co/org/repo:Q4_K_M` or `hf.co/org/repo:file.gguf`"
    path, colon, selector = body[start:].partition(":")
    org, slash, repo = path.partition("/")
    where.check_part(start, org, "organisation", _HUB_CHARS, MAX_HUB_PART_CHARS, hint)
    if not slash:
        where.fail(start + len(org), "the repository is missing", hint)
    repo_start = start + len(org) + 1
    if "/" in repo:
        where.fail(repo_start + repo.index("/"), "a file of a repository follows `:`", hint)
    if "@" in repo:
        where.fail(repo_start + repo.index("@") + 1, "only a digest follows `@`: `sha256:` and 64 hex digits", hint)
    where.check_part(repo_start, repo, "repository", _HUB_CHARS, MAX_HUB_PART_CHARS, hint)
    for part, part_start in ((org, start), (repo, repo_start)):
        if "--" in part:
            where.fail(part_start + part.index("--"), "the Hub does not allow `--` in names", hint)
        if part[-1] in ".-":
            where.fail(part_start + len(part) - 1, f"the Hub does not allow names that end in `{part[-1]}`", hint)
    if colon:
        position = start + len(path) + 1
        for part in selector.split("/"):
            where.check_part(position, part, "quantization or file name", _HUB_FILE_CHARS, 200, hint)
            position += len(part) + 1
    chosen = selector if colon and selector.lower() != DEFAULT_TAG else None
    return HubRef(org, repo, chosen, digest)


def _parse_url(where: RefText, body: str, scheme_match: re.Match[str], digest: Digest | None) -> UrlRef:
    scheme = scheme_match[1].lower()
    start = scheme_match.end()
    if scheme not in ("https", "http"):
        where.fail(0, f"`{scheme}://` is not supported", "use `https://`, `hf.co/` or a path")
    plain, query = _split_query(body)
    authority, _, path = plain[start:].partition("/")
    userinfo, at, host_port = authority.rpartition("@")
    host_start = start + len(userinfo) + len(at)
    host, port = _parse_host(where, host_start, host_port)
    if scheme == "http" and not is_loopback(host):
        where.fail(0, "`http://` is allowed to this machine only", "use `https://`")
    path_start = start + len(authority) + 1
    _check_url_path(where, path_start, path)
    if not path.lower().endswith(".gguf"):
        where.fail(path_start + len(path), "the path must end in `.gguf`")
    if len(query) > MAX_QUERY_CHARS:
        where.fail(len(plain) + MAX_QUERY_CHARS, f"the query is longer than {MAX_QUERY_CHARS} characters")
    if " " in body:
        where.fail(body.index(" "), "a space must be percent-encoded")
    default_port = "443" if scheme == "https" else "80"
    shown_port = f":{port}" if port and port != default_port else ""
    name = f"{scheme}://{host}{shown_port}/{path}"
    where.check_length(len(name))
    return UrlRef(url=f"{scheme}://{userinfo}{at}{host}{shown_port}/{path}{query}", name=name, digest=digest)


def _split_query(body: str) -> tuple[str, str]:
    """Split off the query, with its ``?``; a fragment is dropped."""
    without_fragment = body.partition("#")[0]
    plain, mark, query = without_fragment.partition("?")
    return plain, mark + query if query else ""


def _parse_host(where: RefText, start: int, host_port: str) -> tuple[str, str]:
    match = re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[^:\[\]]*)(?::(\d{1,5}))?", host_port)
    if match is None or (match[2] and not 0 < int(match[2]) < 65536):
        where.fail(start, f"`{ascii(host_port)[1:-1]}` is not a host and port")
    host = match[1].lower()
    if host.startswith("["):
        try:
            host = f"[{ipaddress.IPv6Address(host[1:-1])}]"
        except ValueError:
            where.fail(start, "this is not an IPv6 address")
    elif not re.fullmatch(r"(?!-)[a-z0-9-]{1,63}(\.(?!-)[a-z0-9-]{1,63})*", host) or len(host) > 253:
        where.fail(start, f"`{ascii(host)[1:-1]}` is not a host name")
    return host, str(int(match[2])) if match[2] else ""


def is_loopback(host: str) -> bool:
    """Whether *host* (lower case, IPv6 in brackets) is this machine by its spelling."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _check_url_path(where: RefText, start: int, path: str) -> None:
    position = start
    for part in path.split("/"):
        if not part:
            where.fail(position, "a part of the path is empty")
        for offset, char in enumerate(part):
            if char not in _URL_PATH_CHARS:
                where.fail(position + offset, f"`{ascii(char)[1:-1]}` must be percent-encoded")
        if bad := _PERCENT.search(part):
            where.fail(position + bad.start(), "`%` is not followed by two hex digits")
        decoded = unquote_to_bytes(part)
        if decoded in (b".", b"..") or set(decoded) & set(b"/\\%") or min(decoded) < 0x20 or 0x7F in decoded:
            where.fail(position, "this part of the path is not a plain name")
        position += len(part) + 1


def _parse_file(where: RefText, body: str, digest: Digest | None) -> FileRef:
    start = 0
    if body.lower().startswith("file:"):
        start = len("file://") if body[5:].startswith("//") else len("file:")
        if not body[start:].startswith("/"):
            where.fail(start, "after `file:` comes an absolute path", "such as `file:/path/x.gguf`")
    path = body[start:]
    if path.endswith("/"):
        where.fail(len(body) - 1, "this is a directory, not a file")
    position = start
    for part in path.split("/"):
        if part == "..":
            where.fail(position, "`..` is not allowed in a path", "write the path without `..`")
        if len(part.encode("utf-8")) > 255:
            where.fail(position, "this part of the path is longer than 255 bytes")
        position += len(part) + 1
    if path.rpartition("/")[2] == ".":
        where.fail(len(body) - 1, "this is a directory, not a file")
    return FileRef(Path(path), digest)
