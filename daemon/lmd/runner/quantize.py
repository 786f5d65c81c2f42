"""The process that quantizes or measures a model: `python -m lmd.runner.quantize`, started by the daemon.

It reads one job, a line of JSON, from its standard input and writes events, one a line, to its standard output:

    {"event": "tensor", "name": "output.weight"}    its conversion begins
    {"event": "read", "done": 3, "of": 8}           windows of a text
    {"event": "checking"}
    {"event": "done", ...what `measure` found}
    {"event": "failed", "message": "…", "out_of_memory": false}

A model that cannot be trusted is read here, so it has given up its rights before. It sees the files of its view alone
and writes one of them. The end of its standard input is the end of its daemon, which the kernel has it follow.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lmd.runner.confine import drop_rights, never_block_on_stderr, tie_to_parent
from lmd.runner.log import install_log
from lmd.runner.measure import MeasureFailed, Measurement, measure
from lmd.runner.native import load_bindings
from lmd.runner.threads import usable_cores
from lmd.runner.weights import load_weights

EXIT_OK, EXIT_FAILED = 0, 1

_WARN, _ERROR, _CONTINUED = 3, 4, 5
_KEPT_ERRORS = 4
_CHECK_TOKENS = 32
_TENSOR = re.compile(rb"\[ *\d+/ *\d+\] (\S+)")
_OUT_OF_MEMORY = re.compile(rb"out of memory|unable to allocate|failed to allocate|bad_alloc|cannot allocate", re.I)


class JobFailed(Exception):
    """Raised with the engine's own words when it cannot do what it is asked for."""


@dataclass(frozen=True, slots=True)
class ImatrixEntry:
    """Where the importance of one tensor's columns lies in its file: sums of squares, and how often they were seen.

    *columns* weights of a row share the count of their matrix; there are as many counts as matrices (experts).
    """

    name: str
    sums_offset: int
    counts_offset: int
    columns: int
    matrices: int


class _Log:
    """Turns what llama.cpp says into progress; keeps errors for the message, passes warnings on."""

    def __init__(self, llama: Any) -> None:
        self.errors: list[str] = []
        self.out_of_memory = False
        self._level = _WARN
        install_log(llama, self._receive)

    def _receive(self, level: int, text: bytes, _user_data: object) -> None:
        level = self._level if level == _CONTINUED else level
        self._level = level
        if match := _TENSOR.match(text):
            _tell("tensor", name=match[1].decode(errors="replace"))
        if level < _WARN:
            return
        with contextlib.suppress(OSError):
            os.write(2, text)
        if level >= _ERROR:
            self.out_of_memory |= _OUT_OF_MEMORY.search(text) is not None
            line = text.decode(errors="replace").strip()
            if line:
                self.errors = [*self.errors, line.split(": ", 1)[-1]][-_KEPT_ERRORS:]

    def words(self) -> str:
        """Return the last errors in one line."""
        return "; ".join(dict.fromkeys(self.errors)) or "the engine gives no reason"


def _tell(event: str, **values: object) -> None:
    """Write an event; a daemon that does not listen any more is no failure of the job."""
    with contextlib.suppress(OSError):
        os.write(1, json.dumps({"event": event, **values}).encode() + b"\n")


def quantize(llama: Any, log: _Log, job: dict[str, Any]) -> None:
    """Quantize the model of the job into its output, then load the result.

    Raises:
        JobFailed: the engine refuses.
    """
    params = llama.llama_model_quantize_default_params()
    # Hyper-threads help here, unlike in answers: as many as `llama-quantize` takes.
    params.nthread = len(os.sched_getaffinity(0))
    params.ftype = int(job["ftype"])
    params.allow_requantize = bool(job["requantize"])
    params.max_buf_size = int(job["buffer_bytes"])
    if job["imatrix"]:
        entries = [ImatrixEntry(**entry) for entry in job["imatrix_entries"]]
        params.imatrix, _kept = _importance(llama, str(job["imatrix"]), entries)
    if llama.llama_model_quantize(job["inputs"][0].encode(), job["output"].encode(), params) != 0:
        raise JobFailed(log.words())
    _tell("checking")
    _check(llama, log, [str(job["output"])])


