"""The life of a runner process: the same suite for the scripted fake and, where it can run, the real runner."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import signal
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import pytest

from lmd.daemon.answer_events import Delta
from lmd.daemon.deadline import Deadline
from lmd.daemon.errors import (
    ContextLengthExceeded,
    DeadlineExceeded,
    EngineFailed,
    ModelIncompatible,
    RunnerCrashed,
    RunnerHung,
    RunnerStartTimeout,
    TemplateFailed,
    Unloaded,
)
from lmd.daemon.runner_answer import Answer
from lmd.daemon.runner_process import OutOfMemory, RunnerProcess
from lmd.daemon.runner_spec import RunnerSpec, RunnerTimings, runner_environment, view_names
from lmd.registry.errors import BlobMissing, CapabilityMissing, InvalidRequest, LmdError
from lmd.runner.v1 import frames_pb2 as frames
from tests.support.fake_runner import FAKE_COMMAND, Script, write_model
from tests.support.leaks import nothing_left_in, until

QUICK = RunnerTimings(hello_s=30, load_stall_s=30, ping_interval_s=0.05, hang_s=20, term_s=20)
IMPATIENT = replace(QUICK, term_s=0.3)


def real_runner_is_here() -> bool:
    return all(importlib.util.find_spec(name) for name in ("lmd.runner.main", "tests.support.tiny_models"))


@dataclass
class Subject:
    """A kind of runner: how to start it, and prompts that do what their names say."""

    spec: RunnerSpec
    load: frames.Load
    short: str
    endless: str

    async def start(self) -> RunnerProcess:
        return await RunnerProcess.start(self.spec)

    async def ready(self) -> RunnerProcess:
        runner = await self.start()
        await runner.load(self.load, lambda fraction: None)
        return runner

    def script(self, **changes: object) -> None:
        write_model(self.spec.weights[0], Script(**changes))  # type: ignore[arg-type]


def load_frame(model: str = "model.gguf", *, num_ctx: int = 4096) -> frames.Load:
    return frames.Load(
        model_paths=[model],
        num_ctx=num_ctx,
        slots=2,
        num_batch=64,
        num_thread=1,
        use_mmap=True,
        max_prompt_bytes=1 << 20,
        template_timeout_s=5,
    )


def submit(prompt: str, num_predict: int = -1) -> frames.Submit:
    sampling = frames.Sampling(top_p=1, typical_p=1, repeat_penalty=1, num_predict=num_predict, seed=1)
    return frames.Submit(prompt=prompt, sampling=sampling, cache_scope="test")


@pytest.fixture
def fake(tmp_path: Path) -> Subject:
    model = write_model(tmp_path / "weights")
    spec = RunnerSpec("m", (model,), tmp_path / "views", tmp_path / "log" / "m.log", FAKE_COMMAND, QUICK)
    return Subject(spec, load_frame(), "once upon a time", "hold")


@pytest.fixture
def real(tmp_path: Path) -> Subject:
    from tests.support.tiny_models import make_tiny_llama

    model = make_tiny_llama(tmp_path / "tiny.gguf", n_ctx=16384)
    spec = RunnerSpec("m", (model,), tmp_path / "views", tmp_path / "log" / "m.log", timings=QUICK)
    return Subject(spec, load_frame(num_ctx=16384), "once upon a time", "once")


@pytest.fixture(params=["fake", "real"])
def subject(request: pytest.FixtureRequest) -> Subject:
    if request.param == "real" and not real_runner_is_here():
        pytest.skip("the real runner is not importable here")
    chosen: Subject = request.getfixturevalue(request.param)
    return chosen


@pytest.fixture(autouse=True)
def nothing_left(tmp_path: Path) -> Iterator[None]:
    """After every test: no child, no descriptor more than before, no view."""
    with nothing_left_in(tmp_path / "views"):
        yield


async def collect(answer: Answer) -> str:
    """Return the whole text; raises what the answer ends with."""
    pieces = []
    async with asyncio.timeout(30):
        while True:
            await answer.changed()
            pieces += [delta.text for delta in answer.take()]
            if answer.error is not None:
                raise answer.error
            if answer.finished is not None:
                return "".join(pieces)


async def first_text(answer: Answer) -> None:
    async with asyncio.timeout(30):
        while not answer.take():
            await answer.changed()


async def end(runner: RunnerProcess) -> None:
    await runner.stop(drain_s=20)
    await runner.gone()


async def test_serves_from_hello_to_drain(subject: Subject) -> None:
    runner = await subject.start()
    assert runner.hello.result().pid == runner.pid
    fractions: list[float] = []
    ready = await runner.load(subject.load, fractions.append)
    assert ready.weights_bytes > 0
    assert ready.slots == 2
    assert fractions == sorted(fractions)
    answer = await runner.submit(submit(subject.short, num_predict=4))
    assert await collect(answer)
    assert answer.started is not None
    assert answer.finished is not None
    assert answer.finished.generated_tokens == 4
    ended = await runner.stop(drain_s=20)
    assert ended.expected
    assert ended.cause == "exit status 0"
    await runner.gone()


async def test_answers_at_once_do_not_mix(subject: Subject) -> None:
    runner = await subject.ready()
    answers = [await runner.submit(submit(subject.short, num_predict=4)) for _ in range(6)]
    texts = await asyncio.gather(*(collect(answer) for answer in answers))
    assert len(set(texts)) == 1
    assert runner.busy == runner.queued == 0
    await end(runner)


async def test_waiting_requests_know_their_place(subject: Subject) -> None:
    runner = await subject.ready()
    running = [await runner.submit(submit(subject.endless)) for _ in range(2)]
    waiting = [await runner.submit(submit(subject.endless)) for _ in range(3)]
    await until(lambda: runner.busy == 2)
    assert runner.queued == 3
    assert [runner.position(answer) for answer in waiting] == [0, 1, 2]
    waiting[0].close()
    await until(lambda: waiting[0].ended)
    assert [runner.position(answer) for answer in waiting[1:]] == [0, 1]
    for answer in running + waiting:
        answer.close()
    await until(lambda: all(answer.ended for answer in running + waiting))
    await end(runner)


async def test_cancel_frees_the_slot(subject: Subject) -> None:
    runner = await subject.ready()
    answer = await runner.submit(submit(subject.endless))
    await first_text(answer)
    assert runner.busy == 1
    answer.close()
    answer.close()
    await until(lambda: runner.busy == 0)
    assert await collect(await runner.submit(submit(subject.short, num_predict=2)))
    await end(runner)


async def test_drain_lets_running_answers_finish(subject: Subject) -> None:
    runner = await subject.ready()
    answer = await runner.submit(submit(subject.short, num_predict=4))
    ended, text = await asyncio.gather(runner.stop(drain_s=20), collect(answer))
    assert ended.expected
    assert text
    await runner.gone()


async def test_stop_without_drain_cuts_answers_with_the_given_error(subject: Subject) -> None:
    runner = await subject.ready()
    answer = await runner.submit(submit(subject.endless))
    await first_text(answer)
    stop = asyncio.create_task(runner.stop(drain_s=0, cut=lambda: Unloaded("m")))
    with pytest.raises(Unloaded):
        await collect(answer)
    assert (await stop).expected
    await runner.gone()


async def test_killed_runner_fails_each_of_its_requests_once(subject: Subject) -> None:
    runner = await subject.ready()
    answers = [await runner.submit(submit(subject.endless)) for _ in range(3)]
    await first_text(answers[0])
    os.kill(runner.pid, signal.SIGSEGV)
    errors = await asyncio.gather(*(collect(answer) for answer in answers), return_exceptions=True)
    assert all(isinstance(error, RunnerCrashed) for error in errors)
    assert len({id(error) for error in errors}) == 3
    assert "SIGSEGV" in str(errors[0])
    ended = await runner.exit
    assert not ended.expected
    assert not ended.probably_out_of_memory
    with pytest.raises(RunnerCrashed):
        await runner.submit(submit(subject.short))
    assert runner.pid == 0
    await runner.gone()


async def test_kill_from_outside_is_told_apart_from_ours(subject: Subject) -> None:
    runner = await subject.ready()
    os.kill(runner.pid, signal.SIGKILL)
    ended = await runner.exit
    assert ended.probably_out_of_memory
    assert "memory" in ended.cause
    await runner.gone()


async def test_stopped_process_is_hung_and_ended(subject: Subject) -> None:
    subject.spec = replace(subject.spec, timings=replace(QUICK, hang_s=0.5))
    runner = await subject.ready()
    answer = await runner.submit(submit(subject.endless))
    await first_text(answer)
    os.kill(runner.pid, signal.SIGSTOP)
    with pytest.raises(RunnerHung):
        await collect(answer)
    assert not (await runner.exit).expected
    await runner.gone()


async def test_view_is_private_and_holds_only_the_weights(subject: Subject) -> None:
    runner = await subject.start()
    (view,) = subject.spec.views_dir.iterdir()
    assert view.stat().st_mode & 0o777 == 0o700
    assert [path.name for path in view.iterdir()] == ["model.gguf"]
    assert (view / "model.gguf").resolve() == subject.spec.weights[0].resolve()
    assert psutil.Process(runner.pid).cwd() == str(view)
    assert os.getsid(runner.pid) == runner.pid
    await end(runner)


async def test_no_secret_reaches_the_runner(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "SSH_AUTH_SOCK"):
        monkeypatch.setenv(name, "hunter2")
    runner = await subject.start()
    environment = psutil.Process(runner.pid).environ()
    assert "hunter2" not in environment.values()
    await end(runner)


async def test_context_too_long_has_both_numbers(subject: Subject) -> None:
    runner = await subject.ready()
    long = "fail context_length" if subject.endless == "hold" else "once " * 20_000
    with pytest.raises(ContextLengthExceeded) as caught:
        await collect(await runner.submit(submit(long)))
    assert int(caught.value.metadata["prompt_tokens"]) > int(caught.value.metadata["context_tokens"]) > 0
    await end(runner)


@pytest.mark.parametrize("moment", ["start", "load", "stop"])
async def test_cancellation_leaves_nothing(fake: Subject, moment: str) -> None:
    fake.script(hello="never" if moment == "start" else "ok", load="hang", obeys_drain=False)

    async def load() -> None:
        runner = await fake.start()
        await runner.load(fake.load, lambda fraction: None)

    async def stop() -> None:
        fake.script(obeys_drain=False)
        runner = await fake.ready()
        await runner.stop(drain_s=1000)

    actions: dict[str, Callable[[], Awaitable[object]]] = {"start": fake.start, "load": load, "stop": stop}
    task = asyncio.ensure_future(actions[moment]())
    me = psutil.Process()
    await until(lambda: task.done() or bool(me.children()))
    if moment != "start":
        await until(lambda: "fake runner" in (fake.spec.log_path.read_text() if fake.spec.log_path.exists() else ""))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await until(lambda: not me.children())


async def test_cancellation_in_every_await_of_the_spawn_leaks_nothing(fake: Subject) -> None:
    """A descriptor that is open when a task is cancelled between two awaits is easily nobody's."""
    for steps in range(12):
        task = asyncio.ensure_future(fake.start())
        for _ in range(steps):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


