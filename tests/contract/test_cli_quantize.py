"""`lm quantize`: what it asks for, and how it shows what comes back."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from lmd.v1.endpoint import home_socket
from tests.support.cli import lm
from tests.support.fake_daemon import FakeDaemon, FakeFailure

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def daemon(lmd_home: Path) -> Iterator[FakeDaemon]:
    with FakeDaemon(home_socket(lmd_home)) as fake:
        fake.add("qwen:f16")
        yield fake


def test_a_model_is_quantized(daemon: FakeDaemon, capsys: Capture) -> None:
    result = lm(capsys, "quantize", "qwen:f16", "Q4_K_M")
    assert (result.code, result.out) == (0, "")
    assert result.err == "quantizing F16 to Q4_K_M\nx.gguf: done, 1 MiB\ncreated qwen:q4_k_m\n"
    [request] = daemon.requests("QuantizeModel")
    assert (request.name, request.quantize, request.new_name) == ("qwen:f16", "Q4_K_M", "")
    assert (request.requantize, request.compare, request.text, request.imatrix) == (False, False, "", "")


def test_all_that_can_be_said(daemon: FakeDaemon, capsys: Capture, tmp_path: Path) -> None:
    (tmp_path / "i.gguf").write_bytes(b"GGUF1")
    (tmp_path / "t.txt").write_text("Grüße")
    files = ["--imatrix", str(tmp_path / "i.gguf"), "--text", str(tmp_path / "t.txt")]
    assert lm(capsys, "quantize", "qwen:f16", "iq2_m", "--name", "small", "--requantize", *files).code == 0
    [request] = daemon.requests("QuantizeModel")
    assert (request.new_name, request.requantize, request.compare, request.text) == ("small", True, True, "Grüße")
    assert request.imatrix.startswith("sha256:")
    assert daemon.requests("ImportFile")[0].path == str(tmp_path / "i.gguf")


def test_a_comparison_is_a_table(daemon: FakeDaemon, capsys: Capture) -> None:
    result = lm(capsys, "quantize", "qwen:f16", "Q4_K_M", "--compare")
    assert [line.split() for line in result.out.splitlines()] == [
        ["MODEL", "QUANT", "SIZE", "PERPLEXITY", "PROMPT", "TOK/S", "ANSWER", "TOK/S"],
        ["qwen:f16", "F16", "4", "MiB", "10", "200.0", "20.0"],
        ["qwen:q4_k_m", "Q4_K_M", "1", "MiB", "10.1", "300.0", "50.0"],
        ["change", "-75.0%", "+1.0%", "+50.0%", "+150.0%"],
    ]


def test_json(daemon: FakeDaemon, capsys: Capture) -> None:
    shape = json.loads(lm(capsys, "quantize", "qwen:f16", "Q4_K_M", "--compare", "--json").out)
    assert shape["name"] == "qwen:q4_k_m"
    assert [side["perplexity"] for side in shape["comparison"]] == [10, 10.1]
    assert json.loads(lm(capsys, "quantize", "qwen:f16", "Q4_K_M", "--json").out)["comparison"] == []


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (b" \n", "is empty"),
        (b"\xff\xfe", "is not UTF-8"),
        (b"x" * (1 << 20) + b"y", "is longer than 1 MiB"),
    ],
)
def test_texts_that_cannot_be_read(
    daemon: FakeDaemon, capsys: Capture, tmp_path: Path, data: bytes, message: str
) -> None:
    (tmp_path / "t.txt").write_bytes(data)
    result = lm(capsys, "quantize", "qwen:f16", "Q4_0", "--text", str(tmp_path / "t.txt"))
    assert result.code == 2
    assert message in result.err
    assert daemon.requests("QuantizeModel") == []


def test_a_text_from_stdin(daemon: FakeDaemon, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("Grüße".encode())))
    assert lm(capsys, "quantize", "qwen:f16", "Q4_0", "--text", "-").code == 0
    assert daemon.requests("QuantizeModel")[0].text == "Grüße"


def test_files_that_are_not_there(daemon: FakeDaemon, capsys: Capture, tmp_path: Path) -> None:
    for option in ("--text", "--imatrix"):
        result = lm(capsys, "quantize", "qwen:f16", "Q4_0", option, str(tmp_path / "nope"))
        assert result.code == 2
        assert str(tmp_path / "nope") in result.err


def test_what_the_daemon_refuses(daemon: FakeDaemon, capsys: Capture) -> None:
    daemon.failures["QuantizeModel"] = FakeFailure(grpc.StatusCode.RESOURCE_EXHAUSTED, "DISK_SPACE", "no room")
    result = lm(capsys, "quantize", "qwen:f16", "Q4_0")
    assert result.code != 0
    assert "no room" in result.err


def test_create_passes_the_type_on(
    daemon: FakeDaemon, capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "Modelfile").write_text("FROM llama3\n")
    assert lm(capsys, "create", "small", "-q", "Q4_K_M", "--requantize").code == 0
    assert lm(capsys, "create", "plain").code == 0
    small, plain = daemon.requests("CreateModel")
    assert (small.quantize, small.requantize) == ("Q4_K_M", True)
    assert (plain.quantize, plain.requantize) == ("", False)
