"""The parts of Ollama's management routes that need no daemon."""

from __future__ import annotations

import os
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from lmd.daemon.http.ollama.create import create_refusal
from lmd.daemon.http.ollama.failures import Refusal
from lmd.daemon.http.ollama.listing import expiry
from lmd.daemon.http.ollama.manage_requests import CreateBody
from lmd.daemon.http.ollama.pull import PullProgress, pull_refusal
from lmd.daemon.http.ollama.recipes import Recipe, recipe_of
from lmd.daemon.http.ollama.shapes import count_text, moment_text, time_text
from lmd.daemon.http.ollama.show import parameters_text, shown_metadata
from lmd.daemon.ollama_level import API_LEVEL, is_met
from lmd.daemon.residency.values import RunnerState, RunnerStatus
from lmd.registry.digest import Digest
from lmd.registry.errors import DiskFull, LmdError, ModelNotFound, SourceDenied, SourceNotFound
from lmd.registry.gguf import GgufArray, GgufHeader
from lmd.registry.lm_config import Message
from lmd.registry.pull import PullEvent, PullState
from tests.support.runner_statuses import runner_status

A, B = Digest.of(b"a"), Digest.of(b"b")
NOW = datetime(2026, 11, 25, 12, 0, tzinfo=UTC)
HOUR = timedelta(hours=1)


def recipe(**fields: object) -> Recipe:
    return recipe_of(CreateBody.model_validate({"model": "new", **fields}))


def test_the_level_is_what_clients_parse() -> None:
    assert [str(int(part)) for part in API_LEVEL.split(".")] == API_LEVEL.split(".")
    page = Path(__file__).parents[2] / "docs" / "reference" / "compatibility" / "ollama-manage.md"
    assert API_LEVEL in page.read_text(), "the page says which release this answers as"


@pytest.mark.parametrize(
    ("required", "met"),
    [
        (API_LEVEL, True),
        ("0.5", True),
        ("v0.6.4", True),
        ("0.32.1", False),
        ("1", False),
        ("0.9.99", True),
        ("", None),
        ("new", None),
        ("0.1.2.3", None),
        ("0.1.x", None),
        ("٣", None),
    ],
)
def test_what_a_model_requires(required: str, met: bool | None) -> None:
    assert is_met(required) is met


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, ""),
        (999, "999"),
        (185_792, "186K"),
        (134_515_008, "134.52M"),
        (8_030_261_248, "8.0B"),
        (70_553_706_496, "70.6B"),
    ],
)
def test_numbers_of_parameters(count: int, text: str) -> None:
    assert count_text(count) == text


def test_times_are_read_by_old_readers_too() -> None:
    assert time_text(0) == "1970-01-01T00:00:00.000000+00:00"
    assert datetime.fromisoformat(time_text(1_764_000_000.123456)).timestamp() == pytest.approx(1_764_000_000.123456)
    assert moment_text(NOW) == "2026-11-25T12:00:00.000000+00:00"


def test_parameters_stand_in_two_columns() -> None:
    text = parameters_text(
        {"top_p": 0.95, "num_ctx": 4096, "use_mmap": False, "stop": ('say "hi"', "ä\n"), "temperature": 1.0}
    )
    assert text.splitlines() == [
        "num_ctx                        4096",
        r'stop                           "say \"hi\""',
        r'stop                           "ä\n"',
        "temperature                    1",
        "top_p                          0.95",
        "use_mmap                       false",
    ]
    assert parameters_text({}) == ""


def test_metadata_is_json_whatever_a_file_holds() -> None:
    five, six = GgufArray("int32", 5, (1, 2, 3, 4, 5)), GgufArray("int32", 6, (1, 2, 3, 4, 5, 6))
    header = GgufHeader(
        version=3,
        alignment=32,
        metadata={
            "general.name": "secret",
            "tokenizer.chat_template": "long",
            "x.five": five,
            "x.six": six,
            "x.eps": 9.999999747378752e-06,
            "x.inf": float("inf"),
            "x.nans": GgufArray("float32", 1, (float("nan"),)),
            "x.flag": True,
        },
        tensors=(),
        data_offset=0,
        file_size=0,
    )
    shown = {"x.five": [1, 2, 3, 4, 5], "x.six": [], "x.eps": 1e-05, "x.inf": None, "x.nans": [None], "x.flag": True}
    assert shown_metadata(header, verbose=False) == shown
    assert shown_metadata(header, verbose=True) == shown | {"x.six": [1, 2, 3, 4, 5, 6]}


