"""`lm edit`, `lm history`, `lm rollback` and `lm diff`, against a daemon that tells stories."""

from __future__ import annotations

import json
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from lmd.v1 import model_service_pb2 as pb
from lmd.v1.endpoint import home_socket
from tests.support.cli import lm, lm_process, terminal
from tests.support.fake_daemon import FakeDaemon, FakeFailure

Capture = pytest.CaptureFixture[str]
State = pb.Version.State


@pytest.fixture
def daemon(lmd_home: Path) -> Iterator[FakeDaemon]:
    with FakeDaemon(home_socket(lmd_home)) as fake:
        fake.add("poet:latest").modelfile = "FROM base\nSYSTEM Arr.\n"
        yield fake


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory for temporary files; what an edit leaves is in it."""
    directory = tmp_path / "tmp"
    directory.mkdir()
    monkeypatch.setenv("TMPDIR", str(directory))
    monkeypatch.setattr("tempfile.tempdir", None)
    return directory


def _editor(monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Make the shell *script* the editor; $1 is the file."""
    monkeypatch.delenv("VISUAL", raising=False)
    monkeypatch.setenv("EDITOR", f"edit() {{ {script}; }}; edit")


def _syntax_error(*places: tuple[str, str]) -> FakeFailure:
    return FakeFailure(grpc.StatusCode.INVALID_ARGUMENT, "MODELFILE_SYNTAX", "Modelfile line 2: bad", violations=places)


def _version(number: int, state: State.ValueType, how: str, detail: str = "", change: str = "") -> pb.Version:
    version = pb.Version(
        number=number, digest=f"sha256:{number:064}", how=how, detail=detail, change=change, state=state
    )
    version.time.FromSeconds(int(time.time()) - 7200)
    if state == State.STATE_KEPT:
        version.spared_until_time.FromSeconds(int(time.time()) + 86400 * 3 + 60)
    return version


# Edit


def test_an_edit_is_a_creation_that_says_what_it_began_with(
    daemon: FakeDaemon, capsys: Capture, monkeypatch: pytest.MonkeyPatch, temporary: Path
) -> None:
    digest = daemon.models["poet:latest"].model.digest
    _editor(monkeypatch, 'cp "$1" "$TMPDIR/seen"; stat -c "%a %n" "$1" "${1%/*}" > "$TMPDIR/modes"; echo "#" >> "$1"')
    daemon.models["poet:latest"].model.digest = "sha256:" + "1" * 64
    assert lm(capsys, "edit", "poet").code == 0
    [request] = daemon.requests("CreateModel")
    assert request.name == "poet:latest"
    assert request.modelfile == "FROM base\nSYSTEM Arr.\n#\n"
    assert request.edited_digest == "sha256:" + "1" * 64 != digest
    assert (temporary / "seen").read_text() == "FROM base\nSYSTEM Arr.\n"
    file, directory = (temporary / "modes").read_text().splitlines()
    assert file.startswith("600 ")
    assert file.endswith("/poet-latest.modelfile")
    assert directory.startswith("700 ")
    assert not list(temporary.glob("lm-edit-*")), "nothing is left"


@pytest.mark.parametrize("script", ["true", ': > "$1"', 'printf " \\n" > "$1"'])
def test_what_is_not_changed_or_emptied_changes_nothing(
    daemon: FakeDaemon, capsys: Capture, monkeypatch: pytest.MonkeyPatch, temporary: Path, script: str
) -> None:
    _editor(monkeypatch, script)
    result = lm(capsys, "edit", "poet")
    assert (result.code, result.out, result.err) == (0, "", "poet:latest is as it was\n")
    assert json.loads(lm(capsys, "edit", "poet", "--json").out)["changed"] is False
    assert not daemon.requests("CreateModel")
    assert not list(temporary.iterdir())


def test_an_editor_that_fails_changes_nothing_and_loses_nothing(
    daemon: FakeDaemon, capsys: Capture, monkeypatch: pytest.MonkeyPatch, temporary: Path
) -> None:
    _editor(monkeypatch, "return 3")
    result = lm(capsys, "edit", "poet")
    assert result.code == 1
    assert "ended with 3" in result.err
    assert not list(temporary.iterdir()), "there was nothing to lose"
    _editor(monkeypatch, 'echo "SYSTEM Ahoy." > "$1"; kill -9 $$')
    result = lm(capsys, "edit", "poet")
    assert result.code == 1
    assert "was ended by signal 9" in result.err
    [kept] = temporary.glob("lm-edit-*/*")
    assert f"your text is kept in {kept}" in result.err
    assert kept.read_text() == "SYSTEM Ahoy.\n"
    assert not daemon.requests("CreateModel")


