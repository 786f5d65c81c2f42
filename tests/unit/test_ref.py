from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lmd.registry.digest import Digest
from lmd.registry.errors import InvalidRef
from lmd.registry.ref import FileRef, HubRef, NameRef, UrlRef, is_loopback, name_from_filename, parse_ref

DIGEST = Digest.of(b"x")
AT = f"@{DIGEST}"


@pytest.mark.parametrize(
    ("text", "expected", "name"),
    [
        ("llama3", NameRef("llama3"), "llama3:latest"),
        ("llama3:8b", NameRef("llama3", "8b"), "llama3:8b"),
        ("LLaMA3:8B-Q4_K_M", NameRef("llama3", "8b-q4_k_m"), "llama3:8b-q4_k_m"),
        ("me/llama3.1:v2", NameRef("me/llama3.1", "v2"), "me/llama3.1:v2"),
        (f"llama3:8b{AT}", NameRef("llama3", "8b", DIGEST), "llama3:8b"),
        ("_a-b.c", NameRef("_a-b.c"), "_a-b.c:latest"),
        ("decade", NameRef("decade"), "decade:latest"),
        ("hf.co/Org/Re.po-1", HubRef("Org", "Re.po-1"), "hf.co/Org/Re.po-1:latest"),
        ("huggingface.co/Org/Repo:Q4_K_M", HubRef("Org", "Repo", "Q4_K_M"), "hf.co/Org/Repo:Q4_K_M"),
        ("HF.co/o/r:latest", HubRef("o", "r"), "hf.co/o/r:latest"),
        ("hf.co/o/r:sub/x-q4.gguf", HubRef("o", "r", "sub/x-q4.gguf"), "hf.co/o/r:sub/x-q4.gguf"),
        (f"hf.co/o/r:Q8_0{AT}", HubRef("o", "r", "Q8_0", DIGEST), "hf.co/o/r:Q8_0"),
        ("https://huggingface.co/o/r", HubRef("o", "r"), "hf.co/o/r:latest"),
        ("https://huggingface.co/o/r/tree/main", HubRef("o", "r"), "hf.co/o/r:latest"),
        ("https://hf.co/o/r/blob/main/a/x.gguf", HubRef("o", "r", "a/x.gguf"), "hf.co/o/r:a/x.gguf"),
        (
            "https://huggingface.co/o/r/resolve/main/x.gguf?download=true",
            HubRef("o", "r", "x.gguf"),
            "hf.co/o/r:x.gguf",
        ),
        ("/models/X.gguf", FileRef(Path("/models/X.gguf")), "x:latest"),
        ("./X.gguf", FileRef(Path("X.gguf")), "x:latest"),
        ("file:/m/a b.gguf", FileRef(Path("/m/a b.gguf")), "a-b:latest"),
        ("file:///m/a.gguf", FileRef(Path("/m/a.gguf")), "a:latest"),
        (f"/m/a.gguf{AT}", FileRef(Path("/m/a.gguf"), DIGEST), "a:latest"),
        ("/m/größe.gguf", FileRef(Path("/m/größe.gguf")), "groe:latest"),
    ],
)
def test_forms(text: str, expected: object, name: str) -> None:
    ref = parse_ref(text)
    assert ref == expected
    assert ref.name == name


@pytest.mark.parametrize(
    ("text", "name", "url"),
    [
        ("https://Host.Example/a/x.gguf", "https://host.example/a/x.gguf", "https://host.example/a/x.gguf"),
        ("https://h:443/x.gguf", "https://h/x.gguf", "https://h/x.gguf"),
        ("https://h:8443/x.GGUF", "https://h:8443/x.GGUF", "https://h:8443/x.GGUF"),
        ("https://h/x.gguf?sig=a%2Fb#top", "https://h/x.gguf", "https://h/x.gguf?sig=a%2Fb"),
        ("https://u:pw@h/x.gguf", "https://h/x.gguf", "https://u:pw@h/x.gguf"),
        ("https://h/my%20model.gguf", "https://h/my%20model.gguf", "https://h/my%20model.gguf"),
        ("http://127.0.0.2:8080/x.gguf", "http://127.0.0.2:8080/x.gguf", "http://127.0.0.2:8080/x.gguf"),
        ("http://localhost/x.gguf", "http://localhost/x.gguf", "http://localhost/x.gguf"),
        ("http://[0:0::1]:80/x.gguf", "http://[::1]/x.gguf", "http://[::1]/x.gguf"),
        (f"https://h/x.gguf?q=1{AT}", "https://h/x.gguf", "https://h/x.gguf?q=1"),
    ],
)
def test_urls(text: str, name: str, url: str) -> None:
    ref = parse_ref(text)
    assert isinstance(ref, UrlRef)
    assert (ref.name, ref.url) == (name, url)
    assert ref.digest == (DIGEST if text.endswith(AT) else None)


