"""A model in words, for `lm show` and `/show`."""

from __future__ import annotations

import sys

from lmd.cli.shapes import parameters_json, unix_time
from lmd.cli.terminal import is_terminal, one_line, printable, terminal_size
from lmd.cli.units import format_ago, format_count, format_size
from lmd.v1 import model_pb2

_LICENSE_LINES = 2
_TEXT_LINES = 6

Sections = list[tuple[str, list[tuple[str, str]]]]


def facts(info: model_pb2.ModelInfo, now: float) -> Sections:
    """Return the sections of `lm show`."""
    model, details, origin = info.model, info.model.details, info.origin
    pulled_at = unix_time(origin.pulled_time)
    parameters = format_count(details.parameter_count) if details.parameter_count else ""
    return [
        (
            "Model",
            [
                ("name", one_line(model.name)),
                ("title", one_line(details.title)),
                ("architecture", one_line(details.architecture)),
                ("parameters", parameters),
                ("quantization", one_line(details.quantization)),
                ("context", _number(details.context_length, "tokens")),
                ("embedding", _number(details.embedding_length)),
                ("vocabulary", _number(details.vocabulary_size, "tokens")),
                ("size", _size(model)),
                ("capabilities", ", ".join(model.capabilities)),
                ("requires", f"Ollama {one_line(info.requires)}" if info.requires else ""),
                ("digest", model.digest),
            ],
        ),
        (
            "Source",
            [
                ("ref", one_line(origin.ref)),
                ("commit", one_line(origin.commit)),
                ("quantized", f"from {origin.quantized_from}" if origin.quantized_from else ""),
                ("imatrix", origin.imatrix),
                ("pulled", format_ago(now - pulled_at) if pulled_at else ""),
                ("modified", format_ago(now - unix_time(model.modified_time))),
            ],
        ),
        ("Files", [(file.role, _file(file)) for file in info.files]),
        ("Parameters", [(name, one_line(text)) for name, text in parameter_pairs(info.parameters)]),
        ("System", [("", _excerpt(info.system, _TEXT_LINES, "--system"))]),
        ("Messages", [(message.role, _first(message.content)) for message in info.messages]),
        ("Template", [("", _excerpt(info.template, _TEXT_LINES, "--template"))]),
        ("License", [("", _excerpt("\n\n".join(info.licenses), _LICENSE_LINES, "--license"))]),
    ]


def part_text(info: model_pb2.ModelInfo, part: str) -> str:
    """Return one part in full, without a last line feed; on a terminal, without what would steer it."""
    texts = {
        "modelfile": info.modelfile,
        "template": info.template,
        "system": info.system,
        "parameters": "\n".join(f"{name} {value}" for name, value in parameter_pairs(info.parameters)),
        "license": "\n\n".join(info.licenses),
    }
    text = texts[part].removesuffix("\n")
    return printable(text) if is_terminal(sys.stdout) else text


def parameter_pairs(parameters: model_pb2.Parameters) -> list[tuple[str, str]]:
    """Return the settings as a Modelfile gives them: one pair per value, text in quotes."""
    pairs = []
    for name, value in parameters_json(parameters).items():
        if isinstance(value, list):
            pairs += [(name, f'"{item}"') for item in value]
        elif isinstance(value, bool):
            pairs.append((name, "true" if value else "false"))
        else:
            pairs.append((name, str(value)))
    return pairs


def _size(model: model_pb2.Model) -> str:
    """Return the size, and how much of it other names need as well."""
    shared = model.size_bytes - model.own_bytes
    text = format_size(model.size_bytes)
    return f"{text}, {format_size(shared)} of it shared" if model.own_bytes and shared else text


def _file(file: model_pb2.ModelFile) -> str:
    scale = f"  scale {file.scale:g}" if file.role == "adapter" else ""
    return f"{one_line(file.filename)}  {format_size(file.size_bytes)}{scale}"


def _number(value: int, unit: str = "") -> str:
    return f"{value:,} {unit}".strip().replace(",", " ") if value else ""


def _excerpt(text: str, lines: int, option: str) -> str:
    """Return the first *lines* of *text*, cut to the terminal, and how to see all of it."""
    width = max(terminal_size().columns - 2, 20)
    given = printable(text).strip("\n").splitlines()
    shown = [line if len(line) <= width else f"{line[: width - 1]}…" for line in given[:lines]]
    if len(given) > lines:
        shown.append(f"… {len(given) - lines} more lines: `{option}`")
    return "\n".join(shown)


def _first(text: str) -> str:
    line = one_line(text)
    return line if len(line) <= 72 else f"{line[:71]}…"
