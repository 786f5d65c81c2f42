"""The layout of errors, their exit statuses, and how they travel."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from lmd.cli.errors import BadUsage, ClientError, Unreachable, render_error
from lmd.cli.terminal import Palette, wrapped
from lmd.v1 import error_reason_pb2
from lmd.v1.endpoint import home_socket
from lmd.v1.version import API_VERSION
from tests.support.cli import lm, terminal
from tests.support.fake_daemon import FakeDaemon, FakeFailure

Capture = pytest.CaptureFixture[str]
_PLAIN = Palette(enabled=False)


@pytest.fixture
def daemon(lmd_home: Path) -> Iterator[FakeDaemon]:
    with FakeDaemon(home_socket(lmd_home)) as fake:
        yield fake


def test_message_context_and_hint_stand_apart() -> None:
    error = ClientError("it broke", reason="INTERNAL", hint="mend it", context=["line one", "", "line two"])
    assert render_error(error, _PLAIN) == ("error: it broke\n\n  line one\n\n  line two\n\nhint: mend it")


def test_an_error_alone_is_one_line() -> None:
    assert render_error(ClientError("it broke", reason="INTERNAL"), _PLAIN) == "error: it broke"


def test_the_last_lines_of_a_runners_log_are_shown() -> None:
    error = ClientError("it died", reason="RUNNER_CRASHED", metadata={"log": "one\ntwo", "cause": "SIGSEGV"})
    assert render_error(error, _PLAIN).endswith("\n\n  the last lines of its log:\n    one\n    two")
    assert "cause: SIGSEGV" in render_error(error, _PLAIN, verbose=True)


def test_colours_add_nothing_that_is_not_there_without() -> None:
    error = BadUsage("wrong", hint="right")
    coloured = render_error(error, Palette(enabled=True))
    assert "\x1b[1;31m" in coloured
    from lmd.cli.terminal import without_colour

    assert without_colour(coloured) == render_error(error, _PLAIN)


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("short enough", ["short enough"]),
        ("a message that goes on for more", ["a message that goes", "on for more"]),
        ("then use `lm run -o a=1`, or so", ["then use", "`lm run -o a=1`, or", "so"]),
        ("hf.co/somebody/with-a-long-name is long", ["hf.co/somebody/with-a-long-name", "is long"]),
        ("two\nlines, of which the second is long", ["two", "lines, of which the", "second is long"]),
        ("a tick ` that is alone, and more", ["a tick ` that is", "alone, and more"]),
        ("\x1b[1;31merror:\x1b[0m twelve more", ["\x1b[1;31merror:\x1b[0m twelve more"]),
        ("`lm pin` `lm pin` `lm pin`", ["`lm pin` `lm pin`", "`lm pin`"]),
    ],
)
def test_long_lines_break_at_blanks_and_not_in_backticks(text: str, lines: list[str]) -> None:
    assert wrapped(text, 20).split("\n") == lines
    assert wrapped(text, None) == text


def test_message_and_hint_fit_into_the_columns() -> None:
    error = BadUsage("what was asked for is much too long for this", hint="ask for less, or see `lm ps` for what is")
    shown = render_error(error, _PLAIN, columns=30)
    assert shown.split("\n") == [
        "error: what was asked for is",
        "much too long for this",
        "",
        "hint: ask for less, or see",
        "`lm ps` for what is",
    ]


def test_on_a_terminal_no_word_of_an_error_is_torn(daemon: FakeDaemon) -> None:
    name = "a-name-that-does-not-exist-and-is-long"
    with terminal("show", name, columns=50) as shown:
        shown.wait()
        rows = shown.rest().splitlines()
    assert f"`{name}`" in "\n".join(rows)
    assert max(len(row) for row in rows) <= 50


@pytest.mark.parametrize(
    ("reason", "code"),
    [("INVALID_MODEL_REF", 2), ("INVALID_ARGUMENT", 2), ("MODELFILE_SYNTAX", 2), ("MODEL_NOT_FOUND", 1),
     ("INTERNAL", 1), ("SOURCE_UNAVAILABLE", 1), ("DRAINING", 1)],
)  # fmt: skip
def test_exit_statuses_by_reason(reason: str, code: int) -> None:
    assert f"ERROR_REASON_{reason}" in error_reason_pb2.ErrorReason.keys()
    assert ClientError("x", reason=reason).exit_code == code


def test_no_daemon_is_exit_status_three() -> None:
    assert Unreachable("x").exit_code == 3


def test_everything_the_daemon_says_arrives(daemon: FakeDaemon, capsys: Capture) -> None:
    daemon.failures["GetModel"] = FakeFailure(
        grpc.StatusCode.INVALID_ARGUMENT,
        "INVALID_ARGUMENT",
        "that is out of range",
        violations=(("parameters.top_p", "from 0 to 1"),),
        field="parameters.top_p",
        hint="use 0.9",
    )
    result = lm(capsys, "show", "x", "--json")
    assert result.code == 2
    assert json.loads(result.err)["error"] == {
        "reason": "INVALID_ARGUMENT",
        "message": "that is out of range",
        "hint": "use 0.9",
        "metadata": {"field": "parameters.top_p"},
        "violations": [{"field": "parameters.top_p", "description": "from 0 to 1"}],
    }


def test_the_time_to_wait_becomes_the_hint(daemon: FakeDaemon, capsys: Capture) -> None:
    daemon.failures["GetModel"] = FakeFailure(
        grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL", "too many requests wait", retry_after_s=7, limit="512"
    )
    assert lm(capsys, "show", "x").err == "error: too many requests wait\n\nhint: try again in 7 s\n"


def test_a_status_without_details_keeps_its_words(daemon: FakeDaemon, capsys: Capture) -> None:
    failure = FakeFailure(grpc.StatusCode.INTERNAL, "X", "bare words")
    del failure.status.details[:]
    daemon.failures["GetModel"] = failure
    assert lm(capsys, "show", "x").err == "error: bare words\n"


def test_long_error_details_survive_the_trailers(daemon: FakeDaemon, capsys: Capture) -> None:
    daemon.failures["GetModel"] = FakeFailure(
        grpc.StatusCode.INTERNAL, "RUNNER_CRASHED", "it died", log="x" * 12_000 + "END"
    )
    assert "END" in lm(capsys, "show", "x").err


@pytest.mark.parametrize(("version", "who"), [(API_VERSION + 1, "update `lm`"), (0, "update the daemon")])
def test_another_version_of_the_api_names_the_side_to_update(
    daemon: FakeDaemon, capsys: Capture, version: int, who: str
) -> None:
    daemon.status.api_version = version
    result = lm(capsys, "ls")
    assert result.code == 1
    assert f"speaks version {version} of the API" in result.err
    assert f"hint: {who}" in result.err


def test_a_daemon_without_this_api_at_all(lmd_home: Path, capsys: Capture) -> None:
    from concurrent.futures import ThreadPoolExecutor

    socket = home_socket(lmd_home)
    socket.parent.mkdir(mode=0o700)
    server = grpc.server(ThreadPoolExecutor(1))
    server.add_insecure_port(f"unix:{socket}")
    server.start()
    try:
        result = lm(capsys, "ls")
    finally:
        server.stop(None).wait()
    assert result.code == 1
    assert "another version of the API" in result.err


def test_a_daemon_that_dies_in_a_call_is_unreachable(daemon: FakeDaemon, capsys: Capture) -> None:
    daemon.failures["GetModel"] = FakeFailure(grpc.StatusCode.UNAVAILABLE, "X", "socket closed")
    del daemon.failures["GetModel"].status.details[:]
    result = lm(capsys, "show", "x")
    assert result.code == 3
    assert result.err.startswith("error: the connection to the daemon is lost\n\n  socket closed\n")


@pytest.mark.parametrize(
    ("args", "message", "hint"),
    [
        (["pul"], "no command `pul`", "did you mean `lm pull`?"),
        (["qqq"], "no command `qqq`", "see `lm --help`"),
        (["--nope"], "no such option", "see `lm --help`"),
        (["ls", "--nope"], "no such option", "see `lm ls --help`"),
        (["show"], "missing argument 'MODEL'", "see `lm show --help`"),
        (["gc", "--grace", "soon"], "`soon` is no duration", "see `lm gc --help`"),
        (["pull"], "which model?", "`lm pull --help`"),
        (["pull", "x", "--list", "--cancel"], "exclude each other", None),
    ],
)
def test_mistakes_on_the_command_line(capsys: Capture, args: list[str], message: str, hint: str | None) -> None:
    result = lm(capsys, *args)
    assert (result.code, result.out) == (2, "")
    first, *_ = result.err.splitlines()
    assert first.startswith("error: ")
    assert message in first
    assert not first.endswith(".")
    if hint:
        assert result.err.rstrip().splitlines()[-1].startswith("hint: ")
        assert hint in result.err


def test_mistakes_are_json_too(capsys: Capture) -> None:
    assert json.loads(lm(capsys, "ls", "--json", "--nope").err)["error"]["reason"] == "USAGE"


def test_lm_alone_explains_itself(capsys: Capture) -> None:
    assert lm(capsys).out == lm(capsys, "--help").out
    assert lm(capsys, "--version").out.startswith("lm ")