def test_the_url_of_a_url_ref_is_not_in_its_repr() -> None:
    """A signed URL or credentials must not end up in a log because somebody logged the reference."""
    shown = repr(parse_ref("https://user:secret@host/x.gguf?token=secret"))
    assert "secret" not in shown
    assert "host/x.gguf" in shown


@pytest.mark.parametrize(
    ("text", "position", "why"),
    [
        (" llama3", 1, "` ` is not allowed"),
        ("llama 3", 6, "` ` is not allowed"),
        ("a%2fb", 2, "`%` is not allowed"),
        ("a\tb", 2, "U+0009"),
        ("a\x1b[2Jb", 2, "U+001B"),
        ("a\u202eb", 2, "U+202E"),
        ("a\u200bb", 2, "U+200B"),
        ("a\ud800b", 2, "U+D800"),
        ("n\u00e9", 2, "not a plain ASCII"),
        ("\u212aimi", 1, "not a plain ASCII"),
        ("a\\b", 2, "write `/`"),
        ("registry.ollama.ai/library/llama3:8b", 1, "Ollama's registry"),
        ("https://ollama.com/library/llama3", 1, "Ollama's registry"),
        ("Ollama.com/me/mario", 1, "Ollama's registry"),
        ("a/b/c", 2, "one `/` at most"),
        ("a//b", 2, "one `/` at most"),
        ("/", 1, "a directory"),
        ("../x", 1, "not allowed in a namespace"),
        ("a..b", 2, "`..`"),
        (".a", 1, "starts with"),
        ("-a", 1, "starts with"),
        ("a:", 3, "the tag is empty"),
        ("a:b:c", 4, "`:` is not allowed"),
        (":x", 1, "the model name is empty"),
        ("a:../b", 5, "`/` is not allowed"),
        ("example.com/llama3", 8, "`.` is not allowed in a namespace"),
        ("a" * 81, 81, "longer than 80"),
        ("a:" + "b" * 81, 83, "longer than 80"),
        ("a" * 301, 301, "beyond 300"),
        ("deadbeef", 1, "name bytes"),
        ("12345678:tag", 1, "name bytes"),
        (str(DIGEST), 1, "name bytes"),
        (AT, 1, "name bytes"),
        ("a@sha256:abc", 3, "64 lower-case hex"),
        ("a@SHA256:" + DIGEST.hex, 3, "64 lower-case hex"),
        ("a@main", 3, "only a digest"),
        ("hf.co/org", 10, "repository is missing"),
        ("hf.co//repo", 7, "organisation is empty"),
        ("hf.co/o/r/x.gguf", 10, "follows `:`"),
        ("hf.co/o/r:", 11, "is empty"),
        ("hf.co/o/r:../x.gguf", 11, "starts with"),
        ("hf.co/o/r:a/../x.gguf", 13, "starts with"),
        ("hf.co/o/r:a%2e.gguf", 12, "`%` is not allowed"),
        ("hf.co/o/r@main", 11, "only a digest"),
        ("hf.co/a--b/r", 8, "`--`"),
        ("hf.co/o/r.", 10, "end in `.`"),
        ("hf.co/../r", 7, "starts with"),
        ("ftp://h/x.gguf", 1, "`ftp://` is not supported"),
        ("hf://o/r", 1, "`hf://` is not supported"),
        ("http://example.com/x.gguf", 1, "this machine only"),
        ("http://127.0.0.1.example.com/x.gguf", 1, "this machine only"),
        ("http://localhost@evil.example/x.gguf", 1, "this machine only"),
        ("https://h/x.bin", 16, "end in `.gguf`"),
        ("https://h/", 11, "is empty"),
        ("https://h//x.gguf", 11, "is empty"),
        ("https:///x.gguf", 9, "not a host name"),
        ("https://-h/x.gguf", 9, "not a host name"),
        ("https://h:0/x.gguf", 9, "not a host and port"),
        ("https://h:65536/x.gguf", 9, "not a host and port"),
        ("https://[::g]/x.gguf", 9, "not a host and port"),
        ("https://[1::2::3]/x.gguf", 9, "not an IPv6"),
        ("https://h/../x.gguf", 11, "not a plain name"),
        ("https://h/%2e%2e/x.gguf", 11, "not a plain name"),
        ("https://h/%252e%252e/x.gguf", 11, "not a plain name"),
        ("https://h/a%2Fx.gguf", 11, "not a plain name"),
        ("https://h/a%00.gguf", 11, "not a plain name"),
        ("https://h/a%zz.gguf", 12, "two hex digits"),
        ("https://h/a b.gguf", 12, "percent-encoded"),
        ("https://h/x.gguf?a b", 19, "percent-encoded"),
        ("https://h/x.gguf?" + "a" * 2100, 2065, "longer than 2048"),
        ("https://h/" + "a/" * 150 + "x.gguf", 301, "beyond 300"),
        ("file:x.gguf", 6, "absolute path"),
        ("file://host/x.gguf", 8, "absolute path"),
        ("/a/../x.gguf", 4, "`..`"),
        ("/a/", 3, "a directory"),
        ("./.", 3, "a directory"),
        ("/" + "a" * 256, 2, "255 bytes"),
        ("/" + "a/" * 2100, 4097, "beyond 4096"),
    ],
)
def test_refusals_say_where_and_why(text: str, position: int, why: str) -> None:
    with pytest.raises(InvalidRef) as caught:
        parse_ref(text)
    assert f"at position {position}, " in caught.value.message
    assert why in caught.value.message
    assert caught.value.hint
    assert caught.value.message.isprintable()


