"""`lm diff`."""

from __future__ import annotations

import sys

import click

from lmd.cli.context import App, note, pass_app
from lmd.cli.errors import EXIT_USAGE, ClientError
from lmd.cli.options import MODEL, json_option


class _Trouble(ClientError):
    """A failure, in the exit status of `diff`: 1 says that there are differences."""

    @property
    def exit_code(self) -> int:
        return max(super().exit_code, EXIT_USAGE)


@click.command("diff", short_help="Show what differs between two models")
@click.argument("model", metavar="A", type=MODEL)
@click.argument("other", metavar="[B]", type=MODEL, required=False)
@click.option("-q", "--quiet", is_flag=True, help="Print nothing; only the exit status tells.")
@json_option
@click.pass_context
@pass_app
def command(app: App, /, ctx: click.Context, model: str, other: str | None, quiet: bool, as_json: bool) -> None:
    """Show what differs between the models A and B, or between A and its version before.

    Compares files, parameters, template, system prompt, messages, licences and where they come from, as `diff -u`
    does. NAME@NUMBER is a version of a model, as `lm history` lists them. The exit status is 0 when nothing differs,
    1 when something does, and 2 or more when that cannot be told.

    \b
    Examples:
      lm diff poet
      lm diff poet@1 poet@3
      lm diff llama3.2 poet --json | jq .parameters
    """
    from lmd.cli.differences import difference_json, difference_lines
    from lmd.cli.output import print_json
    from lmd.cli.terminal import is_terminal, palette_for, printable
    from lmd.cli.versions import get_info, one_before

    try:
        with app.daemon() as client:
            names = (model, other) if other is not None else one_before(client, model)
            old, new = get_info(client, names[0]), get_info(client, names[1])
    except ClientError as error:
        raise _trouble(error) from None
    lines = list(difference_lines(old, new, names))
    if as_json and not quiet:
        print_json(difference_json(old, new, names))
    elif not quiet:
        palette = palette_for(sys.stdout)
        for line in lines:
            click.echo(palette.difference(printable(line)) if is_terminal(sys.stdout) else line)
        if not lines and old.model.digest != new.model.digest:
            note("nothing that is compared differs, though the digests do")
    if lines:
        ctx.exit(1)


def _trouble(error: ClientError) -> ClientError:
    return _Trouble(
        error.message,
        reason=error.reason,
        hint=error.hint,
        metadata=error.metadata,
        violations=error.violations,
        context=error.context,
    )