def test_an_editor_that_is_not_there(
    daemon: FakeDaemon, capsys: Capture, monkeypatch: pytest.MonkeyPatch, temporary: Path
) -> None:
    monkeypatch.setenv("VISUAL", str(temporary / "none"))
    assert "ended with 127" in lm(capsys, "edit", "poet").err
    monkeypatch.delenv("VISUAL")
    monkeypatch.delenv("EDITOR", raising=False)
    monkeypatch.setenv("PATH", str(temporary))
    result = lm(capsys, "edit", "poet")
    assert (result.code, result.err.splitlines()[0]) == (1, "error: no editor found")


def test_without_a_terminal_mistakes_end_it(
    daemon: FakeDaemon, capsys: Capture, monkeypatch: pytest.MonkeyPatch, temporary: Path
) -> None:
    _editor(monkeypatch, 'printf "FROM base\\nSISTEM x\\nMESSAGE\\n" > "$1"')
    daemon.failures["CheckModelfile"] = _syntax_error(("2:1", "unknown directive"), ("3:1", "MESSAGE needs more"))
    result = lm(capsys, "edit", "poet")
    assert result.code == 2
    for shown in ("poet-latest.modelfile:2:1", "^ unknown directive", "^ MESSAGE needs more", "your text is kept in"):
        assert shown in result.err


def test_a_file_that_is_no_text_is_a_mistake_like_others(
    daemon: FakeDaemon, capsys: Capture, monkeypatch: pytest.MonkeyPatch, temporary: Path
) -> None:
    _editor(monkeypatch, "printf '\\377' > \"$1\"")
    result = lm(capsys, "edit", "poet")
    assert result.code == 2
    assert "is not a text in UTF-8" in result.err
    assert [path.read_bytes() for path in temporary.glob("lm-edit-*/*")] == [b"\xff"]


def test_on_a_terminal_one_goes_on_after_mistakes(daemon: FakeDaemon, temporary: Path) -> None:
    script = (
        'edit() { [ -e "$TMPDIR/again" ] && echo MENDED >> "$1" || echo BAD >> "$1"; touch "$TMPDIR/again"; }; edit'
    )
    daemon.failures["CheckModelfile"] = _syntax_error(("3:1", "unknown directive `BAD`"))
    with terminal("edit", "poet", env={"EDITOR": script, "VISUAL": ""}) as screen:
        screen.expect(r"\^ unknown directive `BAD`")
        screen.expect(r"edit again\? \[Y/n\]")
        assert not daemon.requests("CreateModel")
        screen.type("\r")
        assert screen.wait() == 0
    [request] = daemon.requests("CreateModel")
    assert request.modelfile == "FROM base\nSYSTEM Arr.\nBAD\nMENDED\n"
    assert not list(temporary.glob("lm-edit-*"))


def test_on_a_terminal_one_may_give_up_and_keeps_the_text(daemon: FakeDaemon, temporary: Path) -> None:
    daemon.failures["CheckModelfile"] = _syntax_error(("3:1", "unknown directive `BAD`"))
    with terminal("edit", "poet", env={"EDITOR": 'edit() { echo BAD >> "$1"; }; edit', "VISUAL": ""}) as screen:
        screen.expect(r"edit again\?")
        screen.type("n\r")
        assert screen.wait() == 1
        screen.expect("your text is kept in")
    [kept] = temporary.glob("lm-edit-*/*")
    assert kept.read_text().endswith("BAD\n")
    assert stat.S_IMODE(os.stat(kept.parent).st_mode) == 0o700
    assert not daemon.requests("CreateModel")


def test_a_model_that_was_changed_meanwhile_is_not_overwritten(daemon: FakeDaemon, temporary: Path) -> None:
    daemon.failures["CreateModel"] = FakeFailure(
        grpc.StatusCode.ABORTED, "TAG_CHANGED", "`poet:latest` was changed meanwhile"
    )
    with terminal("edit", "poet", env={"EDITOR": 'edit() { echo "#" >> "$1"; }; edit', "VISUAL": ""}) as screen:
        assert screen.wait() == 1
        assert "was changed meanwhile" in screen.rest()
    assert list(temporary.glob("lm-edit-*/*")), "the text is kept, and nobody is asked to try the same again"


