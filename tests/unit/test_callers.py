from __future__ import annotations

import os
import pwd

import pytest

from lmd.daemon.callers import Caller, caller_of, client_address
from lmd.daemon.errors import PermissionDenied


class Context:
    def __init__(self, peer: str) -> None:
        self._peer = peer

    def peer(self) -> str:
        return self._peer


def through_the_front(uid: int, pid: int) -> Context:
    return Context("unix-abstract:" + client_address(uid, pid).decode().removeprefix("\0"))


def test_what_the_front_writes_is_read_back() -> None:
    uid = os.getuid()
    assert caller_of(through_the_front(uid, 42)) == Caller(uid=uid, pid=42, user=pwd.getpwuid(uid).pw_name)


def test_a_user_without_a_name_is_its_number() -> None:
    assert caller_of(through_the_front(4_000_000_000, 1)).user == "4000000000"


def test_a_process_of_another_pid_namespace_has_no_pid() -> None:
    assert caller_of(through_the_front(0, 0)).pid is None


@pytest.mark.parametrize(
    "peer",
    [
        "",
        "unix:",
        "unix:/tmp/lmd/0/1/0123456789abcdef",
        "ipv4:127.0.0.1:4000",
        "unix-abstract:lmd/0/1",
        "unix-abstract:lmd/0/1/0123456789abcdef/x",
        "unix-abstract:lmd/-1/1/0123456789abcdef",
        "unix-abstract:other/0/1/0123456789abcdef",
    ],
)
def test_any_other_peer_is_refused(peer: str) -> None:
    with pytest.raises(PermissionDenied):
        caller_of(Context(peer))


def test_two_connections_of_one_process_have_different_names() -> None:
    assert client_address(1, 2) != client_address(1, 2)