@pytest.mark.parametrize(
    ("changes", "cause"),
    [({"hello": "exit"}, "exit status 7"), ({"hello": "garbage"}, "does not parse"), ({"hello": "huge"}, "1073741824")],
)
async def test_bad_hello_is_a_crash(fake: Subject, changes: dict[str, object], cause: str) -> None:
    fake.script(**changes)
    with pytest.raises(RunnerCrashed, match=cause):
        await fake.start()


async def test_silent_runner_times_out(fake: Subject) -> None:
    fake.script(hello="never")
    fake.spec = replace(fake.spec, timings=replace(QUICK, hello_s=0.3))
    with pytest.raises(RunnerStartTimeout):
        await fake.start()


@pytest.mark.parametrize(
    ("load", "error"),
    [
        ("oom", OutOfMemory),
        ("kill", OutOfMemory),
        ("incompatible", ModelIncompatible),
        ("template", TemplateFailed),
        ("abort", RunnerCrashed),
        ("hang", RunnerStartTimeout),
    ],
)
async def test_load_failures_are_told_apart(fake: Subject, load: str, error: type[Exception]) -> None:
    fake.script(load=load)
    fake.spec = replace(fake.spec, timings=replace(QUICK, load_stall_s=0.5))
    runner = await fake.start()
    with pytest.raises(error):
        await runner.load(fake.load, lambda fraction: None)
    assert runner.pid == 0


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        ("engine", EngineFailed),
        ("template", TemplateFailed),
        ("no_template", CapabilityMissing),
        ("invalid", InvalidRequest),
    ],
)
async def test_failed_request_fails_alone(fake: Subject, kind: str, error: type[LmdError]) -> None:
    runner = await fake.ready()
    other = await runner.submit(submit("hold"))
    with pytest.raises(error):
        await collect(await runner.submit(submit(f"fail {kind}")))
    assert not other.ended
    other.close()
    await end(runner)


