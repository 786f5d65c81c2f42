"""Where a pull may go."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmd.registry.addresses import AddressRefused, Zone, origin_of, split_url, without_secrets, zone_of
from lmd.registry.http import not_proxied


@pytest.mark.parametrize(
    ("address", "zone"),
    [
        ("127.0.0.1", Zone.LOOPBACK),
        ("127.8.9.1", Zone.LOOPBACK),
        ("::1", Zone.LOOPBACK),
        ("::ffff:127.0.0.1", Zone.LOOPBACK),
        ("10.0.0.1", Zone.PRIVATE),
        ("192.168.1.1", Zone.PRIVATE),
        ("172.16.0.1", Zone.PRIVATE),
        ("100.64.0.1", Zone.PRIVATE),
        ("fd12::1", Zone.PRIVATE),
        ("::ffff:10.0.0.1", Zone.PRIVATE),
        ("64:ff9b::10.0.0.1", Zone.PRIVATE),
        ("2002:0a00:0001::1", Zone.PRIVATE),
        ("8.8.8.8", Zone.PUBLIC),
        ("2606:4700::1", Zone.PUBLIC),
    ],
)
def test_zones(address: str, zone: Zone) -> None:
    assert zone_of(address) is zone


@pytest.mark.parametrize(
    "address",
    [
        "169.254.169.254",
        "169.254.0.1",
        "fe80::1",
        "fe80::1%eth0",
        "::ffff:169.254.169.254",
        "64:ff9b::a9fe:a9fe",
        "2002:a9fe:a9fe::1",
        "fd00:ec2::254",
        "100.100.100.200",
        "192.0.0.192",
        "0.0.0.0",
        "::",
        "224.0.0.1",
        "ff02::1",
    ],
)
def test_addresses_nobody_may_reach(address: str) -> None:
    with pytest.raises(AddressRefused):
        zone_of(address)


def test_zones_are_ordered_from_inside_out() -> None:
    assert Zone.LOOPBACK < Zone.PRIVATE < Zone.PUBLIC


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd",
        "ftp://h/x",
        "//h/x",
        "/x",
        "",
        "http://",
        "http:///x",
        "http://h:0/",
        "http://h:70000/",
        "http://u@h/",
        "http://u:p@h/",
        "http://h/a b",
        "http://h/\x00",
        "http://h/\r\nX: y",
        "http://h\\@other/",
        "http://h/ü",
        "http://[::1/",
        "HTTPS\t://h/",
    ],
)
def test_urls_that_are_refused(url: str) -> None:
    with pytest.raises(AddressRefused):
        split_url(url)


def test_origins_have_ports_and_lower_case() -> None:
    assert origin_of("https://Example.org/x") == ("https", "example.org", 443)
    assert origin_of("http://example.org") == ("http", "example.org", 80)
    assert origin_of("http://[::1]:8080/") == ("http", "::1", 8080)
    assert origin_of("https://example.org:443") == origin_of("https://example.org/a?b#c")


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://u:p@h:1/a/b?sig=s#f", "https://h:1/a/b"),
        ("http://[::1]:8/a", "http://[::1]:8/a"),
        ("data:text/plain,secret", "data:…"),
        ("http://[::1", "(a malformed URL)"),
    ],
)
def test_what_may_be_shown_of_a_url(url: str, shown: str) -> None:
    assert without_secrets(url) == shown


@given(st.text(max_size=200))
def test_any_text_can_be_shown(text: str) -> None:
    shown = without_secrets(text)
    assert len(shown) <= 300
    assert "?" not in shown or all(0x20 < ord(char) < 0x7F or char == "…" for char in shown)


@given(st.text(max_size=60))
def test_any_text_is_a_url_or_refused(text: str) -> None:
    try:
        parts = split_url("http://" + text)
    except AddressRefused:
        return
    assert parts.hostname
    assert parts.username is None


@pytest.mark.parametrize(
    ("host", "exceptions", "expected"),
    [
        ("a.example.org", "example.org", True),
        ("example.org", ".example.org", True),
        ("badexample.org", "example.org", False),
        ("a", "b, a ,c", True),
        ("a", "*", True),
        ("a", "", False),
        ("a", ",,", False),
    ],
)
def test_no_proxy(host: str, exceptions: str, expected: bool) -> None:
    assert not_proxied(host, exceptions) is expected
