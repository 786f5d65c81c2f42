"""The Modelfile that `/save` sends: the session's model with what the session added.

Grammar: a value runs to the end of its line, or begins with one or three double quotes and ends where the same quotes
end a line, so it may span lines. There are no escapes and no control characters, so a text takes the first form that
reads back as itself.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from lmd.cli.errors import BadUsage
from lmd.cli.shapes import parameters_json
from lmd.v1 import model_pb2

_SPACES = " \t"
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def quote(text: str) -> str:
    """Return *text*, without control characters, as the value of a Modelfile line.

    Raises:
        BadUsage: no form can hold it.
    """
    value = _CONTROL.sub("", text)
    if value and "\n" not in value and value.strip(_SPACES) == value and not value.startswith('"'):
        return value
    for marks in ('"""', '"'):
        form = f"{marks}{value}{marks}"
        if not _ends_early(form, marks) and (marks == '"""' or not form.startswith('"""')):
            return form
    raise BadUsage(
        "this text cannot be written in a Modelfile: lines of it end with one and with three double quotes",
        hint="`/clear` forgets the messages, `/set system` replaces the system prompt",
    )


def _ends_early(form: str, marks: str) -> bool:
    """Return whether a line of *form* before the last ends with the quotes that should end it all."""
    first, *others = [line.rstrip(_SPACES) for line in form.split("\n")[:-1]] or [""]
    opened_and_closed = first.endswith(marks) and len(first) >= 2 * len(marks)
    return opened_and_closed or any(line.endswith(marks) for line in others)


def session_modelfile(
    base: str,
    *,
    system: str | None,
    parameters: model_pb2.Parameters,
    messages: Sequence[model_pb2.Message],
) -> str:
    """Return a Modelfile for *base* with these settings; *messages* replace those of the base when there are any.

    Raises:
        BadUsage: a text cannot be written in a Modelfile.
    """
    lines = [f"FROM {base}"]
    if system is not None:
        lines.append(f"SYSTEM {quote(system)}")
    for name, value in parameters_json(parameters).items():
        values = value if isinstance(value, list) else [str(value).lower()]
        lines += [f"PARAMETER {name} {quote(text)}" for text in values]
    lines += [f"MESSAGE {message.role} {quote(message.content)}" for message in messages]
    return "\n".join(lines) + "\n"
