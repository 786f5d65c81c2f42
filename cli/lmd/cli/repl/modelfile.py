"""The Modelfile that `/save` sends: the session's model with what the session added.

Grammar: a value runs to the end of its line, or stands between double or triple double quotes and may span lines.
There are no escapes, so a text chooses the first form that reads back as itself.
"""

from __future__ import annotations

from collections.abc import Sequence

from lmd.cli.errors import BadUsage
from lmd.cli.shapes import parameters_json
from lmd.v1 import model_pb2

_TRIPLE = '"""'


def quote(text: str) -> str:
    """Return *text* as the value of a Modelfile line.

    Raises:
        BadUsage: no form can hold it.
    """
    if text and text == text.strip() and "\n" not in text and not text.startswith('"'):
        return text
    if _TRIPLE not in text and not text.endswith('"'):
        return f"{_TRIPLE}{text}{_TRIPLE}"
    if '"' not in text:
        return f'"{text}"'
    raise BadUsage(
        "this text cannot be written in a Modelfile: it holds three double quotes in a row, or ends with one",
        hint="`/clear` forgets the messages, `/set system` replaces the system prompt",
    )


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
