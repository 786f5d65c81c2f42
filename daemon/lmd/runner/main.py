"""The process of one loaded model: `python -m lmd.runner.main --fd N`, started by the daemon.

Its standard error carries what the engine complains about. Exit status: 0 after a drain or when the daemon is gone, 1
when the model could not be loaded, 2 when the daemon broke the protocol.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import select
import socket
import sys
import time
from pathlib import Path

from lmd.runner.background import Background
from lmd.runner.channel import Channel
from lmd.runner.confine import drop_rights, never_block_on_stderr, tie_to_parent
from lmd.runner.draft import load_draft
from lmd.runner.engine import Engine
from lmd.runner.kv_state import SequenceState, fingerprint
from lmd.runner.kv_types import is_known
from lmd.runner.log import EngineLog
from lmd.runner.model import LoadError, Model
from lmd.runner.native import engine_version, load_bindings
from lmd.runner.prompts import PromptMaker
from lmd.runner.saved_prefixes import SavedPrefixes
from lmd.runner.templates import TemplateSetup
from lmd.runner.v1 import frames_pb2
from lmd.runner.weights import LoadAborted
from lmd.runner.wire import WireClosed, WireError

EXIT_OK, EXIT_LOAD_FAILED, EXIT_PROTOCOL = 0, 1, 2

_MAX_SLOTS = 64
_PROGRESS_STEP = 0.01
_LAST_WORDS_S = 5.0

_DEFAULT_PROMPT_BYTES = 16 << 20
_DEFAULT_TEMPLATE_TIMEOUT_S = 5.0


class _Loading:
    """Keeps the connection alive while the engine loads, which blocks the only thread."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._reported = -1.0
        self.error: WireClosed | WireError | None = None

    def progress(self, fraction: float) -> bool:
        """Report progress, answer pings; return false when the daemon is gone or wants no more of this."""
        try:
            for message in self._channel.receive():
                kind = message.WhichOneof("frame")
                if kind == "drain":
                    return False
                if kind == "ping":
                    pong = frames_pb2.Pong(nonce=message.ping.nonce)
                    self._channel.send(frames_pb2.RunnerFrame(pong=pong))
                else:
                    raise WireError(f"a frame of kind {kind} before the model is ready")
            if fraction - self._reported >= _PROGRESS_STEP or (fraction >= 1 > self._reported):
                self._reported = fraction
                progress = frames_pb2.LoadProgress(fraction=fraction)
                self._channel.send(frames_pb2.RunnerFrame(load_progress=progress))
            self._channel.flush()
        except (WireClosed, WireError) as error:
            # Nothing can be raised through the engine that calls this.
            self.error = error
            return False
        return True


def _await_load(channel: Channel) -> frames_pb2.Load:
    """Say hello and return what to load."""
    poll = select.poll()
    while True:
        channel.flush()
        poll.register(channel, select.POLLIN | (select.POLLOUT if channel.has_unsent else 0))
        poll.poll()
        for message in channel.receive():
            kind = message.WhichOneof("frame")
            if kind == "load":
                return _checked(message.load)
            if kind != "ping":
                raise WireError(f"a frame of kind {kind} before `load`")
            channel.send(frames_pb2.RunnerFrame(pong=frames_pb2.Pong(nonce=message.ping.nonce)))


def _checked(load: frames_pb2.Load) -> frames_pb2.Load:
    if not load.model_paths or load.num_ctx < 1 or load.num_batch < 1 or not 1 <= load.slots <= _MAX_SLOTS:
        raise WireError("`load` lacks a path, or a number is out of its range")
    if not is_known(load.kv_type):
        raise WireError(f"`load` names the type {load.kv_type!r} for keys and values, which there is not")
    return load


def _flush_all(channel: Channel) -> None:
    """Send what is left, waiting for the daemon to read it, but not for ever."""
    poll = select.poll()
    poll.register(channel, select.POLLOUT)
    deadline = time.monotonic() + _LAST_WORDS_S
    while channel.has_unsent and time.monotonic() < deadline:
        poll.poll(_LAST_WORDS_S * 1000)
        channel.flush()


