from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from lmd.daemon.config import RuntimeConfig
from lmd.daemon.lifecycle import MAX_FDS, STOP_GRACE_S
from lmd.v1.endpoint import SYSTEM_SOCKET, user_socket

SYSTEMD = Path(__file__).parents[2] / "systemd"
SERVICES = [SYSTEMD / "lmd.service", SYSTEMD / "user" / "lmd.service"]


def directives(unit: Path) -> dict[str, str]:
    """Return the directives of a unit; none of ours is set twice."""
    lines = [line for line in unit.read_text().splitlines() if "=" in line and not line.startswith("#")]
    found = {name: value for name, _, value in (line.partition("=") for line in lines)}
    assert len(found) == len(lines)
    return found


def seconds(text: str) -> int:
    minutes = re.fullmatch(r"(\d+)min", text)
    return int(minutes[1]) * 60 if minutes else int(text)


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
@pytest.mark.parametrize("scope", ["system", "user"])
def test_systemd_understands_every_line(tmp_path: Path, scope: str) -> None:
    source = SYSTEMD if scope == "system" else SYSTEMD / "user"
    units = []
    for name in ("lmd.socket", "lmd.service"):
        # What is verified is the unit, not where this machine has the daemon.
        text = re.sub(r"^ExecStart=\S+", "ExecStart=/bin/true", (source / name).read_text(), flags=re.MULTILINE)
        units.append(tmp_path / name)
        units[-1].write_text(text)
    env = os.environ | {"XDG_RUNTIME_DIR": str(tmp_path), "SYSTEMD_LOG_LEVEL": "warning"}
    run = subprocess.run(
        ["systemd-analyze", f"--{scope}", "--man=no", "verify", *map(str, units)],
        capture_output=True,
        text=True,
        env=env,
    )
    complaints = [line for line in (run.stdout + run.stderr).splitlines() if "lmd." in line]
    assert complaints == []
    assert run.returncode == 0, run.stderr


@pytest.mark.skipif(shutil.which("systemd-sysusers") is None, reason="systemd is not installed")
def test_the_user_can_be_made(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    subprocess.run(
        ["systemd-sysusers", f"--root={tmp_path}", str(SYSTEMD / "sysusers.d" / "lmd.conf")],
        check=True,
        capture_output=True,
    )
    assert re.search(r"^lmd:", (tmp_path / "etc" / "passwd").read_text(), re.MULTILINE)
    assert re.search(r"^lmd:", (tmp_path / "etc" / "group").read_text(), re.MULTILINE)


def test_the_sockets_are_where_clients_look() -> None:
    assert directives(SYSTEMD / "lmd.socket")["ListenStream"] == str(SYSTEM_SOCKET)
    user = directives(SYSTEMD / "user" / "lmd.socket")["ListenStream"].replace("%t", "/run/user/1000")
    assert user == str(user_socket({"XDG_RUNTIME_DIR": "/run/user/1000"}, 1000))


def test_only_the_group_reaches_the_systems_socket_and_only_the_user_their_own() -> None:
    system, user = directives(SYSTEMD / "lmd.socket"), directives(SYSTEMD / "user" / "lmd.socket")
    assert (system["SocketMode"], system["SocketGroup"]) == ("0660", "lmd")
    assert (user["SocketMode"], user["DirectoryMode"]) == ("0600", "0700")


@pytest.mark.parametrize("service", SERVICES, ids=["system", "user"])
def test_systemd_waits_longer_than_the_daemon_drains(service: Path) -> None:
    drain_s = RuntimeConfig().drain_timeout.total_seconds()
    assert seconds(directives(service)["TimeoutStopSec"]) > drain_s + 4 * STOP_GRACE_S
    assert directives(service)["KillMode"] == "mixed"
    assert directives(service)["Type"] == "notify"


def test_stopping_the_daemon_keeps_the_socket_that_systemd_listens_on() -> None:
    """Without this the runtime directory goes with the service, and later clients find no socket."""
    assert directives(SYSTEMD / "lmd.service")["RuntimeDirectoryPreserve"] == "yes"


def test_callers_can_be_told_apart() -> None:
    """In a user namespace SO_PEERCRED shows every client as uid 65534."""
    for service in SERVICES:
        assert "PrivateUsers" not in directives(service)
        assert "DynamicUser" not in directives(service)


def test_the_descriptor_limit_is_the_one_the_daemon_uses() -> None:
    assert directives(SYSTEMD / "lmd.service")["LimitNOFILE"] == str(MAX_FDS)


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_the_service_is_confined() -> None:
    run = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--threshold=45", str(SYSTEMD / "lmd.service")],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-300:] + run.stderr
