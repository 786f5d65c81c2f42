"""What settings are made of: fields with their documentation, and the kinds of values that people write."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo
from pydantic.config import JsonDict

from lmd.daemon.quantities import DURATION_FORM, FOR_EVER, parse_duration, parse_size


def setting(default: Any, doc: str, legal: str, *, shown: str | None = None, **bounds: Any) -> Any:
    """Declare a field: its default, what it does, what may be written; *shown* replaces a default nobody can type."""
    extra: JsonDict = {"legal": legal}
    if shown is not None:
        extra["shown"] = shown
    return Field(default, description=doc, json_schema_extra=extra, **bounds)


def duration_between(minimum: str, maximum: str, *, for_ever: bool = False) -> tuple[BeforeValidator, str]:
    """Return a validator of durations, and the words for what it takes."""
    low, high = parse_duration(minimum), parse_duration(maximum)

    def check(value: object) -> timedelta:
        if isinstance(value, int) and not isinstance(value, bool):
            value = str(value)
        if not isinstance(value, str):
            raise ValueError(f"a duration is text, not {type(value).__name__}")
        duration = parse_duration(value)
        if duration == FOR_EVER and for_ever:
            return duration
        if not low <= duration <= high:
            raise ValueError(f"out of range {minimum} to {maximum}")
        return duration

    endless = ', or "-1" for ever' if for_ever else ""
    return BeforeValidator(check), f"{DURATION_FORM}, from {minimum} to {maximum}{endless}"


def check_size(value: object) -> int:
    """Read a size given as text, or as a number of bytes."""
    if isinstance(value, str):
        return parse_size(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    raise ValueError(f"a size is text or a whole number of bytes, not {type(value).__name__}")


def check_path(value: object, info: ValidationInfo) -> Path:
    """Read an absolute path; a leading `~/` is the home directory of the daemon's user."""
    if isinstance(value, Path):
        return value
    if not isinstance(value, str) or "\0" in value:
        raise ValueError("not a path")
    if value.startswith("~/") and info.context:
        return Path(info.context["user_home"]) / value[2:]
    if not value.startswith("/"):
        raise ValueError("not an absolute path")
    return Path(value)


ABSOLUTE_PATH = 'an absolute path; a leading "~/" is the home directory'
TRUTH = "true or false"
AnyPath = Annotated[Path, BeforeValidator(check_path)]
SizeBytes = Annotated[int, BeforeValidator(check_size)]


class Section(BaseModel):
    """A table of the configuration file."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