@pytest.mark.parametrize(("prompt", "cause"), [("abort", "SIGABRT"), ("garbage", "does not parse")])
async def test_crash_has_cause_and_log(fake: Subject, prompt: str, cause: str) -> None:
    fake.script(stderr="ggml: \x1b[31mboom\x07")
    runner = await fake.ready()
    with pytest.raises(RunnerCrashed, match=cause) as caught:
        await collect(await runner.submit(submit(prompt)))
    assert caught.value.metadata["log"] == "ggml:  [31mboom"
    await runner.gone()


async def test_stubborn_runner_is_killed(fake: Subject) -> None:
    fake.spec = replace(fake.spec, timings=IMPATIENT)
    fake.script(obeys_drain=False, obeys_term=False)
    runner = await fake.ready()
    answer = await runner.submit(submit("hold"))
    ended = await runner.stop(drain_s=0.1, cut=lambda: Unloaded("m"))
    assert ended.expected
    assert ended.cause == "SIGKILL"
    assert not ended.probably_out_of_memory
    with pytest.raises(Unloaded):
        await collect(answer)
    await runner.gone()


async def test_a_frozen_runner_without_requests_gets_no_time_to_save(fake: Subject) -> None:
    fake.spec = replace(fake.spec, timings=IMPATIENT)
    runner = await fake.ready()
    os.kill(runner.pid, signal.SIGSTOP)
    ended = await runner.stop(drain_s=1000, save_s=1000)
    assert ended.expected
    assert ended.cause == "SIGKILL"
    assert not ended.probably_out_of_memory
    await runner.gone()


