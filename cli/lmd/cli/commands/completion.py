"""`lm completion`."""

from __future__ import annotations

import click

_SHELLS = ("bash", "zsh", "fish")


@click.command("completion", short_help="Print a shell's completion script")
@click.argument("shell", type=click.Choice(_SHELLS))
@click.pass_context
def command(ctx: click.Context, shell: str) -> None:
    """Print the completion script of a shell.

    It completes commands, options and the names of stored models; for the names it asks a daemon that runs and never
    starts one.

    \b
    Examples:
      lm completion bash > ~/.local/share/bash-completion/completions/lm
      lm completion zsh > "${fpath[1]}/_lm"
      lm completion fish > ~/.config/fish/completions/lm.fish
    """
    from click.shell_completion import get_completion_class

    completion = get_completion_class(shell)
    assert completion is not None
    click.echo(completion(ctx.find_root().command, {}, "lm", "_LM_COMPLETE").source())
