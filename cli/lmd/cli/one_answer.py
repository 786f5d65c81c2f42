"""One prompt from the command line, and its answer."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from lmd.cli.errors import EXIT_INTERRUPTED, BadUsage
from lmd.cli.terminal import is_terminal

if TYPE_CHECKING:
    from lmd.cli.answer import Answer, Request
    from lmd.cli.bodies import Body
    from lmd.cli.client import Client


def read_prompt(words: tuple[str, ...]) -> str | None:
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


def require_terminals(*, as_json: bool) -> None:
    """Refuse to open a chat where nobody can type, or where a program waits for one JSON document."""
    if as_json or not is_terminal(sys.stdin) or not is_terminal(sys.stdout):
        raise BadUsage("no prompt", hint="give it as an argument or on stdin; `--interactive` reads stdin as a chat")


def answer_once(client: Client, request: Request, *, plain: bool, timings: bool, as_json: bool) -> None:
    """Send *request* and print the answer: the first of several as it comes, the others after it."""
    from lmd.cli.answer import receive
    from lmd.cli.bodies import HeldBody
    from lmd.cli.timings import print_timings

    count = request.options.choices if request.options is not None else 0
    answer = receive(client, request, HeldBody() if as_json else _body(request, 1, count, plain=plain))
    if answer.done is None:
        raise click.exceptions.Exit(EXIT_INTERRUPTED)
    if as_json:
        from lmd.cli.output import print_json
        from lmd.cli.shapes import answer_json

        print_json(answer_json(request.model.model.name, answer, answer.done))
    else:
        _print_others(answer, request, count, plain=plain)
    if timings:
        print_timings(answer.done)


def _print_others(answer: Answer, request: Request, count: int, *, plain: bool) -> None:
    for number in range(2, count + 1):
        body = _body(request, number, count, plain=plain)
        body.feed(answer.choice(number - 1).text)
        body.close()


def _body(request: Request, number: int, count: int, *, plain: bool) -> Body:
    from lmd.cli.answer import body_for_stdout
    from lmd.cli.bodies import TitledBody
    from lmd.cli.terminal import palette_for

    body = body_for_stdout(markdown=request.chats and not plain, wrap=not plain)
    if count <= 1:
        return body
    return TitledBody(body, sys.stdout, palette_for(sys.stdout).faint(f"--- {number} of {count} ---"))
