"""`lm quantize`."""

from __future__ import annotations

import sys
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lmd.cli.context import App, announce, note, pass_app
from lmd.cli.errors import EXIT_INTERRUPTED, BadUsage, ClientError
from lmd.cli.options import MODEL, json_option

if TYPE_CHECKING:
    from lmd.cli.client import Client
    from lmd.v1 import model_pb2
    from lmd.v1 import model_service_pb2 as pb

_MAX_TEXT_BYTES = 1 << 20


@click.command("quantize", short_help="Make a model with smaller weights of a model")
@click.argument("name", type=MODEL)
@click.argument("quantization", metavar="TYPE")
@click.option(
    "--name", "new_name", type=MODEL, metavar="NEW", help="The name of the result. Default: NAME with TYPE as its tag."
)
@click.option("--compare", is_flag=True, help="Measure size, speed and perplexity before and after.")
@click.option(
    "--text", metavar="FILE", help="Compare on this text, at most 1 MiB; - is stdin. Default: a passage of a novel."
)
@click.option("--imatrix", metavar="FILE", help="Weigh the weights by this importance matrix, made by llama-imatrix.")
@click.option("--requantize", is_flag=True, help="Allow weights that are quantized already, which loses more.")
@json_option
@pass_app
def command(
    app: App,
    name: str,
    quantization: str,
    new_name: str | None,
    compare: bool,
    text: str | None,
    imatrix: str | None,
    requantize: bool,
    as_json: bool,
) -> None:
    """Make a model with smaller weights of a model.

    TYPE is a quantization of llama.cpp such as Q8_0, Q5_K_M, Q4_K_M or IQ4_XS; all of them are listed when it is none.
    Start from F16, BF16 or F32 weights. Everything but the weights is shared with NAME, which stays as it is unless
    the result has its name. Ctrl-C stops it, and nothing is left.

    \b
    Examples:
      lm quantize qwen:f16 Q4_K_M
      lm quantize qwen:f16 Q4_K_M --compare
      lm quantize qwen:f16 IQ2_M --imatrix qwen.imatrix.gguf --name qwen:tiny
      lm quantize qwen:f16 Q5_K_M --text my-notes.txt --json
    """
    from lmd.cli.output import print_json
    from lmd.cli.shapes import measurement_json, model_json
    from lmd.v1 import model_service_pb2 as pb

    request = pb.QuantizeModelRequest(
        name=name,
        quantize=quantization,
        new_name=new_name or "",
        requantize=requantize,
        compare=compare or text is not None,
        text="" if text is None else _read_text(text),
    )
    try:
        with app.daemon() as client:
            made, sides = _quantize(client, request, imatrix)
    except KeyboardInterrupt:
        note("stopped; nothing was kept")
        raise click.exceptions.Exit(EXIT_INTERRUPTED) from None
    if as_json:
        print_json({**model_json(made), "comparison": [measurement_json(side) for side in sides]})
        return
    if sides:
        _print_comparison(sides)
    announce("created", made.name)


def _quantize(
    client: Client, request: pb.QuantizeModelRequest, imatrix: str | None
) -> tuple[model_pb2.Model, list[pb.Measurement]]:
    from lmd.cli.progress import reporter_for
    from lmd.cli.terminal import quiet_keyboard
    from lmd.cli.ticking import with_ticks
    from lmd.cli.uploads import store_file

    sides: list[pb.Measurement] = []
    with quiet_keyboard(), closing(reporter_for()) as reporter:
        if imatrix is not None:
            request.imatrix = store_file(client, _existing(imatrix), reporter)
        with client.stream(client.models.QuantizeModel, request) as events:
            for event in with_ticks(events):
                if event is None:
                    reporter.refresh()
                elif event.HasField("status"):
                    reporter.status(event.status)
                elif event.HasField("progress"):
                    reporter.progress(event.progress)
                elif event.HasField("measurement"):
                    sides.append(event.measurement)
                elif event.HasField("model"):
                    return event.model, sides
    raise ClientError("the daemon ended the quantization without a result", reason="INTERNAL")


def _existing(path: str) -> Path:
    found = Path(path).absolute()
    if not found.is_file():
        raise BadUsage(f"`--imatrix`: {path} is no file")
    return found


def _read_text(path: str) -> str:
    try:
        if path == "-":
            data = sys.stdin.buffer.read(_MAX_TEXT_BYTES + 1)
        else:
            with Path(path).open("rb") as file:
                data = file.read(_MAX_TEXT_BYTES + 1)
    except OSError as error:
        raise BadUsage(f"`--text`: cannot read {path}: {error.strerror}") from error
    if len(data) > _MAX_TEXT_BYTES:
        raise BadUsage(f"`--text`: {path} is longer than 1 MiB", hint="give a part of it")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise BadUsage(f"`--text`: {path} is not UTF-8") from error
    if not text.strip():
        raise BadUsage(f"`--text`: {path} is empty")
    return text


def _print_comparison(sides: list[pb.Measurement]) -> None:
    from lmd.cli.output import print_table
    from lmd.cli.units import format_size

    rows = [
        (
            side.name,
            side.quantization,
            format_size(side.size_bytes),
            f"{side.perplexity:.4g}",
            f"{side.prompt_tokens_per_second:.1f}",
            f"{side.answer_tokens_per_second:.1f}",
        )
        for side in sides
    ]
    if len(sides) == 2:
        before, after = sides
        rows.append(
            (
                "change",
                "",
                _change(before.size_bytes, after.size_bytes),
                _change(before.perplexity, after.perplexity),
                _change(before.prompt_tokens_per_second, after.prompt_tokens_per_second),
                _change(before.answer_tokens_per_second, after.answer_tokens_per_second),
            )
        )
    headers = ("MODEL", "QUANT", "SIZE", "PERPLEXITY", "PROMPT TOK/S", "ANSWER TOK/S")
    print_table(headers, rows, right=headers[2:])


def _change(before: float, after: float) -> str:
    return f"{(after / before - 1) * 100:+.1f}%" if before else ""
