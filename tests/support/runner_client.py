"""Drives a real runner process over its socket, as the daemon does but without asyncio."""

from __future__ import annotations

import os
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from lmd.runner.v1 import frames_pb2

_DEADLINE_S = 40.0
_GREEDY = {
    "temperature": 0.0,
    "top_p": 1.0,
    "typical_p": 1.0,
    "repeat_penalty": 1.0,
    "num_predict": -1,
}


@dataclass(slots=True)
class Answer:
    """All that came back for one request."""

    texts: list[str] = field(default_factory=list)
    choices: dict[int, list[str]] = field(default_factory=dict)
    logprobs: list[frames_pb2.TokenLogprob] = field(default_factory=list)
    started: frames_pb2.Started | None = None
    finished: frames_pb2.Finished | None = None
    failed: frames_pb2.Failed | None = None
    terminals: int = 0
    delta_tokens: list[int] = field(default_factory=list)
    thoughts: dict[int, str] = field(default_factory=dict)
    calls: dict[int, list[tuple[str, str]]] = field(default_factory=dict)
    #: What came, in order, of the first answer: "thinking", "text", "call".
    kinds: list[str] = field(default_factory=list)

    @property
    def thinking(self) -> str:
        """The thoughts of the first answer."""
        return self.thoughts.get(0, "")

    @property
    def text(self) -> str:
        return "".join(self.texts)

    def choice_text(self, number: int) -> str:
        return "".join(self.choices.get(number, ()))

    @property
    def done(self) -> frames_pb2.Finished:
        assert self.finished is not None, f"it failed: {self.failed}"
        return self.finished

    @property
    def failure(self) -> frames_pb2.Failed:
        assert self.failed is not None, f"it did not fail: {self.finished}"
        return self.failed


