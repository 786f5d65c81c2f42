"""`lm create`: Modelfiles, the files they refer to, and what is wrong with them."""

from __future__ import annotations

import codecs
import hashlib
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from lmd.cli.errors import ClientError
from lmd.cli.model_files import referred_files
from lmd.cli.modelfiles import with_places
from lmd.v1.endpoint import home_socket
from tests.support.cli import lm, lm_process
from tests.support.fake_daemon import FakeDaemon, FakeFailure

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def daemon(lmd_home: Path) -> Iterator[FakeDaemon]:
    with FakeDaemon(home_socket(lmd_home)) as fake:
        yield fake


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _digest(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def test_a_modelfile_for_a_model(daemon: FakeDaemon, capsys: Capture, folder: Path) -> None:
    (folder / "Modelfile").write_text("FROM llama3\nSYSTEM Be brief.\n")
    result = lm(capsys, "create", "poet")
    assert (result.code, result.out, result.err) == (0, "", "reading the header\ncreated poet:latest\n")
    [request] = daemon.requests("CreateModel")
    assert (request.name, request.modelfile, dict(request.files)) == ("poet", "FROM llama3\nSYSTEM Be brief.\n", {})


def test_a_file_beside_the_modelfile_is_imported_by_the_daemon(
    daemon: FakeDaemon, capsys: Capture, folder: Path
) -> None:
    (folder / "sub").mkdir()
    (folder / "sub" / "m.gguf").write_bytes(b"GGUF1")
    (folder / "sub" / "My.Modelfile").write_text("from ./m.gguf\n")
    assert lm(capsys, "create", "mine", "-f", "sub/My.Modelfile").code == 0
    assert daemon.requests("ImportFile")[0].path == str(folder / "sub" / "m.gguf")
    assert dict(daemon.requests("CreateModel")[0].files) == {"./m.gguf": _digest(b"GGUF1")}
    assert not daemon.uploads


def test_a_draft_is_imported_like_the_model_itself(daemon: FakeDaemon, capsys: Capture, folder: Path) -> None:
    (folder / "m.gguf").write_bytes(b"GGUF1")
    (folder / "d.gguf").write_bytes(b"GGUF2")
    (folder / "Modelfile").write_text("FROM ./m.gguf\nDRAFT ./d.gguf\n")
    assert lm(capsys, "create", "mine").code == 0
    files = dict(daemon.requests("CreateModel")[0].files)
    assert files == {"./m.gguf": _digest(b"GGUF1"), "./d.gguf": _digest(b"GGUF2")}
    (folder / "d.gguf").unlink()
    assert "d.gguf: there is no such file" in lm(capsys, "create", "mine").err


@pytest.mark.parametrize("how", ["another uid", "upload required"])
def test_a_daemon_of_another_user_gets_the_bytes(daemon: FakeDaemon, capsys: Capture, folder: Path, how: str) -> None:
    data = os.urandom(3 * 1024 * 1024 + 17)
    (folder / "m.gguf").write_bytes(data)
    (folder / "Modelfile").write_text("FROM m.gguf\n")
    if how == "another uid":
        daemon.status.uid = os.getuid() + 1
    else:
        daemon.failures["ImportFile"] = FakeFailure(grpc.StatusCode.FAILED_PRECONDITION, "UPLOAD_REQUIRED", "upload it")
    result = lm(capsys, "create", "mine")
    assert result.code == 0
    assert daemon.uploads == [data]
    assert dict(daemon.requests("CreateModel")[0].files) == {"m.gguf": _digest(data)}
    assert "m.gguf: done, 3 MiB" in result.err


def test_a_failing_upload_says_why(daemon: FakeDaemon, capsys: Capture, folder: Path) -> None:
    (folder / "m.gguf").write_bytes(b"x" * 100)
    (folder / "Modelfile").write_text("FROM m.gguf\n")
    daemon.status.uid = os.getuid() + 1
    daemon.failures["UploadBlob"] = FakeFailure(
        grpc.StatusCode.RESOURCE_EXHAUSTED, "DISK_SPACE", "not enough disk space", needed_bytes="100", free_bytes="3"
    )
    assert lm(capsys, "create", "mine").err.endswith("error: not enough disk space\n")


def test_a_file_that_changes_while_it_is_uploaded_is_refused(
    daemon: FakeDaemon, capsys: Capture, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of the same size but other bytes once became a model that was half old and half new.

    Only the daemon's own import looked whether the file changed; the upload looked whether it became shorter.
    """
    model = folder / "m.gguf"
    model.write_bytes(b"old" * 1024 * 1024)
    (folder / "Modelfile").write_text("FROM m.gguf\n")
    daemon.status.uid = os.getuid() + 1
    pread = os.pread

    def pread_and_change(descriptor: int, length: int, offset: int) -> bytes:
        data = pread(descriptor, length, offset)
        with model.open("r+b") as file:
            file.write(b"new" * 1024 * 1024)
        os.utime(model, ns=(0, offset))
        return data

    monkeypatch.setattr(os, "pread", pread_and_change)
    result = lm(capsys, "create", "mine", "--json")
    assert json.loads(result.err.splitlines()[-1])["error"]["reason"] == "FILE_CHANGED"
    assert daemon.uploads == []


@pytest.mark.parametrize("source", ["-", "big.Modelfile"])
def test_what_cannot_be_a_modelfile_is_not_read_to_its_end(folder: Path, source: str) -> None:
    """`lm create -f - < model.gguf` once read all of the model into memory."""
    (folder / "big.Modelfile").write_bytes(bytes(17 << 20))
    result = lm_process("create", "mine", "-f", source, stdin="x" * (17 << 20))
    assert result.code == 2
    assert "too large for a Modelfile" in result.err


def test_a_modelfile_on_stdin(daemon: FakeDaemon, folder: Path) -> None:
    result = lm_process("create", "mine", "-f", "-", stdin="FROM llama3\n")
    assert (result.code, daemon.requests("CreateModel")[0].modelfile) == (0, "FROM llama3\n")


@pytest.mark.parametrize(("bom", "encoding"), [(codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le")])
def test_byte_order_marks(daemon: FakeDaemon, capsys: Capture, folder: Path, bom: bytes, encoding: str) -> None:
    (folder / "Modelfile").write_bytes(bom + "FROM llama3\nSYSTEM ä\n".encode(encoding))
    assert lm(capsys, "create", "mine").code == 0
    assert daemon.requests("CreateModel")[0].modelfile == "FROM llama3\nSYSTEM ä\n"


def test_mistakes_are_shown_with_line_and_caret(daemon: FakeDaemon, capsys: Capture, folder: Path) -> None:
    (folder / "Modelfile").write_text("FROM llama3\nPARAMETER temprature 1\n\tFOO bar\n")
    daemon.failures["CheckModelfile"] = FakeFailure(
        grpc.StatusCode.INVALID_ARGUMENT,
        "MODELFILE_SYNTAX",
        "Modelfile line 2: unknown parameter `temprature` (and 1 more)",
        violations=(("2:11", "unknown parameter `temprature`"), ("3:2", "unknown directive `FOO`")),
        line="2",
        column="11",
    )
    result = lm(capsys, "create", "mine")
    assert result.code == 2
    assert result.err == (
        "error: Modelfile line 2: unknown parameter `temprature` (and 1 more)\n"
        "\n"
        "  Modelfile:2:11\n"
        "    PARAMETER temprature 1\n"
        "              ^ unknown parameter `temprature`\n"
        "\n"
        "  Modelfile:3:2\n"
        "        FOO bar\n"
        "        ^ unknown directive `FOO`\n"
    )


def test_the_caret_stands_right_in_a_long_line() -> None:
    line = "SYSTEM " + "x" * 300 + " HERE"
    error = ClientError("bad", reason="MODELFILE_SYNTAX", violations=[])
    assert with_places(error, line, "M") is error
    from lmd.cli.errors import Violation

    placed = with_places(
        ClientError("bad", reason="MODELFILE_SYNTAX", violations=[Violation("1:309", "this")]), line, "M"
    )
    _, text, caret = placed.context
    assert text[caret.index("^") :].startswith("HERE")


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda path: None, "there is no such file"),
        (lambda path: path.mkdir(), "there is no GGUF file in it"),
        (lambda path: os.mkfifo(path), "it is not a regular file"),
        (lambda path: socket.socket(socket.AF_UNIX).bind(str(path)), "it is not a regular file"),
    ],
    ids=["missing", "directory", "fifo", "socket"],
)
@pytest.mark.filterwarnings("ignore:unclosed <socket")
def test_what_cannot_be_imported_is_refused_at_once(
    daemon: FakeDaemon, capsys: Capture, folder: Path, make: object, why: str
) -> None:
    make(folder / "m.gguf")  # type: ignore[operator]
    (folder / "Modelfile").write_text("FROM ./m.gguf\n")
    result = lm(capsys, "create", "mine")
    assert result.code == 1
    assert f"m.gguf: {why}" in result.err
    assert not daemon.requests("CreateModel")


def test_a_name_is_a_file_only_if_there_is_one(tmp_path: Path) -> None:
    (tmp_path / "llama3").mkdir()
    (tmp_path / "weights").write_bytes(b"x")
    (tmp_path / "link.gguf").symlink_to(tmp_path / "weights")
    files = referred_files(["llama3", "weights", "hf.co/a/b", "link.gguf", "sha256:" + "a" * 64], tmp_path)
    assert files == {"weights": tmp_path / "weights", "link.gguf": tmp_path / "weights"}


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "cannot read Modelfile: no such file"), (b"FROM \xff\n", "not a text in UTF-8: byte 5 is 0xff")],
)
def test_a_modelfile_that_cannot_be_read(capsys: Capture, folder: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (folder / "Modelfile").write_bytes(content)
    result = lm(capsys, "create", "mine")
    assert result.code == 2
    assert message in result.err


def test_of_several_files_the_one_that_is_no_gguf_is_named(daemon: FakeDaemon, capsys: Capture, folder: Path) -> None:
    """ "not a valid GGUF file" named none, so that one had to guess."""
    (folder / "m.gguf").write_bytes(b"GGUF1")
    (folder / "draft.gguf").write_bytes(b"root:")
    (folder / "Modelfile").write_text("FROM ./m.gguf\nDRAFT ./draft.gguf\n")
    daemon.failures["ImportFile"] = FakeFailure(
        grpc.StatusCode.INVALID_ARGUMENT, "GGUF_INVALID", "not a valid GGUF file: it starts with 'root'"
    )
    result = lm(capsys, "create", "mine")
    assert result.code == 1
    assert f"error: {folder / 'm.gguf'}: not a valid GGUF file: it starts with 'root'" in result.err
