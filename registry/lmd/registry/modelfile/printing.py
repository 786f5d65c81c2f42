"""Writing Modelfiles."""

from __future__ import annotations

from collections.abc import Iterator

from lmd.registry.errors import InvalidRequest
from lmd.registry.modelfile.arguments import format_adapter
from lmd.registry.modelfile.templates import why_not
from lmd.registry.modelfile.text import quoted
from lmd.registry.modelfile.values import MESSAGE_ROLES, From, Modelfile
from lmd.registry.parameters import format_value


def format_modelfile(modelfile: Modelfile) -> str:
    """Write a Modelfile that parses to an equal one.

    Raises:
        InvalidRequest: when there is no way to write a value: it has control characters, or lines that end in quotes of
            both kinds; the template is Go's and does not compile; a message has a role that Modelfiles do not know. No
            parsed Modelfile has such a value.
    """
    if modelfile.template and why_not(modelfile.template):
        raise _unwritable("text of TEMPLATE", "TEMPLATE")
    if any(message.role not in MESSAGE_ROLES for message in modelfile.messages):
        raise _unwritable("role of a MESSAGE", "MESSAGE")
    return "\n".join(_lines(modelfile)) + "\n"


def _lines(modelfile: Modelfile) -> Iterator[str]:
    for source in modelfile.from_:
        yield f"FROM {_written(source.value, 'FROM')}"
    yield from _sources("DRAFT", modelfile.drafts)
    yield from _adapters(modelfile)
    yield from _sources("PROJECTOR", modelfile.projectors)
    for name, text in (("QUANTIZE", modelfile.quantize), ("REQUIRES", modelfile.requires)):
        if text is not None:
            yield f"{name} {_written(text, name)}"
    for name, text in (("TEMPLATE", modelfile.template), ("SYSTEM", modelfile.system)):
        if text is not None:
            yield f"{name} {_written(text, name)}"
    for name, value in sorted(modelfile.parameters.items()):
        for text in value if isinstance(value, tuple) else (format_value(value),):
            yield f"PARAMETER {name} {_written(text, name)}"
    for text in modelfile.licenses:
        yield f"LICENSE {_written(text, 'LICENSE')}"
    for message in modelfile.messages:
        yield f"MESSAGE {message.role} {_written(message.content, 'MESSAGE')}"


def _sources(name: str, sources: tuple[From, ...] | None) -> Iterator[str]:
    if sources == ():
        yield f'{name} ""'
    for source in sources or ():
        yield f"{name} {_written(source.value, name)}"


def _adapters(modelfile: Modelfile) -> Iterator[str]:
    if modelfile.adapters == ():
        yield 'ADAPTER ""'
    for adapter in modelfile.adapters or ():
        written = format_adapter(adapter.source.value, adapter.scale)
        if written is None:
            raise _unwritable("text of ADAPTER", "ADAPTER")
        yield f"ADAPTER {written}"


def _written(value: str, what: str) -> str:
    form = quoted(value)
    if form is None:
        raise _unwritable(f"text of {what}", what)
    return form


def _unwritable(what: str, field: str) -> InvalidRequest:
    return InvalidRequest(f"the {what} cannot be written in a Modelfile", field=field)