def status(state: RunnerState, expires_at: datetime | None = None, *, keep_forever: bool = False) -> RunnerStatus:
    return runner_status(
        digest=A, state=state, expires_at=expires_at, keep_forever=keep_forever, pid=os.getpid(), load_started_at=NOW
    )


@pytest.mark.parametrize(
    ("runner", "leaves_at"),
    [
        (status(RunnerState.READY, NOW + HOUR), NOW + HOUR),
        (status(RunnerState.READY), NOW + 2 * HOUR),
        (status(RunnerState.LOADING), NOW + 2 * HOUR),
        (status(RunnerState.DRAINING, NOW + HOUR), NOW),
        (status(RunnerState.DRAINING, keep_forever=True), NOW),
    ],
)
def test_when_a_model_leaves(runner: RunnerStatus, leaves_at: datetime) -> None:
    assert expiry(runner, NOW, 2 * HOUR) == leaves_at


def test_for_ever_is_a_date_far_away() -> None:
    assert expiry(status(RunnerState.READY, keep_forever=True), NOW, HOUR).year == 2319
    assert expiry(replace(status(RunnerState.READY), pinned=True), NOW, HOUR).year == 2319


def event(filename: str, digest: Digest | None, completed: int, state: PullState) -> PullEvent:
    return PullEvent(str(digest or ""), filename, completed, 10, state)


def test_a_pull_of_two_files_is_verified_when_both_have_come() -> None:
    progress = PullProgress()
    told = []
    for each in (
        PullEvent("", "", 0, 0, PullState.RESOLVING),
        event("a.gguf", A, 0, PullState.DOWNLOADING),
        event("b.gguf", B, 10, PullState.PRESENT),
        event("c.gguf", None, 4, PullState.RETRYING),
        event("a.gguf", A, 10, PullState.COMMITTING),
        event("a.gguf", A, 10, PullState.DONE),
        event("c.gguf", None, 10, PullState.COMMITTING),
        event("c.gguf", None, 10, PullState.DONE),
    ):
        told += progress.steps(each)
    a, b = f"pulling {A.short}", f"pulling {B.short}"
    assert told == [
        {"status": a, "digest": str(A), "total": 10},
        {"status": b, "digest": str(B), "total": 10, "completed": 10},
        {"status": "pulling c.gguf", "total": 10, "completed": 4},
        {"status": a, "digest": str(A), "total": 10, "completed": 10},
        {"status": "pulling c.gguf", "total": 10, "completed": 10},
        {"status": "verifying sha256 digest"},
    ]
    assert [step["status"] for step in progress.last_steps()] == ["writing manifest", "success"]


def test_a_pull_of_what_is_here_says_all_of_its_steps() -> None:
    progress = PullProgress()
    assert [step["status"] for step in progress.steps(event("a", A, 10, PullState.PRESENT))] == [f"pulling {A.short}"]
    assert [step["status"] for step in progress.last_steps()] == [
        "verifying sha256 digest",
        "writing manifest",
        "success",
    ]


@pytest.mark.parametrize(
    ("error", "expected", "message"),
    [
        (ModelNotFound("x"), 500, "pull model manifest: file does not exist: model `x` not found"),
        (SourceNotFound("no such repository", ref="x"), 500, "pull model manifest: file does not exist: no such"),
        (SourceDenied("it is gated", ref="x", hint="ask"), 500, "it is gated (ask)"),
        (DiskFull(needed_bytes=2, free_bytes=1, where="/"), 507, "not enough disk space in /"),
    ],
)
def test_how_failed_pulls_are_told(error: LmdError, expected: int, message: str) -> None:
    for refusal in (pull_refusal(error), create_refusal(error)):
        assert refusal.status == expected
        assert refusal.message.startswith(message)


