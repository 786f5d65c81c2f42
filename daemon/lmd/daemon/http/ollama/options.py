"""The `options` of a request: Ollama's names and kinds as parameters of the registry."""

from __future__ import annotations

from collections.abc import Mapping

from lmd.daemon.http.ollama.failures import Refusal
from lmd.registry.parameters import INT64_MAX, PARAMETERS, Kind

#: Names that Ollama knows and that have no effect here; their kinds are checked all the same.
_WITHOUT_EFFECT = {"num_keep": Kind.INT, "main_gpu": Kind.INT}

#: What stands for everything below, where Ollama, or its engine, takes a number that is below our range.
_LOWEST = {"num_predict": -1, "num_gpu": -1, "top_k": 0, "temperature": 0}

_KINDS = {Kind.INT: "integer", Kind.FLOAT: "float32", Kind.BOOL: "boolean", Kind.TEXTS: "array", Kind.CHOICE: "string"}


def parameters_of(options: Mapping[str, object] | None) -> dict[str, object]:
    """Return the parameters that *options* asks for; null and unknown names count for nothing.

    Ranges are checked where the parameters are used.

    Raises:
        Refusal: a value is of the wrong kind; with status 500, as Ollama has it.
    """
    asked: dict[str, object] = {}
    for name, value in (options or {}).items():
        if value is None:
            continue
        if name in _WITHOUT_EFFECT:
            _typed(name, value, _WITHOUT_EFFECT[name])
        elif name in PARAMETERS:
            asked[name] = _within(name, _typed(name, value, PARAMETERS[name].kind))
    return asked


def _typed(name: str, value: object, kind: Kind) -> object:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind is Kind.INT and number:
        # JSON has one kind of number, and clients write 5.0 where they mean 5.
        return int(value)  # type: ignore[call-overload]
    if kind is Kind.FLOAT and number:
        return value
    if kind is Kind.BOOL and isinstance(value, bool):
        return value
    if kind is Kind.CHOICE and isinstance(value, str):
        return value
    if kind is Kind.TEXTS and isinstance(value, list):
        if not all(isinstance(item, str) for item in value):
            raise Refusal(500, f'option "{name}" must be an array of strings')
        return value
    raise Refusal(500, f'option "{name}" must be of type {_KINDS[kind]}')


def _within(name: str, value: object) -> object:
    if name in _LOWEST and isinstance(value, int | float):
        return max(value, _LOWEST[name])
    if name == "seed" and isinstance(value, int) and -INT64_MAX <= value < -1:
        # The engine has seeds of 32 bits; only -1 asks for a random one.
        return value % 2**32
    if name == "stop" and isinstance(value, list):
        return [text for text in value if text]
    return value
