"""`lm run`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from lmd.cli.asked import Asked, answer_options
from lmd.cli.context import App, announce, pass_app
from lmd.cli.errors import BadUsage
from lmd.cli.options import DURATION, MODEL, json_option

if TYPE_CHECKING:
    from google.protobuf.duration_pb2 import Duration

_THINK_LEVELS = ("on", "low", "medium", "high")


class _RunCommand(click.Command):
    """Lets `--think` stand without a word, also before an argument."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse *args*."""
        end = args.index("--") if "--" in args else len(args)
        for place in range(end):
            if args[place] == "--think" and args[place + 1 : place + 2] not in [[level] for level in _THINK_LEVELS]:
                args[place] = "--think=on"
        return super().parse_args(ctx, args)


@click.command("run", cls=_RunCommand, short_help="Chat with a model, or answer one prompt")
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
@answer_options
@click.option(
    "--think",
    type=click.Choice(_THINK_LEVELS),
    help="Have the model think before it answers; `--think` alone is `on`.",
)
@click.option("--no-think", is_flag=True, help="Have it answer at once.")
@click.option("--hide-thinking", is_flag=True, help="Do not print, on stderr, what it thinks.")
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
    think: str | None,
    no_think: bool,
    hide_thinking: bool,
    raw: bool,
    plain: bool,
    timings: bool,
    interactive: bool,
    as_json: bool,
    asked: Asked,
) -> None:
    """Chat with a model, or answer one prompt.

    Pulls the model when it is not in the store. Without PROMPT and with a terminal on both sides, opens a chat; /help
    there shows what it can do. What is piped in is put before the PROMPT. An empty PROMPT only loads the model.

    A model without a chat template does not chat; it continues the text.

    A model that thinks before it answers shows that on stderr, so stdout has the answer alone.

    -o sets any parameter of a Modelfile, such as temperature, seed, num_predict, num_ctx or stop.

    \b
    Examples:
      lm run llama3.2
      lm run llama3.2 "Why is ice slippery?"
      lm run llama3.2 "Summarise this:" < notes.txt
      lm run -o temperature=0 -o num_predict=60 stories "Once upon a time"
      lm run --json llama3.2 "Hello" | jq -r .response
      lm run --format person.json llama3.2 "Invent a person"
      lm run --think high qwen3 "How many primes are below 100?"
      lm run --format "regex:(yes|no)" llama3.2 "Is ice slippery?"
    """
    from google.protobuf.duration_pb2 import Duration

    from lmd.cli.answer import Request
    from lmd.cli.loading import ensure_model, load
    from lmd.cli.one_answer import answer_once, read_prompt, require_terminals
    from lmd.cli.parameters import parse_options
    from lmd.v1 import inference_service_pb2, model_pb2

    if think and no_think:
        raise BadUsage("`--think` and `--no-think` do not go together")
    parameters = parse_options(options)
    wanted = asked.message()
    text = None if interactive else read_prompt(prompt)
    if interactive and (prompt or as_json):
        raise BadUsage("`--interactive` takes no PROMPT and no `--json`")
    if text is None and not interactive:
        require_terminals(as_json=as_json)
    asked.check(one_prompt=text is not None, as_json=as_json)
    stay: Duration | None = None
    if keep_alive is not None:
        stay = Duration()
        stay.FromNanoseconds(int(keep_alive * 1e9))
    with app.daemon() as client:
        info = ensure_model(client, model)
        request = Request(info, [], system=system, parameters=parameters, keep_alive=stay, raw=raw, options=wanted)
        level = "off" if no_think else think or "unspecified"
        request.think = inference_service_pb2.Think.Value(f"THINK_{level.upper()}")
        request.hides_thoughts = hide_thinking
        if text is None:
            from lmd.cli.repl.session import Session

            Session(client, request, plain=plain, timings=timings).run()
        elif not text:
            runner = load(client, info.model.name, parameters, stay)
            announce("loaded", runner.name)
        else:
            request.messages.append(model_pb2.Message(role="user", content=text))
            answer_once(client, request, plain=plain, timings=timings, as_json=as_json)