def test_a_recipe_has_all_that_was_asked_for() -> None:
    made = recipe(
        **{"from": "base"},
        files={"proj/mmproj.gguf": str(A)},
        draft_files={"draft.gguf": f"sha256-{B.hex.upper()}"},
        template="{{ prompt }}",
        license="MIT",
        parameters={"temperature": 1, "stop": "END", "num_ctx": 64.0, "seed": None, "low_vram": True},
        messages=[{"role": "User", "content": "hi"}],
    )
    assert [source.value for source in made.modelfile.from_] == ["base", "proj/mmproj.gguf"]
    assert [source.value for source in made.modelfile.drafts or ()] == ["draft.gguf"]
    assert made.files == {"proj/mmproj.gguf": A, "draft.gguf": B}
    assert made.modelfile.parameters == {"temperature": 1.0, "stop": ("END",), "num_ctx": 64}
    assert made.modelfile.messages == (Message("user", "hi"),)
    assert (made.modelfile.template, made.modelfile.system, made.modelfile.licenses) == ("{{ prompt }}", None, ("MIT",))


def test_from_may_name_an_uploaded_file_or_a_digest() -> None:
    made = recipe(**{"from": "x.gguf"}, files={"x.gguf": str(A)})
    assert [source.value for source in made.modelfile.from_] == ["x.gguf"]
    assert [source.value for source in recipe(**{"from": str(A)}).modelfile.from_] == [str(A)]


def test_adapters_apply_as_they_were_trained() -> None:
    made = recipe(**{"from": "x"}, adapters={"a.gguf": str(A), "b.gguf": str(B)})
    assert [(adapter.source.value, adapter.scale) for adapter in made.modelfile.adapters or ()] == [
        ("a.gguf", 1.0),
        ("b.gguf", 1.0),
    ]
    assert made.files == {"a.gguf": A, "b.gguf": B}
    assert recipe(**{"from": "x"}, adapters={}).modelfile.adapters is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"files": {"a": str(A)}, "draft_files": {"a": str(B)}}, "is in files and in draft_files"),
        ({"from": "x", "files": {"a": str(A)}, "adapters": {"a": str(B)}}, "is in files and in adapters"),
        ({"from": "x", "draft_files": {"a": str(A)}, "adapters": {"a": str(B)}}, "is in draft_files and in adapters"),
        ({"from": "x", "adapters": {"../a": str(A)}}, "must be relative"),
        ({"files": {f"sha256:{A.hex}": str(A)}}, "looks like a digest"),
        ({"files": {f"{number}": str(A) for number in range(300)}}, "at most 256 files"),
        ({"files": {"a\x07": str(A)}}, "invisible"),
        ({"from": "sha256:1"}, "invalid digest format"),
        ({"from": "../x"}, "not read from paths"),
        ({"from": "FILE:/x"}, "not read from paths"),
        ({"from": "x", "draft_quantize": "q4_0"}, "drafts are not quantized"),
        ({"from": "x", "parser": "y"}, "no built-in parsers"),
        ({"from": "x", "info": {"a": 1}}, "cannot be overridden"),
        ({"from": "x", "remote_host": "y"}, "no remote models"),
        ({"from": "x", "requires": "latest"}, "is no version"),
        ({"from": "x", "template": "{{- if .System }}"}, "template error: "),
        ({"from": "x", "license": ["MIT"] * 300}, "at most 256 texts"),
        ({"from": "x", "messages": [{"role": "user", "content": "x", "images": ["aGk="]}]}, "images"),
        ({"from": "x", "messages": [{"role": "tool", "content": "x"}]}, "message role must be one of"),
    ],
)
def test_recipes_that_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(Refusal, match=message) as refused:
        recipe(**fields)
    assert refused.value.status == 400
