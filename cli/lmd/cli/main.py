"""The entry point of `lm`. Loads a command's code only when that command runs: `lm --help` loads none."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import click

from lmd.cli.command_table import COMMANDS, SECTIONS
from lmd.cli.context import App
from lmd.cli.errors import EXIT_FAILURE, EXIT_INTERRUPTED, BadUsage, ClientError, show_error
from lmd.cli.terminal import is_terminal

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem


class LazyGroup(click.Group):
    """A group whose commands are modules, imported when they are asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names in the order of the help."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return the command, loading its module."""
        if cmd_name not in COMMANDS:
            return None
        command = import_module(f"lmd.cli.commands.{cmd_name}").command
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command, or name close ones."""
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            from difflib import get_close_matches

            close = get_close_matches(args[0], COMMANDS, n=2)
            hint = f"did you mean {' or '.join(f'`lm {name}`' for name in close)}?" if close else "see `lm --help`"
            raise BadUsage(f"no command `{args[0]}`", hint=hint)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands by section, from the table."""
        width = max(map(len, COMMANDS))
        for section, commands in SECTIONS.items():
            with formatter.section(section):
                formatter.write_dl([(name.ljust(width), text) for name, text in commands.items()])

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Complete command names from the table."""
        from click.shell_completion import CompletionItem

        found = [CompletionItem(n, help=text) for n, text in COMMANDS.items() if n.startswith(incomplete)]
        return found + click.Command.shell_complete(self, ctx, incomplete)


def _print_version(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        from lmd.v1.version import __version__

        click.echo(f"lm {__version__}")
        ctx.exit()


@click.group(
    cls=LazyGroup,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    subcommand_metavar="COMMAND [ARGS]...",
    epilog="`lm COMMAND --help` explains a command and shows examples.",
)
@click.option("--socket", type=click.Path(path_type=Path), help="Use the daemon at this socket, and no other.")
@click.option("--no-start", is_flag=True, help="Fail when no daemon runs, instead of starting one.")
@click.option("-v", "--verbose", is_flag=True, help="Say more about connections and errors.")
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_version,
    help="Show the version of `lm` and exit.",
)
@click.pass_context
def cli(ctx: click.Context, socket: Path | None, no_start: bool, verbose: bool) -> None:
    """Run language models on this machine.

    The daemon `lmd` stores, loads and serves models; `lm` talks to it, and starts one for you when none runs.

    \b
      lm run llama3.2                   chat with a model, pulling it first
      lm run llama3.2 "Why is ice slippery?"
      lm ls                             what is stored
      lm ps                             what is in memory
    """
    ctx.obj = App(socket=socket, may_start=not no_start, verbose=verbose)
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


def run(args: Sequence[str]) -> int:
    """Run `lm` with *args*, print errors the way the caller asked for, and return the exit status."""
    options = args[: args.index("--")] if "--" in args else args
    try:
        _require_text(args)
        # Not through Click's own main: what it makes of Ctrl-C and closed pipes changes between its versions.
        with cli.make_context("lm", list(args)) as context:
            cli.invoke(context)
        return 0
    except click.exceptions.Exit as done:
        return done.exit_code
    except ClientError as error:
        return _fail(error, options)
    except click.ClickException as error:
        return _fail(_usage_error(error), options)
    except KeyboardInterrupt:
        if is_terminal(sys.stderr):
            click.echo(err=True)  # ends the line of the terminal's ^C
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        return _reader_left()


def _require_text(args: Sequence[str]) -> None:
    for arg in args:
        try:
            arg.encode()
        except UnicodeEncodeError:
            shown = arg.encode(errors="replace").decode()
            raise BadUsage(f"the argument `{shown}` is not text in UTF-8") from None


def _fail(error: ClientError, options: Sequence[str]) -> int:
    if "--json" in options:
        import json

        click.echo(json.dumps(error.as_json(), ensure_ascii=False), err=True)
    else:
        show_error(error, verbose="-v" in options or "--verbose" in options)
    return error.exit_code


def _usage_error(error: click.ClickException) -> ClientError:
    """Return Click's complaint in our words and layout."""
    message = error.format_message().rstrip(".")
    message = message[:1].lower() + message[1:]
    if isinstance(error, click.UsageError) and error.ctx is not None:
        return BadUsage(message, hint=f"see `{error.ctx.command_path} --help`")
    return ClientError(message, reason="FAILED")


def _reader_left() -> int:
    """Leave quietly when the reader of our output is gone, as `lm ls | head -1` makes it."""
    # The interpreter flushes at exit; there is nobody to flush to.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return EXIT_FAILURE


def main() -> None:
    """Run the command line of this process."""
    # Ending through SystemExit leaves the terminal as it was found.
    if "_LM_COMPLETE" in os.environ:
        cli.main(prog_name="lm", complete_var="_LM_COMPLETE")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        status = run(sys.argv[1:])
    except SystemExit as done:
        status = done.code if isinstance(done.code, int) else EXIT_FAILURE
    leave(status)


def leave(status: int) -> NoReturn:
    """End the process, without taking the interpreter apart where gRPC is loaded.

    A thread of gRPC that is stopped by the interpreter's end may hold the lock of a stream, and the stream's `__del__`
    then waits for it for ever: one of 80 commands never ended on a busy machine (grpcio 1.85, Python 3.11.2).
    """
    if "grpc" not in sys.modules:
        sys.exit(status)
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except BrokenPipeError:
        status = EXIT_FAILURE
    os._exit(status)


if __name__ == "__main__":
    main()
