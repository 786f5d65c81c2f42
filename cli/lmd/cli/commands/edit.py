"""`lm edit`."""

from __future__ import annotations

import click

from lmd.cli.context import App, announce, note, pass_app
from lmd.cli.options import MODEL, json_option


@click.command("edit", short_help="Change a model's Modelfile in an editor")
@click.argument("model", type=MODEL)
@json_option
@pass_app
def command(app: App, model: str, as_json: bool) -> None:
    """Change a model's Modelfile in an editor; the result is a new version of the model.

    Opens what `lm show --modelfile` prints in $VISUAL, $EDITOR, or an editor that is installed. Mistakes are shown,
    and on a terminal you may go on editing. Nothing happens when nothing changed, the file is empty, or the editor
    says by its exit status that it failed. Relative paths start at the working directory. `lm rollback` takes an edit
    back, `lm diff` shows it.

    \b
    Examples:
      lm edit poet
      EDITOR="code --wait" lm edit poet
      EDITOR="sed -i s/0.7/0.2/" lm edit poet
    """
    from lmd.cli.editing import edit
    from lmd.cli.output import print_json
    from lmd.cli.shapes import model_json

    before, after = edit(app, model)
    if as_json:
        print_json({**model_json(after), "changed": after.digest != before.digest})
    elif after.digest == before.digest:
        note(f"{before.name} is as it was")
    else:
        announce("edited", after.name, f"`lm diff {after.name}` shows what changed")