async def test_a_runner_that_saves_is_not_taken_for_a_frozen_one(fake: Subject, tmp_path: Path) -> None:
    saved, journal = tmp_path / "saved", tmp_path / "journal"
    fake.script(saving_until=str(saved), journal=str(journal))
    fake.spec = replace(fake.spec, timings=replace(QUICK, term_s=1))
    runner = await fake.ready()
    stop = asyncio.create_task(runner.stop(drain_s=20, save_s=20))
    await until(lambda: "save" in journal.read_text())
    # By then the time of a runner that has not heard is over.
    await asyncio.wait([stop], timeout=1.2)
    assert not stop.done()
    saved.touch()
    assert (await stop).cause == "exit status 0"
    await runner.gone()


async def test_grandchildren_do_not_outlive_a_killed_runner(fake: Subject) -> None:
    fake.spec = replace(fake.spec, timings=IMPATIENT)
    fake.script(child=True, obeys_drain=False, obeys_term=False)
    runner = await fake.ready()
    (child,) = psutil.Process(runner.pid).children()
    await runner.stop(drain_s=0)
    await runner.gone()
    psutil.wait_procs([child], timeout=5)
    assert not child.is_running()


async def test_slow_consumer_gets_fewer_larger_pieces(fake: Subject) -> None:
    runner = await fake.ready()
    answer = await runner.submit(submit("count 5000"))
    await until(lambda: answer.finished is not None)
    assert answer.take() == [Delta("x" * 5000, 5000)]
    await end(runner)


async def test_missing_weights_are_named(fake: Subject) -> None:
    fake.spec = replace(fake.spec, weights=(fake.spec.weights[0].with_name("ab" * 32),))
    with pytest.raises(BlobMissing):
        await fake.start()


async def test_log_is_rotated(fake: Subject) -> None:
    fake.script(stderr="y" * 700_000)
    for _ in range(6):
        await end(await fake.ready())
    logs = sorted(path.name for path in fake.spec.log_path.parent.iterdir())
    assert logs == ["m.log", "m.log.1", "m.log.2"]
    assert all(path.stat().st_size < 2 << 20 for path in fake.spec.log_path.parent.iterdir())


