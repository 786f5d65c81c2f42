"""Structured logs: for people on a terminal, with priorities for the journal, as JSON lines elsewhere.

Tracebacks never show the values of local variables: those hold prompts and tokens.
"""

from __future__ import annotations

import logging
import logging.config
import os
import re
import stat
from collections.abc import Mapping
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any, Literal, TextIO

import structlog
from structlog.typing import EventDict, Processor

from lmd.daemon.config import LogConfig

Format = Literal["console", "json", "journal"]

FILE_NAME = "lmd.log"
MAX_FILE_BYTES = 10 * 1024 * 1024
KEPT_FILES = 3

#: syslog(3) priorities, which the journal reads from a prefix of each line (sd-daemon(3)).
_PRIORITY = {"debug": 7, "info": 6, "warning": 4, "error": 3, "critical": 2}

_SECRET_NAME = re.compile(r"token$|secret|password|authorization|cookie|^prompt$", re.IGNORECASE)


def configure(config: LogConfig, log_dir: Path, env: Mapping[str, str], stderr: TextIO) -> Path | None:
    """Set up logging for the whole process; return the file that is written, if any.

    Standard error is the place, unless `log.file` names another, or nobody would see it: when it is the null device,
    or already is our own log file (`lm` starts a daemon so), the file is written directly and rotated.
    """
    file = config.file or _unseen(stderr, log_dir / FILE_NAME)
    chosen: Format
    if config.format == "auto":
        chosen = "json" if file else _fitting(env, stderr)
    else:
        chosen = config.format
    handler: logging.Handler
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        handler = RotatingFileHandler(file, maxBytes=MAX_FILE_BYTES, backupCount=KEPT_FILES, encoding="utf-8")
        file.chmod(0o600)
    else:
        handler = logging.StreamHandler(stderr)
    handler.setFormatter(_formatter(chosen, colors=file is None and stderr.isatty()))
    logging.raiseExceptions = False  # a log that cannot be written must not write about it
    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
        old.close()
    root.addHandler(handler)
    root.setLevel(config.level.upper())
    # Chatty below warning, and their debug output shows URLs with signatures.
    for name in ("asyncio", "filelock", "huggingface_hub", "httpcore2", "httpx2", "watchdog"):
        logging.getLogger(name).setLevel(logging.WARNING)
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *_shared_processors(),
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )
    return file


def _shared_processors() -> list[Processor]:
    return [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.PositionalArgumentsFormatter(),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        hide_secrets,
    ]


def hide_secrets(_logger: Any, _method: str, event: EventDict) -> EventDict:
    """Replace the text of fields that look like secrets; a last net, nothing should get this far."""
    for name, value in event.items():
        if isinstance(value, str | bytes) and _SECRET_NAME.search(name):
            event[name] = "***"
    return event


def _unseen(stderr: TextIO, own: Path) -> Path | None:
    """Return *own* when what is written to *stderr* is lost, or ends up in *own* anyway."""
    try:
        found = os.fstat(stderr.fileno())
        null = stat.S_ISCHR(found.st_mode) and found.st_rdev == os.stat(os.devnull).st_rdev
        if null or (stat.S_ISREG(found.st_mode) and own.exists() and os.path.samestat(found, own.stat())):
            return own
    except (OSError, ValueError):  # closed
        return own
    return None


def _fitting(env: Mapping[str, str], stderr: TextIO) -> Format:
    """Choose by where standard error goes: a terminal, the journal (systemd.exec(5), JOURNAL_STREAM), or elsewhere."""
    if stderr.isatty():
        return "console"
    found = os.fstat(stderr.fileno())
    return "journal" if env.get("JOURNAL_STREAM") == f"{found.st_dev}:{found.st_ino}" else "json"


def _formatter(chosen: Format, *, colors: bool) -> structlog.stdlib.ProcessorFormatter:
    renderers: dict[Format, list[Processor]] = {
        "console": [
            structlog.dev.ConsoleRenderer(
                colors=colors, exception_formatter=structlog.dev.plain_traceback, repr_native_str=True
            )
        ],
        "journal": [structlog.processors.format_exc_info, _render_journal],
        "json": [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()],
    }
    return structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=[*_shared_processors(), structlog.stdlib.ExtraAdder()],
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *renderers[chosen]],
    )


def _render_journal(_logger: Any, _method: str, event: EventDict) -> str:
    """Write `<priority>event key=value …`; the journal adds the time. A traceback follows line by line."""
    prefix = f"<{_PRIORITY.get(event.pop('level', 'info'), 6)}>"
    event.pop("timestamp", None)
    name, exception = event.pop("event", ""), event.pop("exception", "")
    lines = [" ".join([_one_line(name), *(f"{key}={_one_line(value)}" for key, value in event.items())])]
    lines += exception.splitlines()
    return "\n".join(prefix + line for line in lines)


def _one_line(value: object) -> str:
    text = str(value)
    return text if re.fullmatch(r"[!#-~][ !#-~]*", text) and not re.search(r"\s=", text) else repr(text)