def _importance(llama: Any, path: str, entries: Sequence[ImatrixEntry]) -> tuple[Any, list[Any]]:
    """Return the list that the engine takes, ended by an empty item, and what must live as long as it."""
    import numpy as np

    items = (llama.llama_model_imatrix_data * (len(entries) + 1))()
    kept: list[Any] = [items]
    with open(path, "rb") as file:
        for item, entry in zip(items, entries, strict=False):  # the last stays empty
            sums = np.fromfile(file, "<f4", entry.columns * entry.matrices, offset=entry.sums_offset - file.tell())
            counts = np.fromfile(file, "<f4", entry.matrices, offset=entry.counts_offset - file.tell())
            if len(sums) != entry.columns * entry.matrices or len(counts) != entry.matrices:
                raise JobFailed("the importance matrix is cut short")
            rows = sums.reshape(entry.matrices, entry.columns)
            seen = counts.reshape(entry.matrices, 1)
            # A matrix that no text came through has no say: all its columns count alike.
            values = np.ascontiguousarray(np.where(seen > 0, rows / np.where(seen > 0, seen, 1), 1), dtype=np.float32)
            if not np.isfinite(values).all():
                raise JobFailed(f"the importance matrix has a value for {entry.name} that is no number")
            item.name = entry.name.encode()
            item.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
            item.size = values.size
            kept.append(values)
    return items, kept


def _check(llama: Any, log: _Log, paths: Sequence[str]) -> None:
    """Load the result, and have it read a few tokens when it is a model that generates.

    Raises:
        JobFailed: it does not load, or its scores are no numbers.
    """
    log.errors = []
    # A single batch is read: rearranging all weights for it took longer than the rest of the check, but the tokenizer.
    native = load_weights(llama, paths, num_gpu=0, use_mmap=True, on_progress=lambda fraction: True, rearrange=False)
    if not native:
        raise JobFailed(f"the result does not load: {log.words()}")
    if llama.llama_model_has_encoder(native) or not llama.llama_model_has_decoder(native):
        return
    params = llama.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = _CHECK_TOKENS
    params.no_perf = True
    context = llama.llama_init_from_model(native, params)
    if not context:
        raise JobFailed(f"the result does not load: {log.words()}")
    vocab = llama.llama_model_get_vocab(native)
    tokens = (ctypes.c_int32 * 1)(max(int(llama.llama_vocab_bos(vocab)), 0))
    if not llama.llama_get_memory(context):
        return  # it only embeds
    if llama.llama_decode(context, llama.llama_batch_get_one(tokens, 1)) != 0:
        raise JobFailed(f"the result does not run: {log.words()}")
    scores = llama.llama_get_logits_ith(context, -1)
    if scores and not all(math.isfinite(scores[i]) for i in range(int(llama.llama_vocab_n_tokens(vocab)))):
        raise JobFailed("the result gives scores that are no numbers")


def _measured(llama: Any, log: _Log, job: dict[str, Any]) -> Measurement:
    try:
        return measure(llama, job["inputs"], str(job["text"]), usable_cores(), _tell_share)
    except MeasureFailed as error:
        raise JobFailed(f"{error}: {log.words()}" if log.errors else str(error)) from None


def _tell_share(done: int, total: int) -> None:
    _tell("read", done=done, of=total)


def run(job: dict[str, Any]) -> int:
    """Do the job; return the exit status."""
    llama = load_bindings()
    log = _Log(llama)
    llama.llama_backend_init()
    try:
        if job["do"] == "quantize":
            quantize(llama, log, job)
            _tell("done")
        else:
            found = _measured(llama, log, job)
            _tell(
                "done",
                perplexity=found.perplexity,
                tokens=found.tokens,
                prompt_tokens_per_s=found.prompt_tokens_per_s,
                answer_tokens_per_s=found.answer_tokens_per_s,
            )
    except (JobFailed, MemoryError, OSError) as error:
        _tell("failed", message=str(error), out_of_memory=log.out_of_memory or isinstance(error, MemoryError))
        return EXIT_FAILED
    return EXIT_OK


def main() -> int:
    """Run the process; return its exit status."""
    tie_to_parent()
    drop_rights()
    never_block_on_stderr()
    line = sys.stdin.readline()
    if not line.endswith("\n"):
        return EXIT_OK  # the daemon is gone
    return run(json.loads(line))


if __name__ == "__main__":
    status = main()
    with contextlib.suppress(OSError):
        sys.stderr.flush()
    # Taking native state apart has nothing to give back that the kernel does not take anyway, and takes time.
    os._exit(status)