def test_view_names_follow_the_numbering_of_shards() -> None:
    assert view_names(1) == ["model.gguf"]
    assert view_names(3)[0] == "model-00001-of-00003.gguf"
    assert view_names(3)[2] == "model-00003-of-00003.gguf"


def test_import_paths_survive_the_change_of_directory() -> None:
    made = runner_environment({"PYTHONPATH": "daemon:protos", "HF_TOKEN": "x", "PATH": "/bin"})
    assert made == {"PYTHONPATH": f"{os.getcwd()}/daemon:{os.getcwd()}/protos", "PATH": "/bin"}


# Calls


async def test_calls_have_one_reply_each(fake: Subject) -> None:
    runner = await fake.ready()
    tokenize = frames.DaemonFrame(tokenize=frames.Tokenize(text="a bc"))
    detokenize = frames.DaemonFrame(detokenize=frames.Detokenize(tokens=[2, 1]))
    chat = frames.Chat(messages=[frames.ChatMessage(role="user", content="hi")])
    render = frames.DaemonFrame(render=frames.Render(chat=chat))
    embed = frames.DaemonFrame(embed=frames.Embed(inputs=["a bc", "d"]))
    answer = await runner.submit(submit("hold"))
    replies = await asyncio.gather(*(runner.call(frame) for frame in (tokenize, detokenize, render, embed)))
    assert list(replies[0].tokenized.tokens) == [1, 2]
    assert replies[1].detokenized.text == "xx x"
    assert replies[2].rendered.prompt == "user=hi\n"
    assert [list(vector.values) for vector in replies[3].embedded.vectors] == [[1, 2], [1]]
    ids = [tokenize.tokenize.request_id, detokenize.detokenize.request_id, render.render.request_id]
    assert len({answer.request_id, embed.embed.request_id, *ids}) == 5
    answer.close()
    await end(runner)


async def test_call_fails_with_what_the_runner_says(fake: Subject) -> None:
    runner = await fake.ready()
    with pytest.raises(CapabilityMissing) as caught:
        await runner.call(frames.DaemonFrame(embed=frames.Embed(inputs=["fail"])))
    assert caught.value.metadata["capability"] == "embedding"
    await end(runner)


async def test_call_that_nobody_waits_for_is_taken_back(fake: Subject) -> None:
    """The runner drains only when it has nothing left to do, so the drain tells."""
    runner = await fake.ready()
    embed = frames.DaemonFrame(embed=frames.Embed(inputs=["hold"]))
    call = asyncio.create_task(runner.call(embed))
    await until(lambda: embed.embed.request_id > 0)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    ended = await runner.stop(drain_s=20)
    assert ended.cause == "exit status 0"
    await runner.gone()


async def test_call_has_a_deadline(fake: Subject) -> None:
    runner = await fake.ready()
    embed = frames.DaemonFrame(embed=frames.Embed(inputs=["hold"]))
    with pytest.raises(DeadlineExceeded, match=r"within 0\.1 s"):
        await runner.call(embed, Deadline(0.1))
    assert 0 < embed.embed.timeout_ms <= 100
    assert (await runner.stop(drain_s=20)).cause == "exit status 0"
    await runner.gone()


async def test_call_ends_with_the_runner(fake: Subject) -> None:
    runner = await fake.ready()
    embed = frames.DaemonFrame(embed=frames.Embed(inputs=["hold"]))
    call = asyncio.create_task(runner.call(embed))
    await until(lambda: embed.embed.request_id > 0)
    runner.kill()
    with pytest.raises(RunnerCrashed):
        await call
    await runner.gone()
    with pytest.raises(RunnerCrashed):
        await runner.call(frames.DaemonFrame(tokenize=frames.Tokenize(text="x")))


async def test_frame_without_a_reply_is_no_call(fake: Subject) -> None:
    runner = await fake.ready()
    with pytest.raises(ValueError, match="ping"):
        await runner.call(frames.DaemonFrame(ping=frames.Ping()))
    await end(runner)


async def test_stats_come_with_the_pongs(fake: Subject) -> None:
    runner = await fake.ready()
    await collect(await runner.submit(submit("three more words")))
    await until(lambda: runner.stats is not None and runner.stats.generated_tokens == 3)
    assert runner.stats is not None
    assert (runner.stats.prompt_tokens, runner.stats.kv_size) == (3, 4096)
    await end(runner)