def _template_setup(model: Model, load: frames_pb2.Load) -> TemplateSetup:
    vocab = model.vocab
    return TemplateSetup(
        template=model.template,
        bos_token=vocab.text_of(vocab.bos),
        eos_token=vocab.text_of(vocab.eos),
        max_bytes=load.max_prompt_bytes or _DEFAULT_PROMPT_BYTES,
        timeout_s=load.template_timeout_s or _DEFAULT_TEMPLATE_TIMEOUT_S,
    )


def _saved_prefixes(model: Model, load: frames_pb2.Load) -> SavedPrefixes | None:
    if not load.kv_dir or not model.generates:
        return None
    made_by = fingerprint(
        model.llama,
        model.native,
        model.context,
        engine_version(),
        flash_attention=model.flash_attention,
        kv_type=model.kv_type,
        # The directory is one manifest's, which names the adapters.
        adapters=model.adapters.scales,
    )
    return SavedPrefixes.open(
        Path(load.kv_dir),
        load.kv_dir_bytes,
        SequenceState(model.llama, model.context),
        made_by,
        divisible=model.memory.shares_freely,
    )


def serve(connection: socket.socket) -> int:
    """Load what the daemon says and serve until it is over; return the exit status.

    Raises:
        WireClosed: the daemon is gone.
        WireError: it broke the protocol.
    """
    channel = Channel(connection)
    llama = load_bindings()
    log = EngineLog(llama)
    llama.llama_backend_init()
    hello = frames_pb2.Hello(
        pid=os.getpid(), engine_version=engine_version(), gpu_offload=bool(llama.llama_supports_gpu_offload())
    )
    channel.send(frames_pb2.RunnerFrame(hello=hello))
    load = _await_load(channel)
    loading = _Loading(channel)
    try:
        model = Model(llama, log, load, loading.progress)
        draft = load_draft(
            llama,
            log,
            load,
            num_ctx=model.num_ctx,
            step_tokens=model.step_tokens,
            threads=model.threads,
            target_bytes=model.weights_bytes,
            placement=model.placement,
            on_progress=loading.progress,
        )
    except LoadError as error:
        failed = frames_pb2.LoadFailed(kind=error.kind, message=str(error))
        channel.send(frames_pb2.RunnerFrame(load_failed=failed))
        _flush_all(channel)
        return EXIT_LOAD_FAILED
    except LoadAborted:
        if loading.error is not None:
            raise loading.error from None
        return EXIT_OK
    channel.send(frames_pb2.RunnerFrame(ready=model.ready()))
    log.settled = True
    background = Background()
    prompts = PromptMaker(
        model.vocab,
        _template_setup(model, load),
        background,
        num_ctx=model.num_ctx,
        manifest_chat=load.manifest_chat,
    )
    try:
        Engine(model, channel, prompts, background, draft_model=draft, saved=_saved_prefixes(model, load)).run()
    finally:
        prompts.close()
        background.close()
    return EXIT_OK


def main() -> int:
    """Run the process; return its exit status."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--fd", type=int, required=True, help="the daemon's socket, inherited under this number")
    options = parser.parse_args()
    tie_to_parent()
    drop_rights()
    never_block_on_stderr()
    connection = socket.socket(fileno=options.fd)
    connection.set_inheritable(False)
    try:
        return serve(connection)
    except WireClosed:
        # Also when the daemon died before the kernel was told to end this process with it.
        return EXIT_OK
    except WireError as error:
        sys.stderr.write(f"lmd-runner: the daemon sent {error}\n")
        return EXIT_PROTOCOL


if __name__ == "__main__":
    status = main()
    with contextlib.suppress(OSError):
        sys.stderr.flush()
    # Taking native state apart has nothing to give back that the kernel does not take anyway, and takes time.
    os._exit(status)
