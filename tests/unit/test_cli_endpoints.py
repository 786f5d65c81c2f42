"""Finding a daemon and deciding whether to trust it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lmd.cli.endpoints import Answer, Place, find_daemon, not_running, place_from, probe
from lmd.cli.errors import Unreachable
from lmd.v1.endpoint import SYSTEM_SOCKET


@pytest.fixture
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("s")
    path.chmod(0o700)
    return path


@pytest.fixture
def listening(directory: Path) -> Iterator[Path]:
    path = directory / "lmd.sock"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()
        yield path


def test_nobody_there(directory: Path) -> None:
    assert probe(directory / "lmd.sock", trust_directory=False) is Answer.ABSENT
    (directory / "file").touch()
    assert probe(directory / "file" / "lmd.sock", trust_directory=False) is Answer.ABSENT


def test_a_socket_left_behind_is_nobody(directory: Path) -> None:
    path = directory / "lmd.sock"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
    assert probe(path, trust_directory=False) is Answer.ABSENT


def test_our_own_daemon_is_trusted(listening: Path) -> None:
    assert probe(listening, trust_directory=False) is Answer.LISTENS


def test_the_first_that_answers_is_taken(listening: Path, directory: Path) -> None:
    place = Place((directory / "other.sock", listening), listening)
    assert find_daemon(place) == listening
    assert find_daemon(Place((directory / "other.sock",), listening)) is None


@pytest.mark.parametrize("mode", [0o770, 0o707])
def test_a_directory_that_others_write_to_is_not_trusted_by_default(listening: Path, mode: int) -> None:
    listening.parent.chmod(mode)
    with pytest.raises(Unreachable, match="others can write to"):
        probe(listening, trust_directory=False)
    assert probe(listening, trust_directory=True) is Answer.LISTENS


@pytest.mark.skipif(os.getuid() != 0, reason="only root can be somebody else")
def test_a_daemon_of_another_user_is_refused(directory: Path) -> None:
    """Who listens counts, not who made the socket: here root bound it, and `nobody` took it over."""
    path = directory / "lmd.sock"
    script = (
        "import os, socket, sys; os.setuid(65534); listener = socket.socket(fileno=int(sys.argv[1]));"
        "listener.listen(); print('ready', flush=True); sys.stdin.read()"
    )
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        child = subprocess.Popen(
            [sys.executable, "-c", script, str(server.fileno())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=[server.fileno()],
        )
        with child:
            assert child.stdout is not None
            assert child.stdout.readline() == b"ready\n"
            for trust_directory in (False, True):
                with pytest.raises(Unreachable, match="neither you nor root"):
                    probe(path, trust_directory=trust_directory)
            directory.chmod(0o755)
            os.chown(directory, 65534, -1)
            assert probe(path, trust_directory=True) is Answer.LISTENS


def test_a_path_that_no_socket_can_have(directory: Path) -> None:
    with pytest.raises(Unreachable, match="bytes long, the system allows 107"):
        probe(directory / ("x" * 120), trust_directory=True)


def test_places_by_environment(tmp_path: Path) -> None:
    home = place_from({"LMD_HOME": str(tmp_path)}, None)
    assert home.candidates == (tmp_path / "run" / "lmd.sock",)
    assert (home.named, home.implicit) == (False, None)

    plain = place_from({"XDG_RUNTIME_DIR": "/run/user/7"}, None)
    assert plain.candidates == (SYSTEM_SOCKET, Path("/run/user/7/lmd/lmd.sock"))
    assert plain.implicit == plain.own == plain.candidates[1]

    given = place_from({"LMD_HOME": str(tmp_path)}, Path("/x/y.sock"))
    assert given == Place((Path("/x/y.sock"),), Path("/x/y.sock"), named=True)

    by_variable = place_from({"LMD_SOCKET": "/x/y.sock"}, None)
    assert by_variable.own == Path("/x/y.sock")
    assert not by_variable.named


def test_the_hint_fits_the_place(tmp_path: Path) -> None:
    assert "systemctl status lmd" in not_running(place_from({}, None)).hint
    assert "systemctl" not in not_running(place_from({"LMD_HOME": str(tmp_path)}, None)).hint
    assert "check the path" in not_running(place_from({}, tmp_path / "s")).hint