def test_ctrl_c_belongs_to_the_editor(daemon: FakeDaemon, temporary: Path) -> None:
    script = 'edit() { trap "echo caught" INT; echo ready; read line || read line; echo "$line" >> "$1"; }; edit'
    with terminal("edit", "poet", env={"EDITOR": script, "VISUAL": ""}) as screen:
        screen.expect("ready")
        screen.type("\x03")
        screen.expect("caught")
        screen.type("# typed\r")
        assert screen.wait() == 0
    assert daemon.requests("CreateModel")[0].modelfile.endswith("Arr.\n# typed\n")


# History and rollback


def test_the_history_as_a_table_and_as_json(daemon: FakeDaemon, capsys: Capture) -> None:
    daemon.versions["poet:latest"] = [
        _version(3, State.STATE_CURRENT, "rollback", "to version 1", "system +1 -1"),
        _version(2, State.STATE_KEPT, "edit", change="temperature 0.5 to 0.7"),
        _version(1, State.STATE_GONE, "create"),
    ]
    result = lm(capsys, "history", "poet")
    assert result.code == 0
    assert result.out.split()[:6] == ["VERSION", "DIGEST", "WHEN", "HOW", "KEPT", "CHANGE"]
    lines = [" ".join(line.split()) for line in result.out.splitlines()[1:]]
    assert lines == [
        "3 000000000000 2 hours ago rollback to version 1 current system +1 -1",
        "2 000000000000 2 hours ago edit for 3 days temperature 0.5 to 0.7",
        "1 000000000000 2 hours ago create gone",
    ]
    listed = json.loads(lm(capsys, "history", "poet", "--json").out)
    assert listed["name"] == "poet:latest"
    assert [(v["version"], v["how"], v["state"]) for v in listed["versions"]] == [
        (3, "rollback", "current"),
        (2, "edit", "kept"),
        (1, "create", "gone"),
    ]
    assert listed["versions"][0]["spared_until"] is None
    assert lm(capsys, "history", "nobody").code == 1


def test_a_rollback_names_its_version_or_leaves_it_to_the_daemon(daemon: FakeDaemon, capsys: Capture) -> None:
    result = lm(capsys, "rollback", "poet")
    assert (result.code, result.out, result.err) == (0, "", "rolled back poet:latest to version 1\n")
    assert json.loads(lm(capsys, "rollback", "poet", "4", "--json").out)["version"] == 4
    assert [request.version for request in daemon.requests("RollbackModel")] == [0, 4]
    for wrong in ("0", "-1", "x", "1.5", "99999999999"):
        assert lm(capsys, "rollback", "poet", "--", wrong).code == 2


def test_versions_complete_to_those_one_can_go_back_to(daemon: FakeDaemon) -> None:
    daemon.versions["poet:latest"] = [
        _version(12, State.STATE_CURRENT, "edit"),
        _version(11, State.STATE_GONE, "edit"),
        _version(10, State.STATE_KEPT, "edit"),
        _version(9, State.STATE_KEPT, "create"),
    ]
    for line, expected in (("lm rollback poet ", ["10", "9"]), ("lm rollback poet 1", ["10"]), ("lm edit p", None)):
        words = {"_LM_COMPLETE": "bash_complete", "COMP_WORDS": line, "COMP_CWORD": str(len(line.split(" ")) - 1)}
        found = [entry.split(",", 1)[1] for entry in lm_process(env=words).out.splitlines() if entry]
        assert found == (expected or ["poet:latest"])


def test_a_collection_may_take_versions_earlier(daemon: FakeDaemon, capsys: Capture) -> None:
    assert lm(capsys, "gc", "--history", "1h").code == 0
    assert lm(capsys, "gc").code == 0
    given, default = daemon.requests("CollectGarbage")
    assert (given.history.seconds, default.HasField("history")) == (3600, False)
    assert lm(capsys, "gc", "--history", "-1").code == 2


# Diff


def _two_models(daemon: FakeDaemon) -> None:
    old, new = daemon.add("old:latest"), daemon.add("new:latest")
    old.origin.ref = new.origin.ref = "hf.co/x/y"
    new.files[0].digest = old.files[0].digest
    old.parameters.temperature, new.parameters.temperature = 0.5, 0.7
    new.parameters.stop.append("</s>")
    old.system, new.system = "Be brief.\nBe kind.", "Be brief.\nBe bold."
    old.template = new.template = "{{ messages }}"


