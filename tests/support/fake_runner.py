# ruff: noqa: ASYNC110, ASYNC240, ASYNC251 - a process of its own, where blocking harms nobody
"""A runner without an engine: it speaks the frames and does what a script says, misbehaviour included.

It is started like the real one. Its script is the "model": `write_model` writes a JSON file, which the fake finds in
its view as `model.gguf`. What a request does is its prompt:

    any words        the words come back, one token each
    count N [SIZE]   N tokens of "x", or of SIZE times that
    hold             one token, then nothing until the request is cancelled
    read             nothing, as if the prompt took for ever
    gate PATH        one token, then nothing until PATH exists
    abort, kill      SIGABRT, SIGKILL (once it has a slot)
    abort-at PATH    one token, then SIGABRT when PATH exists
    fail KIND [F]    `failed` of that kind, with F as its field
    request          the request itself as JSON
    load             the load it was started with as JSON
    freeze           the whole process stops reading and writing
    garbage          bytes that are no frame

Of the rest of a request it obeys priority, time-out, choices (each gets the same words) and log probabilities (all of
them -0.5). A token is a word, and its id the length of the word; an embedding is the lengths of a text's words.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import json
import os
import resource
import signal
import socket
import struct
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn, Protocol

from google.protobuf.json_format import MessageToJson

from lmd.runner.v1 import frames_pb2 as frames

FAKE_COMMAND = (sys.executable, "-P", str(Path(__file__).resolve()))


@dataclass(frozen=True)
class Script:
    """How a fake runner behaves; every default is good behaviour."""

    #: "ok", "never", "exit", "garbage", "huge"
    hello: str = "ok"
    #: "ok", "oom", "incompatible", "template", "abort", "kill", "hang", "gate" (see *gate*)
    load: str = "ok"
    #: Loads fail with "oom" until this file exists.
    oom_until: str = ""
    #: Loads do not finish until this file exists.
    gate: str = ""
    #: Each process appends a line here when its load begins.
    journal: str = ""
    memory_bytes: int = 1000
    gpu: bool = False
    num_ctx_max: int = 0
    has_template: bool = True
    answers_ping: bool = True
    obeys_drain: bool = True
    obeys_term: bool = True
    #: Ends requests whose time is up.
    obeys_deadlines: bool = True
    #: What it says that each answer took.
    answer_s: float = 5e-9
    #: Tells in which order requests are served.
    tells_queue: bool = True
    #: Dies when a request comes in, before it has a slot.
    crash_on_submit: bool = False
    #: A chat comes back as "role=content" of each message, not as the words of the last one.
    echo_chat: bool = False
    #: Starts a child that holds our standard error.
    child: bool = False
    #: How much of the weights a load has read when it comes to the gate.
    progress: float = 0.5
    #: When drained with time to save KV, it says so in the journal, and goes on "saving" until this file exists.
    saving_until: str = ""
    stderr: str = "fake runner"


def write_model(path: Path, script: Script | None = None) -> Path:
    """Write a "model" that makes the fake follow *script*."""
    path.write_text(json.dumps(asdict(script or Script())))
    return path


class Writer(Protocol):
    """What a fake writes to."""

    def write(self, data: bytes) -> None: ...

    async def drain(self) -> None: ...


class Fake:
    """One fake runner process."""

    def __init__(self, reader: asyncio.StreamReader, writer: Writer, script: Script) -> None:
        self.reader = reader
        self.writer = writer
        self.script = script
        self.waiting: list[frames.Submit] = []
        self.told: list[int] = []
        self.expired: set[int] = set()
        self.held: set[int] = set()
        self.stats = frames.Stats(kv_size=4096)
        self.running: dict[int, asyncio.Task[None]] = {}
        self.load = frames.Load()
        self.draining = False
        self.drained = asyncio.Event()

    @property
    def on_gpu(self) -> bool:
        return self.script.gpu and self.load.num_gpu != 0

    def send(self, frame: frames.RunnerFrame) -> None:
        data = frame.SerializeToString()
        self.writer.write(struct.pack(">I", len(data)) + data)

    async def receive(self) -> frames.DaemonFrame:
        (length,) = struct.unpack(">I", await self.reader.readexactly(4))
        return frames.DaemonFrame.FromString(await self.reader.readexactly(length))

    # What concerns the whole process; a fake that shares its process with others does these in another way.

    def exit(self, status: int) -> NoReturn:
        sys.exit(status)

    def die(self, number: signal.Signals) -> NoReturn:
        os.kill(os.getpid(), number)
        while True:
            time.sleep(3600)

    async def freeze(self) -> None:
        time.sleep(3600)

    def write_journal(self, line: str) -> None:
        if self.script.journal:
            with open(self.script.journal, "a") as journal:
                journal.write(f"{line}\n")

    async def until_exists(self, path: str) -> None:
        """Wait for a file; polls, because the one who makes it is another process."""
        while not await asyncio.to_thread(os.path.exists, path):
            await asyncio.sleep(0.005)

    def read_script(self) -> Script:
        return script_in(Path())

    def check_files(self) -> None:
        """Read what the load names, as an engine does."""
        for path in (
            *self.load.model_paths,
            *self.load.draft_paths,
            *(adapter.path for adapter in self.load.adapters),
        ):
            Path(path).read_bytes()

    @property
    def pid(self) -> int:
        return os.getpid()

    async def run(self) -> None:
        """Live until the daemon hangs up, or drains and the running requests are done."""
        frames_read = asyncio.create_task(self.follow_frames())
        drained = asyncio.create_task(self.drained.wait())
        try:
            done, _ = await asyncio.wait([frames_read, drained], return_when="FIRST_COMPLETED")
        finally:
            frames_read.cancel()
            drained.cancel()
        if frames_read in done:
            frames_read.result()

    async def follow_frames(self) -> None:
        match self.script.hello:
            case "never":
                await asyncio.Event().wait()
            case "exit":
                self.exit(7)
            case "garbage":
                self.writer.write(struct.pack(">I", 4) + b"\xff\xff\xff\xff")
            case "huge":
                self.writer.write(struct.pack(">I", 1 << 30))
            case _:
                self.send(
                    frames.RunnerFrame(
                        hello=frames.Hello(pid=self.pid, engine_version="fake", gpu_offload=self.script.gpu)
                    )
                )
        while True:
            frame = await self.receive()
            match frame.WhichOneof("frame"):
                case "load":
                    self.load = frame.load
                    self.script = self.read_script()  # a spare learns only now what it is
                    await self.do_load()
                case "submit":
                    if self.script.crash_on_submit:
                        self.die(signal.SIGABRT)
                    self.take_in(frame.submit)
                    self.fill_slots()
                case "cancel":
                    self.do_cancel(frame.cancel.request_id)
                case "ping":
                    if self.script.answers_ping:
                        pong = frames.Pong(nonce=frame.ping.nonce, stats=self.stats)
                        self.send(frames.RunnerFrame(pong=pong))
                case "embed" | "tokenize" | "detokenize" | "render":
                    self.reply(frame)
                case "drain":
                    self.draining = self.script.obeys_drain
                    if self.script.saving_until and frame.drain.save_ms:
                        await self.save(frame.drain.save_ms)
            if self.draining and not self.running and not self.waiting and not self.held:
                self.drained.set()

    async def do_load(self) -> None:
        drafts = f" {' '.join(self.load.draft_paths)}" if self.load.draft_paths else ""
        kv_type = f" {self.load.kv_type}" if self.load.kv_type not in ("", "f16") else ""
        self.write_journal(f"{self.load.num_ctx} {self.load.num_thread}{drafts}{kv_type}")
        self.check_files()
        self.send(frames.RunnerFrame(load_progress=frames.LoadProgress(fraction=self.script.progress)))
        kinds = {
            "oom": frames.LoadFailed.KIND_OUT_OF_MEMORY,
            "incompatible": frames.LoadFailed.KIND_INCOMPATIBLE,
            "template": frames.LoadFailed.KIND_TEMPLATE,
            "device gone": frames.LoadFailed.KIND_DEVICE_GONE,
        }
        load = self.script.load
        if load == "device gone" and not self.load.devices:
            load = ""
        if self.script.oom_until and not Path(self.script.oom_until).exists():
            load = "oom"
        if load in kinds:
            self.send(frames.RunnerFrame(load_failed=frames.LoadFailed(kind=kinds[load], message="as scripted")))
            await self.writer.drain()
            self.exit(1)
        if load == "abort":
            self.die(signal.SIGABRT)
        if load == "kill":
            self.die(signal.SIGKILL)
        if load == "hang":
            await asyncio.Event().wait()
        if self.script.gate:
            await self.until_exists(self.script.gate)
        self.send(frames.RunnerFrame(ready=self.ready()))

    def ready(self) -> frames.Ready:
        num_ctx = min(self.load.num_ctx, self.script.num_ctx_max or self.load.num_ctx)
        return frames.Ready(
            weights_bytes=self.script.memory_bytes,
            vram_bytes=self.script.memory_bytes if self.on_gpu else 0,
            mapped_bytes=self.script.memory_bytes if self.load.use_mmap and not self.on_gpu else 0,
            gpu_layers=99 if self.on_gpu else 0,
            num_ctx=num_ctx,
            train_ctx=4096,
            slots=self.load.slots,
            num_thread=self.load.num_thread or 3,
            num_thread_batch=self.load.num_thread_batch or self.load.num_thread or 4,
            threads_lasting=True,
            has_template=self.script.has_template,
        )

    def take_in(self, submit: frames.Submit) -> None:
        """Queue a request, before those that may wait for it."""
        urgent = submit.priority != frames.PRIORITY_BATCH
        place = len(self.waiting)
        while urgent and place > 0 and self.waiting[place - 1].priority == frames.PRIORITY_BATCH:
            place -= 1
        self.waiting.insert(place, submit)
        if submit.timeout_ms and self.script.obeys_deadlines:
            asyncio.get_running_loop().call_later(submit.timeout_ms / 1000, self.expire, submit.request_id)

    def expire(self, request_id: int) -> None:
        """End a request whose time is up, unless it has ended."""
        if request_id in self.running or any(submit.request_id == request_id for submit in self.waiting):
            self.expired.add(request_id)
            self.do_cancel(request_id)

    def tell_queue(self) -> None:
        """Say who waits, when that has changed."""
        ids = [submit.request_id for submit in self.waiting]
        if ids != self.told and self.script.tells_queue:
            self.told = ids
            self.send(frames.RunnerFrame(queue=frames.Queue(request_ids=ids)))

    def reply(self, frame: frames.DaemonFrame) -> None:
        """Answer a request that has one reply; one that names what "fail" does fails."""
        match frame.WhichOneof("frame"):
            case "embed":
                embed = frame.embed
                if "hold" in embed.inputs:
                    self.held.add(embed.request_id)
                    return
                if "fail" in embed.inputs:
                    self.fail(embed.request_id, frames.Failed.KIND_CAPABILITY, "embedding")
                    return
                vectors = [frames.Embedded.Vector(values=[len(word) for word in text.split()]) for text in embed.inputs]
                embedded = frames.Embedded(
                    request_id=embed.request_id, vectors=vectors, tokens=[len(vector.values) for vector in vectors]
                )
                self.send(frames.RunnerFrame(embedded=embedded))
            case "tokenize":
                words = frame.tokenize.text.split()
                tokenized = frames.Tokenized(
                    request_id=frame.tokenize.request_id,
                    tokens=[len(word) for word in words],
                    pieces=[word.encode() for word in words],
                )
                self.send(frames.RunnerFrame(tokenized=tokenized))
            case "detokenize":
                text = " ".join("x" * token for token in frame.detokenize.tokens)
                detokenized = frames.Detokenized(request_id=frame.detokenize.request_id, text=text)
                self.send(frames.RunnerFrame(detokenized=detokenized))
            case "render":
                prompt = "".join(f"{m.role}={m.content}\n" for m in frame.render.chat.messages)
                words = prompt.split()
                rendered = frames.Rendered(
                    request_id=frame.render.request_id,
                    prompt=prompt,
                    tokens=[len(word) for word in words],
                    pieces=[word.encode() for word in words],
                )
                self.send(frames.RunnerFrame(rendered=rendered))

    async def save(self, save_ms: int) -> None:
        Path(self.load.kv_dir, "00.kv").write_bytes(bytes(100))
        self.write_journal(f"save {save_ms}")
        await self.until_exists(self.script.saving_until)

    def fill_slots(self) -> None:
        while self.waiting and len(self.running) < self.load.slots:
            submit = self.waiting.pop(0)
            task = asyncio.create_task(self.answer(submit))
            # Not a `finally` in the coroutine: a task that is cancelled before its first step never enters it.
            task.add_done_callback(functools.partial(self.note_end, submit.request_id))
            self.running[submit.request_id] = task
        self.tell_queue()

    def do_cancel(self, request_id: int) -> None:
        if (task := self.running.get(request_id)) is not None:
            task.cancel()
            return
        if request_id in self.held:
            self.held.remove(request_id)
            self.take_back(request_id)
        for submit in list(self.waiting):
            if submit.request_id == request_id:
                self.waiting.remove(submit)
                self.take_back(request_id)
        self.tell_queue()

    def take_back(self, request_id: int) -> None:
        expired = request_id in self.expired
        self.expired.discard(request_id)
        self.fail(request_id, frames.Failed.KIND_DEADLINE if expired else frames.Failed.KIND_CANCELLED)

    def fail(self, request_id: int, kind: frames.Failed.Kind.ValueType, field: str = "") -> None:
        failed = frames.Failed(
            request_id=request_id, kind=kind, message="as scripted", prompt_tokens=9, context_tokens=8, field=field
        )
        self.send(frames.RunnerFrame(failed=failed))

    def note_end(self, request_id: int, task: asyncio.Task[None]) -> None:
        if task.cancelled():
            self.take_back(request_id)
        del self.running[request_id]
        self.fill_slots()
        if self.draining and not self.running and not self.waiting and not self.held:
            self.drained.set()

    async def answer(self, submit: frames.Submit) -> None:
        chat = submit.WhichOneof("input") == "chat"
        if chat and not self.script.has_template:
            self.fail(submit.request_id, frames.Failed.KIND_NO_TEMPLATE)
            return
        prompt = submit.chat.messages[-1].content if chat else submit.prompt
        words = prompt.split()
        if chat and self.script.echo_chat:
            words = [f"{message.role}={message.content}" for message in submit.chat.messages]
        started = frames.Started(request_id=submit.request_id, prompt_tokens=len(words))
        self.send(frames.RunnerFrame(started=started))
        verb, argument, more = (*words, "", "", "")[:3]
        generated = 0
        if verb == "fail":
            self.fail(submit.request_id, frames.Failed.Kind.Value(f"KIND_{argument.upper()}"), more)
            return
        if verb == "read":
            await asyncio.Event().wait()
        if verb in ("hold", "gate"):
            self.delta(submit, "x", 1)
            generated = 1
            await (self.until_exists(argument) if verb == "gate" else asyncio.Event().wait())
        elif verb == "count":
            for generated in range(1, int(argument) + 1):
                self.delta(submit, "x" * int(more or 1), generated)
                if generated % 64 == 0:
                    await self.writer.drain()
                    await asyncio.sleep(0)
        elif verb in ("request", "load"):
            generated = 1
            self.delta(submit, MessageToJson(submit if verb == "request" else self.load), generated)
        elif verb == "abort-at":
            await self.until_exists(argument)
            self.die(signal.SIGABRT)
        elif verb in ("abort", "kill"):
            self.die(signal.SIGABRT if verb == "abort" else signal.SIGKILL)
        elif verb == "freeze":
            await self.freeze()
        elif verb == "garbage":
            self.writer.write(struct.pack(">I", 2) + b"\xff\xff")
            await asyncio.Event().wait()
        else:
            for generated, word in enumerate(words, 1):
                self.delta(submit, word + " ", generated)
                await asyncio.sleep(0)
        self.finish(submit, len(words), generated)

    def finish(self, submit: frames.Submit, prompt_tokens: int, generated: int) -> None:
        self.stats.prompt_tokens += prompt_tokens
        self.stats.generated_tokens += generated * max(1, submit.choices)
        finished = frames.Finished(
            request_id=submit.request_id,
            reason=frames.Finished.REASON_STOP,
            prompt_tokens=prompt_tokens,
            generated_tokens=generated * max(1, submit.choices),
            queue_ns=1,
            prompt_ns=2,
            generate_ns=round(self.script.answer_s * 1e9) - 2,
        )
        if submit.choices > 1:
            ended = frames.Finished.Choice(reason=finished.reason, generated_tokens=generated)
            finished.choices.extend([ended] * submit.choices)
        self.send(frames.RunnerFrame(finished=finished))

    def delta(self, submit: frames.Submit, text: str, generated: int) -> None:
        logprobs = []
        if submit.HasField("top_logprobs"):
            other = frames.TokenLogprob(id=1, token=b"\xff", logprob=-1.5)
            said = frames.TokenLogprob(id=len(text), token=text.encode(), logprob=-0.5)
            logprobs = [said, *[other] * (submit.top_logprobs - 1)][: submit.top_logprobs]
            said = frames.TokenLogprob(id=len(text), token=text.encode(), logprob=-0.5, top=logprobs)
            logprobs = [said]
        for choice in range(max(1, submit.choices)):
            delta = frames.Delta(
                request_id=submit.request_id,
                text=text,
                generated_tokens=generated,
                choice=choice,
                logprobs=logprobs,
            )
            self.send(frames.RunnerFrame(delta=delta))


def script_in(view: Path) -> Script:
    """Read the script that lies in the view; a spare has none yet, and behaves."""
    found = min(view.glob("model*"), default=None)
    return Script(**json.loads(found.read_text())) if found is not None else Script()


async def amain(fd: int) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    script = script_in(Path())
    sys.stderr.write(script.stderr + "\n")
    sys.stderr.flush()
    if not script.obeys_term:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if script.child:
        await asyncio.create_subprocess_exec("sleep", "3600")
    reader, writer = await asyncio.open_unix_connection(sock=socket.socket(fileno=fd))
    try:
        await Fake(reader, writer, script).run()
    except (asyncio.IncompleteReadError, ConnectionError):
        return
    await writer.drain()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fd", type=int, required=True)
    asyncio.run(amain(parser.parse_args().fd))


if __name__ == "__main__":
    main()
