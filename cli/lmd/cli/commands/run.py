"""`lm run`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from lmd.cli.context import App, announce, pass_app
from lmd.cli.errors import EXIT_INTERRUPTED, BadUsage
from lmd.cli.options import DURATION, MODEL, json_option
from lmd.cli.terminal import is_terminal

if TYPE_CHECKING:
    from google.protobuf.duration_pb2 import Duration

    from lmd.cli.answer import Request
    from lmd.cli.client import Client


@click.command("run", short_help="Chat with a model, or answer one prompt")
@click.argument("model", type=MODEL)
@click.argument("prompt", nargs=-1)
@click.option("-o", "--option", "options", multiple=True, metavar="KEY=VALUE", help="Set a parameter; may be repeated.")
@click.option("--system", help="Replace the model's system prompt; empty for none.")
@click.option(
    "--keep-alive",
    type=DURATION,
    metavar="DURATION",
    help="How long the model stays in memory, such as 10m; -1 is for ever.",
)
@click.option("--raw", is_flag=True, help="Continue the prompt as it is, without template and system prompt.")
@click.option("--plain", is_flag=True, help="Print the text as it comes, without rendering Markdown.")
@click.option("--verbose", "timings", is_flag=True, help="Print counts and timings after each answer, on stderr.")
@click.option(
    "-i", "--interactive", is_flag=True, help="Open a chat even when stdin is not a terminal, reading it line by line."
)
@json_option
@pass_app
def command(
    app: App,
    /,
    model: str,
    prompt: tuple[str, ...],
    options: tuple[str, ...],
    system: str | None,
    keep_alive: float | None,
    raw: bool,
    plain: bool,
    timings: bool,
    interactive: bool,
    as_json: bool,
) -> None:
    """Chat with a model, or answer one prompt.

    Pulls the model when it is not in the store. Without PROMPT and with a terminal on both sides, opens a chat; /help
    there shows what it can do. What is piped in is put before the PROMPT. An empty PROMPT only loads the model.

    A model without a chat template does not chat; it continues the text.

    -o sets any parameter of a Modelfile, such as temperature, seed, num_predict, num_ctx or stop.

    \b
    Examples:
      lm run llama3.2
      lm run llama3.2 "Why is ice slippery?"
      lm run llama3.2 "Summarise this:" < notes.txt
      lm run -o temperature=0 -o num_predict=60 stories "Once upon a time"
      lm run --json llama3.2 "Hello" | jq -r .response
    """
    from google.protobuf.duration_pb2 import Duration

    from lmd.cli.answer import Request
    from lmd.cli.loading import ensure_model, load
    from lmd.cli.parameters import parse_options
    from lmd.v1 import model_pb2

    parameters = parse_options(options)
    text = None if interactive else _prompt(prompt)
    if interactive and (prompt or as_json):
        raise BadUsage("`--interactive` takes no PROMPT and no `--json`")
    if text is None and not interactive:
        _require_terminals(as_json=as_json)
    stay: Duration | None = None
    if keep_alive is not None:
        stay = Duration()
        stay.FromNanoseconds(int(keep_alive * 1e9))
    with app.daemon() as client:
        info = ensure_model(client, model)
        request = Request(info, [], system=system, parameters=parameters, keep_alive=stay, raw=raw)
        if text is None:
            from lmd.cli.repl.session import Session

            Session(client, request, plain=plain, timings=timings).run()
        elif not text:
            runner = load(client, info.model.name, parameters, stay)
            announce("loaded", runner.name)
        else:
            request.messages.append(model_pb2.Message(role="user", content=text))
            _answer(client, request, plain=plain, timings=timings, as_json=as_json)


def _prompt(words: tuple[str, ...]) -> str | None:
    """Return what is piped in and the words after it, or None when there is neither."""
    piped = None
    if sys.stdin is not None and not is_terminal(sys.stdin):
        try:
            piped = sys.stdin.buffer.read().decode()
        except UnicodeDecodeError as error:
            raise BadUsage(f"stdin is not text: {error.reason} at byte {error.start}") from None
    given = " ".join(words) if words else None
    if piped and given:
        return f"{piped.rstrip()}\n\n{given}"
    return given if given is not None else piped or None


def _require_terminals(*, as_json: bool) -> None:
    if as_json or not is_terminal(sys.stdin) or not is_terminal(sys.stdout):
        raise BadUsage("no prompt", hint="give it as an argument or on stdin; `--interactive` reads stdin as a chat")


def _answer(client: Client, request: Request, *, plain: bool, timings: bool, as_json: bool) -> None:
    from lmd.cli.answer import body_for_stdout, receive
    from lmd.cli.bodies import Body, HeldBody
    from lmd.cli.timings import print_timings

    body: Body = HeldBody() if as_json else body_for_stdout(markdown=request.chats and not plain, wrap=not plain)
    answer = receive(client, request, body)
    if answer.done is None:
        raise click.exceptions.Exit(EXIT_INTERRUPTED)
    if as_json:
        from lmd.cli.output import print_json
        from lmd.cli.shapes import answer_json

        print_json(answer_json(request.model.model.name, answer.text, answer.done))
    if timings:
        print_timings(answer.done)
