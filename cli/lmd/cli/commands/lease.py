"""`lm lease`."""

from __future__ import annotations

import click

from lmd.cli.context import App, pass_app
from lmd.cli.errors import BadUsage
from lmd.cli.options import DURATION, SIZE


class _Leased(click.Command):
    """A command line whose end is another one."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Take all options before `--`, also behind SIZE; without it only those before SIZE, the rest is COMMAND's."""
        if "--" in args:
            ctx.allow_interspersed_args = True
            try:
                rest = super().parse_args(ctx, list(args))
                if len(ctx.params["words"]) == len(args) - args.index("--") - 1:
                    return rest
            except click.NoSuchOption:
                pass  # it may be COMMAND's, as is the `--` then
        ctx.allow_interspersed_args = False
        ctx.params.clear()
        rest = super().parse_args(ctx, list(args))
        if ctx.params["words"][:1] == ("--",):
            ctx.params["words"] = ctx.params["words"][1:]
        return rest


@click.command("lease", cls=_Leased, short_help="Run a command with memory that models leave to it")
@click.argument("size_bytes", metavar="SIZE", type=SIZE)
@click.option(
    "-d", "--device", default="", help="Whose memory: `cpu`, `cuda0` and so on; else the largest accelerator's."
)
@click.option("-w", "--wait", "wait_s", type=DURATION, help="Give up when the memory is not there after this time.")
@click.argument("words", metavar="[--] COMMAND [ARGS]...", nargs=-1, type=click.UNPROCESSED)
@pass_app
def command(app: App, size_bytes: int, device: str, wait_s: float | None, words: tuple[str, ...]) -> None:
    """Run COMMAND while models leave SIZE bytes of memory to it.

    Models that are idle leave memory for it, those that answer finish first. While COMMAND runs, nothing is loaded into
    that memory; what COMMAND itself uses counts as a part of it. The lease ends with COMMAND, or with `lm`.

    The exit status is that of COMMAND, or 128 and the number of the signal that ended it. Signals that `lm` gets are
    passed on. Only `lm`'s own failures are told on stderr; both streams are COMMAND's otherwise.

    \b
    Examples:
      lm lease 8GiB -- python train.py
      lm lease --device cuda1 20GB -- make bench
      lm lease --wait 10m 6GiB -- ./render --frames 100
    """
    from lmd.cli.leasing import run_leased

    if size_bytes <= 0:
        raise BadUsage("a lease needs a SIZE above 0", hint="write a size such as `8GiB`")
    if not words:
        raise BadUsage("which command?", hint="write `lm lease SIZE -- COMMAND`")
    if words[0].startswith("-"):
        raise BadUsage(f"`{words[0]}` is no command", hint="write options before SIZE, or `--` before the command")
    status = run_leased(app, words, size_bytes=size_bytes, device=device, wait_s=wait_s)
    click.get_current_context().exit(status)