def test_the_empty_text_is_refused() -> None:
    with pytest.raises(InvalidRef, match="empty"):
        parse_ref("")


def test_a_refused_browser_address_is_explained_as_the_reference_it_means() -> None:
    with pytest.raises(InvalidRef, match=r"`hf\.co/o/r:\.\./x\.gguf` is not a model reference: at position 11"):
        parse_ref("https://huggingface.co/o/r/resolve/main/../x.gguf")


@pytest.mark.parametrize(
    ("filename", "name"),
    [
        ("Llama 3.Q4_K_M.gguf", "llama-3.q4_k_m"),
        ("m-00001-of-00003.gguf", "m"),
        ("M.GGUF", "m"),
        ("sha256-abc", "sha256-abc"),
        ("deadbeef.gguf", "model-deadbeef"),
        ("sha256.gguf", "model-sha256"),
        ("..gguf", "model"),
        (".gguf", "model"),
        ("模型.gguf", "model"),
        ("a" * 200, "a" * 80),
        ("a....b.gguf", "a.b"),
    ],
)
def test_names_made_of_file_names(filename: str, name: str) -> None:
    assert name_from_filename(filename) == name


@given(st.text(max_size=120))
def test_any_file_name_makes_a_valid_name(filename: str) -> None:
    name = name_from_filename(filename)
    assert parse_ref(name).name == f"{name}:latest"


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("localhost", True),
        ("127.8.9.1", True),
        ("[::1]", True),
        ("128.0.0.1", False),
        ("[::2]", False),
        ("localhost.example", False),
        ("0.0.0.0", False),
    ],
)
def test_loopback_by_spelling(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


REF_TEXTS = st.one_of(
    st.text(max_size=60),
    st.text(alphabet="ab1_.-:/@%\\ ~?#[]", max_size=40),
    st.from_regex(r"([a-z0-9_.-]{1,8}/)?[a-zA-Z0-9_.-]{1,8}(:[a-zA-Z0-9_.-]{1,8})?", fullmatch=True),
    st.from_regex(
        r"(hf|huggingface)\.co/[A-Za-z0-9._-]{1,8}/[A-Za-z0-9._-]{1,8}(:[A-Za-z0-9._/-]{1,12})?", fullmatch=True
    ),
    st.from_regex(
        r"https?://[a-z0-9.:@\[\]-]{1,12}(/[A-Za-z0-9._%-]{0,6}){1,3}\.gguf(\?[a-z=&]{0,8})?", fullmatch=True
    ),
    st.from_regex(r"(file:|\.)?/[\w ./-]{1,20}", fullmatch=True),
)


@given(REF_TEXTS)
@example("https://huggingface.co/o/r:Q4/resolve/main/x.gguf")
@example("file:/deadbeef.gguf")
def test_parsing_the_canonical_name_changes_nothing(text: str) -> None:
    try:
        ref = parse_ref(text)
    except InvalidRef:
        return
    again = parse_ref(ref.name)
    assert again.name == ref.name
    if isinstance(ref, NameRef | HubRef):
        assert again == ref
    assert ref.name.isascii()
    assert ref.name.isprintable()
    assert ".." not in ref.name.split("/")
    assert len(ref.name) <= 320


@given(REF_TEXTS)
def test_messages_can_be_shown_on_a_terminal(text: str) -> None:
    try:
        parse_ref(text)
    except InvalidRef as error:
        message = error.message + error.hint
    else:
        message = ""
    assert message == "" or message.isprintable()


@given(REF_TEXTS)
def test_a_digest_may_follow_everything(text: str) -> None:
    try:
        ref = parse_ref(text)
    except InvalidRef:
        return
    if "#" in text or ref.digest is not None:
        return
    pinned = parse_ref(f"{text}{AT}")
    assert (pinned.name, pinned.digest) == (ref.name, DIGEST)
