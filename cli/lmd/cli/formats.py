"""What an answer must look like, as people write it on a command line."""

from __future__ import annotations

import json
from pathlib import Path

from lmd.cli.errors import BadUsage
from lmd.v1 import inference_service_pb2 as pb

HINT = (
    "write `json`, a JSON Schema (a file that ends with .json, or the text itself), "
    "a grammar (a file that ends with .gbnf), or `regex:` and an expression"
)

#: What the daemon takes; more would only be refused after it was sent.
_MAX_BYTES = 256 << 10


def parse_format(text: str) -> pb.Format:
    """Return the format that *text* means: `json`, a schema, a file that holds one, or `regex:EXPRESSION`.

    Raises:
        BadUsage: it means none, the file cannot be read, or the schema is not JSON. Whether a schema, an expression
            or a grammar can be honoured only the daemon knows.
    """
    stripped = text.strip()
    if stripped == "json":
        return pb.Format(json_object=True)
    if stripped.startswith("regex:"):
        expression = stripped.removeprefix("regex:")
        if not expression:
            raise BadUsage("there is no expression after `regex:`", hint="such as `regex:(yes|no)`")
        return pb.Format(regex=expression)
    if stripped.startswith("{"):
        return pb.Format(json_schema=_checked_schema(stripped, "the schema"))
    suffix = Path(stripped).suffix.lower()
    if suffix == ".json":
        return pb.Format(json_schema=_checked_schema(_read(stripped), f"`{stripped}`"))
    if suffix == ".gbnf":
        return pb.Format(gbnf=_read(stripped))
    raise BadUsage(f"`{text}` is no format", hint=HINT)


def _read(name: str) -> str:
    path = Path(name).expanduser()
    try:
        with path.open("rb") as stream:
            content = stream.read(_MAX_BYTES + 1)
    except FileNotFoundError:
        raise BadUsage(f"there is no file `{name}`") from None
    except OSError as error:
        raise BadUsage(f"cannot read `{name}`: {error.strerror}") from None
    if len(content) > _MAX_BYTES:
        raise BadUsage(f"`{name}` is larger than {_MAX_BYTES // 1024} KiB")
    if not content.strip():
        raise BadUsage(f"`{name}` is empty")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise BadUsage(f"`{name}` is not text: {error.reason} at byte {error.start}") from None


def _checked_schema(text: str, what: str) -> str:
    try:
        schema = json.loads(text)
    except json.JSONDecodeError as error:
        raise BadUsage(f"{what} is not JSON: {error.msg} at line {error.lineno}, column {error.colno}") from None
    except RecursionError:
        raise BadUsage(f"{what} is nested too deeply") from None
    if not isinstance(schema, dict):
        raise BadUsage(f"{what} is no JSON Schema: it is not an object")
    return text
