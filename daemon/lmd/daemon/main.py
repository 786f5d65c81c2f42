"""`lmd`: the daemon in the foreground. The only module of the daemon that reads arguments and the environment."""

from __future__ import annotations

import asyncio
import logging
import os
import pwd
import sys
import threading
import time
from collections.abc import Callable, MutableMapping
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lmd.daemon import logs
from lmd.daemon.config_file import ConfigError, load_config
from lmd.registry.errors import DiskFull, LmdError
from lmd.v1.version import __version__

if TYPE_CHECKING:
    from lmd.daemon.lifecycle import MakeApplication

EXIT_FAILED = 1
EXIT_USAGE = 2

#: How long threads may take to notice that everything has ended.
THREADS_END_S = 3.0

#: What concerns this process alone: no child may believe it is meant.
_OURS_ALONE = (
    "CREDENTIALS_DIRECTORY",
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "LISTEN_FDNAMES",
    "LISTEN_FDS",
    "LISTEN_PID",
    "NOTIFY_SOCKET",
    "WATCHDOG_PID",
    "WATCHDOG_USEC",
)


@click.command(name="lmd", context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--config",
    "config_file",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Read this configuration file (also LMD_CONFIG).",
)
@click.option(
    "--home",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="Keep everything below this directory: configuration, store, sockets, logs (also LMD_HOME).",
)
@click.option("--check-config", is_flag=True, help="Check the configuration, and end.")
@click.version_option(__version__, prog_name="lmd", message="%(prog)s %(version)s")
def main(config_file: Path | None, home: Path | None, check_config: bool) -> None:
    """Serve local language models until told to stop.

    SIGTERM or Ctrl-C lets running answers finish; a second one does not.
    """
    sys.exit(launch(os.environ, _make_application, config_file=config_file, home=home, check_only=check_config))


def launch(
    environ: MutableMapping[str, str],
    application: Callable[[], MakeApplication],
    *,
    config_file: Path | None = None,
    home: Path | None = None,
    check_only: bool = False,
) -> int:
    """Run the daemon and return its exit status: 0, 1 when it cannot run, 2 when its configuration is wrong.

    *application* is called, and with it most modules are imported, only once the configuration is good.
    """
    env = dict(environ)
    for name in _OURS_ALONE:
        environ.pop(name, None)
    # gRPC's own log repeats to standard error what clients do; and its fork handlers only get in the way of children
    # that exec at once. Both are read when gRPC is imported.
    environ.setdefault("GRPC_VERBOSITY", "ERROR")
    environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"
    # Nothing the daemon makes is for others, unless it says so.
    os.umask(0o077)
    uid = os.getuid()
    user_home = Path(env.get("HOME") or _home_of(uid))
    try:
        config = load_config(env, uid=uid, user_home=user_home, config_file=config_file, home=home)
    except ConfigError as error:
        for problem in error.problems:
            click.echo(f"error: {problem}", err=True)
        click.echo("\nhint: `lmd --check-config` checks again without starting", err=True)
        return EXIT_USAGE
    if check_only:
        click.echo(f"the configuration is good ({config.file or 'defaults, no file'})")
        return 0
    try:
        log_file = logs.configure(config.log, config.dirs.log, env, sys.stderr)
    except OSError as error:
        return _failed(LmdError(f"cannot write the log {error.filename}: {error.strerror}"), logged=False)

    from lmd.daemon.lifecycle import Lifecycle

    try:
        asyncio.run(Lifecycle(config, env, application()).run())
    except LmdError as error:
        if isinstance(error, DiskFull):
            error.hint = "make room there, then start the daemon again"  # only a running one can remove models
        return _failed(error, logged=log_file is not None)
    except OSError as error:
        where = f" in {error.filename}" if error.filename else ""
        unusable = LmdError(
            f"cannot start{where}: {error.strerror or error}",
            hint="set `LMD_HOME` (or `--home`) to a directory that this user can write to",
        )
        return _failed(unusable, logged=log_file is not None)
    except Exception:  # the last boundary: a defect ends up in the log, whoever reads it
        logging.getLogger(__name__).critical("daemon_crashed", exc_info=True)
        return _end(EXIT_FAILED)
    return _end(0)


def _failed(error: LmdError, *, logged: bool) -> int:
    """Say why the daemon does not run: to whoever started it, and to the log when that is elsewhere."""
    click.echo(f"error: {error.message}", err=True)
    if error.hint:
        click.echo(f"\nhint: {error.hint}", err=True)
    if logged:
        logging.getLogger(__name__).critical("start_failed: %s", error.message)
    return _end(EXIT_FAILED)


def _end(status: int) -> int:
    """Return *status*; or leave at once when a thread still hangs in a system call that nobody can interrupt."""
    deadline = time.monotonic() + THREADS_END_S
    others = [t for t in threading.enumerate() if t is not threading.main_thread() and not t.daemon]
    for thread in others:
        thread.join(max(deadline - time.monotonic(), 0))
    if any(thread.is_alive() for thread in others):
        logging.getLogger(__name__).warning("threads_left_behind")
        logging.shutdown()
        sys.stderr.flush()
        os._exit(status)
    return status


def _home_of(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_dir
    except KeyError:
        return "/"


def _make_application() -> MakeApplication:
    from lmd.daemon.app import Application

    return Application


if __name__ == "__main__":
    main(prog_name="lmd")
