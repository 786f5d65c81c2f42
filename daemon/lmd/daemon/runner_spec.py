"""What a runner is started with: command, environment, view of the store, deadlines."""

from __future__ import annotations

import itertools
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lmd.registry.errors import BlobMissing

RUNNER_COMMAND = (sys.executable, "-P", "-m", "lmd.runner.main")

#: What a runner may know of our environment: how to find Python's and the accelerator's libraries, nothing secret.
INHERITED_VARIABLES = frozenset(
    {"HOME", "LANG", "LC_ALL", "LC_CTYPE", "LD_LIBRARY_PATH", "PATH", "TMPDIR", "TZ", "VIRTUAL_ENV"}
    | {"CUDA_DEVICE_ORDER", "CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES"}
    | {"HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HSA_OVERRIDE_GFX_VERSION", "GGML_VK_VISIBLE_DEVICES"}
    | {"ONEAPI_DEVICE_SELECTOR", "ZES_ENABLE_SYSMAN", "VK_DRIVER_FILES", "VK_ICD_FILENAMES"}
)


@dataclass(frozen=True, slots=True)
class RunnerTimings:
    """Deadlines of a runner's life, in seconds."""

    #: From spawn to `hello`: Python starts and imports.
    hello_s: float = 60.0
    #: A load whose fraction does not grow for so long is ended.
    load_stall_s: float = 300.0
    #: Between pings.
    ping_interval_s: float = 5.0
    #: A ready runner that leaves a ping unanswered for so long is hung. One step of the engine on a big prompt may
    #: take seconds, and the pong waits for it.
    hang_s: float = 60.0
    #: From TERM to KILL, and from the end of the link to the end of the process.
    term_s: float = 5.0


@dataclass(frozen=True, slots=True)
class RunnerSpec:
    """What to start: the model's name for messages, its GGUF files with all shards in order, where things lie.

    *draft* are the files of the model that drafts for it, all shards in order; () for none. So are *adapters*. Without
    weights it describes a spare: a runner that waits for a model.
    """

    name: str
    weights: tuple[Path, ...]
    views_dir: Path
    log_path: Path
    command: Sequence[str] = RUNNER_COMMAND
    timings: RunnerTimings = RunnerTimings()
    draft: tuple[Path, ...] = ()
    adapters: tuple[Path, ...] = ()


def runner_environment(env: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a runner: an allow-list, with import paths made absolute because the child moves."""
    kept = {name: value for name, value in env.items() if name in INHERITED_VARIABLES}
    if env.get("PYTHONPATH"):
        kept["PYTHONPATH"] = os.pathsep.join(os.path.abspath(part) for part in env["PYTHONPATH"].split(os.pathsep))
    return kept


def view_names(count: int, stem: str = "model") -> list[str]:
    """Return the names that *count* files have in a view; the engine finds shards by their numbering."""
    if count == 1:
        return [f"{stem}.gguf"]
    return [f"{stem}-{number:05d}-of-{count:05d}.gguf" for number in range(1, count + 1)]


def draft_names(count: int) -> list[str]:
    """Return the names that the *count* files of a draft have in a view."""
    return view_names(count, "draft")


def adapter_names(count: int) -> list[str]:
    """Return the names that *count* adapters have in a view."""
    return [f"adapter-{number}.gguf" for number in range(1, count + 1)]


def make_view(
    views_dir: Path, weights: Sequence[Path], draft: Sequence[Path] = (), adapters: Sequence[Path] = ()
) -> Path:
    """Create a private directory with links to *weights*, *draft* and *adapters*: all that a runner sees of the store.

    Raises:
        BlobMissing: a file is not there any more.
    """
    check_files(weights, draft, adapters)
    views_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    view = Path(tempfile.mkdtemp(prefix="view-", dir=views_dir))
    fill_view(view, weights, draft, adapters)
    return view


def check_files(*groups: Sequence[Path]) -> None:
    """Raise `BlobMissing` when a file is not there any more."""
    for path in itertools.chain(*groups):
        if not path.is_file():
            raise BlobMissing(f"sha256:{path.name}")


def fill_view(view: Path, weights: Sequence[Path], draft: Sequence[Path] = (), adapters: Sequence[Path] = ()) -> None:
    """Put the links of a model into an empty view."""
    names = [*view_names(len(weights)), *draft_names(len(draft)), *adapter_names(len(adapters))]
    for name, path in zip(names, (*weights, *draft, *adapters), strict=True):
        (view / name).symlink_to(path)