class RunnerProcess:
    """A runner, started and spoken to; a context manager that ends it."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        self._log = tempfile.TemporaryFile()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "lmd.runner.main", "--fd", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._log,
            )
        self.socket = ours
        self._incoming = bytearray()
        self._next_id = 0
        self.answers: dict[int, Answer] = defaultdict(Answer)
        self.hello: frames_pb2.Hello | None = None
        self.ready: frames_pb2.Ready | None = None
        self.load_failed: frames_pb2.LoadFailed | None = None
        self.progress: list[float] = []
        self.pongs: list[frames_pb2.Pong] = []
        self.replies: dict[int, frames_pb2.RunnerFrame] = {}
        self.frames = 0
        self.ended: list[int] = []
        self.queue: list[int] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            sys.stderr.write(self.log())
        self.close()

    def close(self) -> None:
        self.socket.close()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._log.close()

    def log(self) -> str:
        self._log.seek(0)
        return self._log.read().decode(errors="replace")

    # Sending

    def send(self, frame: frames_pb2.DaemonFrame) -> None:
        data = frame.SerializeToString()
        self.socket.sendall(struct.pack(">I", len(data)) + data)

    def load(
        self,
        *paths: Path,
        num_ctx: int = 256,
        slots: int = 4,
        num_batch: int = 64,
        num_thread: int = 1,
        template: str = "",
        max_prompt_bytes: int = 1 << 20,
        template_timeout_s: float = 1.0,
        use_mmap: bool = True,
        manifest_chat: frames_pb2.Chat | None = None,
        kv_dir: Path | None = None,
        kv_dir_bytes: int = 1 << 30,
        kv_ram_bytes: int = 1 << 30,
        kv_type: str = "",
        adapters: Sequence[tuple[Path, float]] = (),
    ) -> frames_pb2.Ready:
        """Load and return `ready`, or fail with what the runner says."""
        self.ask_load(
            *paths,
            num_ctx=num_ctx,
            slots=slots,
            num_batch=num_batch,
            num_thread=num_thread,
            template=template,
            max_prompt_bytes=max_prompt_bytes,
            template_timeout_s=template_timeout_s,
            use_mmap=use_mmap,
            manifest_chat=manifest_chat,
            kv_dir=str(kv_dir or ""),
            kv_dir_bytes=kv_dir_bytes,
            kv_ram_bytes=kv_ram_bytes,
            kv_type=kv_type,
            adapters=adapters,
        )
        self.until(lambda: self.ready is not None or self.load_failed is not None)
        assert self.ready is not None, str(self.load_failed)
        return self.ready

    def ask_load(
        self,
        *paths: Path,
        manifest_chat: frames_pb2.Chat | None = None,
        draft_paths: Sequence[str] = (),
        adapters: Sequence[tuple[Path, float]] = (),
        devices: Sequence[frames_pb2.DevicePart] = (),
        **options: int | float | str | bool,
    ) -> None:
        load = frames_pb2.Load(
            model_paths=[str(path) for path in paths],
            num_gpu=-1,
            manifest_chat=manifest_chat,
            draft_paths=draft_paths,
            devices=devices,
        )
        load.adapters.extend(frames_pb2.Adapter(path=str(path), scale=scale) for path, scale in adapters)
        for name, value in options.items():
            setattr(load, name, value)
        self.send(frames_pb2.DaemonFrame(load=load))

    def submit(
        self,
        prompt: str | None = None,
        *,
        chat: Sequence[tuple[str, str]] | frames_pb2.Chat | None = None,
        scope: str = "",
        stop: Sequence[str] = (),
        options: Mapping[str, Any] | None = None,
        **sampling: Any,
    ) -> int:
        """Submit a request, greedy unless *sampling* says otherwise; *options* are other fields. Return its id."""
        self._next_id += 1
        submit = frames_pb2.Submit(
            request_id=self._next_id,
            cache_scope=scope,
            sampling=frames_pb2.Sampling(stop=stop, **{**_GREEDY, **sampling}),
            **(options or {}),
        )
        if isinstance(chat, frames_pb2.Chat):
            submit.chat.CopyFrom(chat)
        elif chat is not None:
            submit.chat.messages.extend(frames_pb2.ChatMessage(role=role, content=content) for role, content in chat)
        if prompt is not None:
            submit.prompt = prompt
        self.send(frames_pb2.DaemonFrame(submit=submit))
        return self._next_id

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stop the process, so that all that is sent meanwhile, up to some 100 kB, arrives at once."""
        self.process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.process.send_signal(signal.SIGCONT)

    def start_call(self, frame: frames_pb2.DaemonFrame) -> int:
        """Send a request that has one reply, under a new id; return that."""
        self._next_id += 1
        getattr(frame, frame.WhichOneof("frame") or "").request_id = self._next_id
        self.send(frame)
        return self._next_id

    def reply(self, request_id: int) -> frames_pb2.RunnerFrame:
        """Wait for the reply to a call: of its kind, or `failed`."""
        self.until(lambda: request_id in self.replies or self.answers[request_id].terminals > 0)
        if request_id in self.replies:
            return self.replies[request_id]
        return frames_pb2.RunnerFrame(failed=self.answers[request_id].failure)

    def call(self, **frame: Any) -> frames_pb2.RunnerFrame:
        """Send a request, such as `tokenize=Tokenize(...)`, and wait for its reply."""
        return self.reply(self.start_call(frames_pb2.DaemonFrame(**frame)))

    def embed(self, *inputs: str, **options: Any) -> frames_pb2.Embedded:
        """Embed texts, or rank them with `query`."""
        reply = self.call(embed=frames_pb2.Embed(inputs=inputs, **options))
        assert reply.HasField("embedded"), str(reply)
        return reply.embedded

    def cancel(self, request_id: int) -> None:
        self.send(frames_pb2.DaemonFrame(cancel=frames_pb2.Cancel(request_id=request_id)))

    def drain(self, *, save_s: float = 0) -> None:
        self.send(frames_pb2.DaemonFrame(drain=frames_pb2.Drain(save_ms=round(save_s * 1000))))

    def ping(self) -> frames_pb2.Pong:
        """Ping and return the answer."""
        count = len(self.pongs)
        self.send(frames_pb2.DaemonFrame(ping=frames_pb2.Ping(nonce=count)))
        self.until(lambda: len(self.pongs) > count)
        return self.pongs[-1]

    # Receiving

    def until(self, condition: Callable[[], bool]) -> None:
        """Take in frames until *condition* holds."""
        deadline = time.monotonic() + _DEADLINE_S
        while not condition():
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self.socket], [], [], left)[0]:
                raise TimeoutError("the runner sends nothing that was waited for")
            self.take()

    def take(self) -> None:
        """Take in what has arrived; wait if nothing has."""
        data = self.socket.recv(1 << 20)
        if not data:
            raise EOFError("the runner hung up")
        self._incoming += data
        while len(self._incoming) >= 4:
            length = int.from_bytes(self._incoming[:4], "big")
            if len(self._incoming) < 4 + length:
                break
            self._dispatch(frames_pb2.RunnerFrame.FromString(bytes(self._incoming[4 : 4 + length])))
            del self._incoming[: 4 + length]

    def answer(self, request_id: int) -> Answer:
        """Wait for a request to end."""
        self.until(lambda: self.answers[request_id].terminals > 0)
        return self.answers[request_id]

    def ask(
        self,
        prompt: str | None = None,
        *,
        chat: Sequence[tuple[str, str]] | frames_pb2.Chat | None = None,
        scope: str = "",
        stop: Sequence[str] = (),
        options: Mapping[str, Any] | None = None,
        **sampling: Any,
    ) -> Answer:
        """Submit a request and wait for it to end."""
        return self.answer(self.submit(prompt, chat=chat, scope=scope, stop=stop, options=options, **sampling))

    def wait(self) -> int:
        """Wait for the process to end."""
        return self.process.wait(_DEADLINE_S)

    def _dispatch(self, frame: frames_pb2.RunnerFrame) -> None:
        self.frames += 1
        kind = frame.WhichOneof("frame")
        if kind == "started":
            answer = self.answers[frame.started.request_id]
            assert answer.started is None
            answer.started = frame.started
        elif kind == "delta":
            answer = self.answers[frame.delta.request_id]
            assert answer.started is not None, "text before `started`"
            assert answer.terminals == 0, "text after the end"
            delta = frame.delta
            assert delta.text or delta.logprobs or delta.thinking or delta.tool_calls, "an empty delta"
            answer.thoughts[delta.choice] = answer.thoughts.get(delta.choice, "") + delta.thinking
            answer.calls.setdefault(delta.choice, []).extend((call.name, call.arguments) for call in delta.tool_calls)
            if delta.choice == 0:
                there = (("thinking", delta.thinking), ("text", delta.text), ("call", delta.tool_calls))
                answer.kinds += [kind for kind, value in there if value]
            answer.texts.append(frame.delta.text)
            answer.choices.setdefault(frame.delta.choice, []).append(frame.delta.text)
            answer.logprobs.extend(frame.delta.logprobs)
            answer.delta_tokens.append(frame.delta.generated_tokens)
        elif kind == "finished":
            answer = self.answers[frame.finished.request_id]
            answer.finished = frame.finished
            answer.terminals += 1
            self.ended.append(frame.finished.request_id)
        elif kind == "failed":
            answer = self.answers[frame.failed.request_id]
            answer.failed = frame.failed
            answer.terminals += 1
            self.ended.append(frame.failed.request_id)
        elif kind == "queue":
            self.queue = list(frame.queue.request_ids)
        elif kind in ("embedded", "tokenized", "detokenized", "rendered"):
            request_id = getattr(frame, kind).request_id
            assert request_id not in self.replies, "a second reply"
            self.replies[request_id] = frame
            self.ended.append(request_id)
        elif kind == "pong":
            self.pongs.append(frame.pong)
        elif kind == "hello":
            self.hello = frame.hello
        elif kind == "ready":
            self.ready = frame.ready
        elif kind == "load_progress":
            self.progress.append(frame.load_progress.fraction)
        elif kind == "load_failed":
            self.load_failed = frame.load_failed

    def children(self) -> list[int]:
        """Return the process ids of the runner's children."""
        tasks = Path(f"/proc/{self.process.pid}/task")
        return [int(pid) for task in os.listdir(tasks) for pid in (tasks / task / "children").read_text().split()]