def test_a_diff_shows_what_differs_and_exits_with_1(daemon: FakeDaemon, capsys: Capture) -> None:
    _two_models(daemon)
    result = lm(capsys, "diff", "old", "new")
    assert (result.code, result.err) == (1, "")
    assert result.out.splitlines() == [
        "--- old parameters",
        "+++ new parameters",
        "@@ -1 +1,2 @@",
        "-temperature 0.5",
        "+temperature 0.7",
        '+stop "</s>"',
        "--- old system",
        "+++ new system",
        "@@ -1,2 +1,2 @@",
        " Be brief.",
        "-Be kind.",
        "+Be bold.",
    ]
    assert lm(capsys, "diff", "-q", "old", "new").out == ""
    shown = json.loads(lm(capsys, "diff", "old", "new", "--json").out)
    assert shown["parameters"] == {
        "temperature": {"old": 0.5, "new": 0.7},
        "stop": {"old": None, "new": ["</s>"]},
    }
    assert shown["files"] == {"removed": [], "added": []}
    assert (shown["equal"], shown["template"]) == (False, None)
    assert shown["system"].endswith("-Be kind.\n+Be bold.")


def test_models_that_are_alike_exit_with_0(daemon: FakeDaemon, capsys: Capture) -> None:
    assert (lm(capsys, "diff", "poet", "poet:latest").code, lm(capsys, "diff", "poet", "poet").out) == (0, "")
    shown = json.loads(lm(capsys, "diff", "poet", "poet", "--json").out)
    assert shown["equal"] is True
    daemon.add("twin:latest").origin.ref = "poet:latest"
    daemon.models["twin:latest"].files[0].digest = daemon.models["poet:latest"].files[0].digest
    result = lm(capsys, "diff", "poet", "twin")
    assert (result.code, result.err) == (0, "nothing that is compared differs, though the digests do\n")


def test_other_weights_are_other_files(daemon: FakeDaemon, capsys: Capture) -> None:
    daemon.add("other:latest").origin.ref = "poet:latest"
    result = lm(capsys, "diff", "poet", "other", "--json")
    shown = json.loads(result.out)
    assert result.code == 1
    assert [file["role"] for kind in ("removed", "added") for file in shown["files"][kind]] == ["weights", "weights"]


def test_another_scale_of_an_adapter_is_a_difference(daemon: FakeDaemon, capsys: Capture) -> None:
    digest = "sha256:" + "5" * 64
    for name, scale, requires in (("one:latest", 1, ""), ("half:latest", 0.5, "0.14.0")):
        info = daemon.add(name)
        info.origin.ref, info.requires = "hf.co/x/y", requires
        info.files[0].digest = digest
        info.files.add(role="adapter", filename="lora.gguf", digest=digest, size_bytes=2048, scale=scale)
    result = lm(capsys, "diff", "one", "half")
    assert result.code == 1
    assert "-adapter lora.gguf sha256:555555555555 2 KiB scale 1\n+adapter lora.gguf" in result.out
    assert "\n+0.14.0\n" in result.out
    shown = json.loads(lm(capsys, "diff", "one", "half", "--json").out)
    assert [file["scale"] for kind in ("removed", "added") for file in shown["files"][kind]] == [1, 0.5]
    assert shown["requires"] == {"old": "", "new": "0.14.0"}


def test_with_one_model_the_version_before_is_compared(daemon: FakeDaemon, capsys: Capture) -> None:
    daemon.versions["poet:latest"] = [
        _version(2, State.STATE_CURRENT, "edit"),
        _version(1, State.STATE_KEPT, "create"),
    ]
    assert lm(capsys, "diff", "poet").code == 0
    assert lm(capsys, "diff", "poet@2").code == 0
    assert [(r.name, r.version) for r in daemon.requests("GetModel")] == [("poet", 1), ("poet", 2)] * 2
    result = lm(capsys, "diff", "poet@1")
    assert (result.code, result.err.splitlines()[0]) == (2, "error: `poet` has no version before the first")
    lm(capsys, "show", "poet@1")
    assert daemon.requests("GetModel")[-1].version == 1
    lm(capsys, "cp", "poet@1", "old")
    assert [(r.source, r.version, r.destination) for r in daemon.requests("CopyModel")] == [("poet", 1, "old")]


def test_trouble_is_not_a_difference(daemon: FakeDaemon, capsys: Capture) -> None:
    result = lm(capsys, "diff", "poet", "nobody")
    assert result.code == 2
    assert "model `nobody` not found" in result.err
    daemon.stop()
    assert lm(capsys, "--no-start", "diff", "poet", "poet").code == 3
