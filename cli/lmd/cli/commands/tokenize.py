"""`lm tokenize`."""

from __future__ import annotations

import click

from lmd.cli.context import App, pass_app
from lmd.cli.errors import BadUsage
from lmd.cli.options import MODEL, json_option


@click.command("tokenize", short_help="Show the tokens that a model reads")
@click.argument("model", type=MODEL)
@click.argument("text", required=False)
@click.option("--chat", is_flag=True, help="Take TEXT as a message, and show the prompt that the template makes of it.")
@click.option("--tokens", is_flag=True, help="List the tokens below the prompt, with --chat.")
@click.option("--system", help="Replace the model's system prompt, with --chat; empty for none.")
@click.option("--decode", is_flag=True, help="Take TEXT as the ids of tokens, and print their text.")
@click.option("--special", is_flag=True, help="Add the tokens that the model wants around a prompt.")
@click.option("--plain", is_flag=True, help="Leave text that names a special token text.")
@click.option("--ids", is_flag=True, help="Print the ids alone, on one line.")
@json_option
@pass_app
def command(
    app: App,
    /,
    model: str,
    text: str | None,
    chat: bool,
    tokens: bool,
    system: str | None,
    decode: bool,
    special: bool,
    plain: bool,
    ids: bool,
    as_json: bool,
) -> None:
    """Show the tokens that a model reads for a TEXT, or the text of tokens.

    Without TEXT reads stdin. Each line has the id of a token and the text it stands for, quoted; bytes that are no
    whole character are written \\xNN. How many there are is said on stderr.

    With --chat prints the prompt of a chat as the model gets it, its system prompt and special tokens included, which
    shows what a template does; with --tokens its tokens follow. Nothing is generated.

    \b
    Examples:
      lm tokenize llama3.2 "Hello, world"
      lm tokenize --ids llama3.2 < prompt.txt
      lm tokenize --decode llama3.2 "9906, 11, 1917"
      lm tokenize --chat llama3.2 "Why is the sky blue?"
      lm tokenize --chat --tokens llama3.2 "Hello"
      lm tokenize --chat --json llama3.2 "Hello" | jq '.tokens | length'
    """
    from lmd.cli.embedding import make_ready
    from lmd.cli.texts import stdin_text
    from lmd.cli.tokens import apply_template, parse_ids, print_prompt, print_text, print_tokens
    from lmd.v1 import inference_service_pb2 as pb

    if decode and (chat or special or plain or ids):
        raise BadUsage("`--decode` takes none of `--chat`, `--special`, `--plain` and `--ids`")
    if chat and (special or plain):
        raise BadUsage("`--chat` takes neither `--special` nor `--plain`: the template decides")
    if system is not None and not chat:
        raise BadUsage("`--system` needs `--chat`")
    if tokens and not chat:
        raise BadUsage("`--tokens` needs `--chat`; without it the tokens are all there is")
    if tokens and (ids or as_json):
        raise BadUsage(f"`--tokens` and `{'--ids' if ids else '--json'}` exclude each other")
    if ids and as_json:
        raise BadUsage("`--ids` and `--json` exclude each other")
    given = stdin_text() if text is None else text
    if given is None:
        raise BadUsage("no text", hint="give it as an argument or on stdin")
    numbers = parse_ids(given) if decode else []
    with app.daemon() as client:
        name = make_ready(client, model)
        if decode:
            decoded = client.call(client.inference.Detokenize, pb.DetokenizeRequest(model=name, tokens=numbers))
            print_text(name, decoded.text, as_json=as_json)
        elif chat:
            applied = apply_template(client, name, given, system)
            if tokens:
                print_prompt(applied.prompt)
                click.echo()
                print_tokens(name, applied.tokens, prompt=None, ids_only=False, as_json=False)
            else:
                print_tokens(name, applied.tokens, prompt=applied.prompt, ids_only=ids, as_json=as_json)
        else:
            request = pb.TokenizeRequest(model=name, text=given, add_special=special, plain=plain)
            found = client.call(client.inference.Tokenize, request).tokens
            print_tokens(name, found, prompt=None, ids_only=ids, as_json=as_json)
