"""Tokens as people and programs see them."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from lmd.cli.context import note
from lmd.cli.errors import BadUsage
from lmd.cli.output import print_json, print_table
from lmd.cli.shapes import tokens_json
from lmd.cli.terminal import is_terminal, printable
from lmd.v1 import inference_service_pb2 as pb
from lmd.v1 import model_pb2

if TYPE_CHECKING:
    from lmd.cli.client import Client

_INT32_MAX = 2**31 - 1
_ESCAPES = {ord("\n"): "\\n", ord("\r"): "\\r", ord("\t"): "\\t", ord("\\"): "\\\\", ord('"'): '\\"'}


def parse_ids(text: str) -> list[int]:
    """Return the ids in a text, separated by commas or spaces; brackets around them do no harm.

    Raises:
        BadUsage: something else is in it, or nothing at all.
    """
    ids = []
    for word in re.split(r"[\s,]+", text.strip().removeprefix("[").removesuffix("]").strip()):
        if not re.fullmatch(r"-?[0-9]+", word) or abs(int(word)) > _INT32_MAX:
            raise BadUsage(f"`{word}` is no id of a token", hint='write ids like "9906, 11, 1917"')
        ids.append(int(word))
    return ids


def quoted(piece: bytes) -> str:
    """Return the bytes of a token in quotes, with its spaces to be seen; what is no character is escaped."""
    text = piece.decode(errors="backslashreplace") if _broken(piece) else piece.decode().translate(_ESCAPES)
    return f'"{printable(text)}"'


def _broken(piece: bytes) -> bool:
    try:
        piece.decode()
    except UnicodeDecodeError:
        return True
    return False


def apply_template(client: Client, model: str, text: str, system: str | None) -> pb.ApplyTemplateResponse:
    """Return the prompt that one message makes.

    Raises:
        ClientError: the model has no template, or it fails.
    """
    first = [model_pb2.Message(role="system", content=system)] if system is not None else []
    turn = model_pb2.Message(role="user", content=text)
    return client.call(client.inference.ApplyTemplate, pb.ApplyTemplateRequest(model=model, messages=[*first, turn]))


def print_tokens(model: str, tokens: Sequence[pb.Token], *, prompt: str | None, ids_only: bool, as_json: bool) -> None:
    """Print tokens; in the place of their table the *prompt* that they are of, when there is one."""
    if as_json:
        print_json(tokens_json(model, tokens, prompt))
        return
    if ids_only:
        click.echo(" ".join(str(token.id) for token in tokens))
    elif prompt is not None:
        print_prompt(prompt)
    else:
        print_table(["ID", "TEXT"], [[str(token.id), quoted(token.piece)] for token in tokens], right=("ID",))
    note("1 token" if len(tokens) == 1 else f"{len(tokens)} tokens")


def print_prompt(prompt: str) -> None:
    """Print a prompt; programs get it as it is."""
    click.echo(printable(prompt) if is_terminal(sys.stdout) else prompt, nl=is_terminal(sys.stdout))


def print_text(model: str, text: str, *, as_json: bool) -> None:
    """Print the text of tokens."""
    if as_json:
        print_json({"model": model, "text": text})
    else:
        click.echo(printable(text) if is_terminal(sys.stdout) else text, nl=is_terminal(sys.stdout))
