"""`lm fit`."""

from __future__ import annotations

import click

from lmd.cli.context import App, pass_app
from lmd.cli.errors import EXIT_FAILURE
from lmd.cli.options import MODEL, json_option


@click.command("fit", short_help="Tell whether a model fits in memory")
@click.argument("model", type=MODEL)
@click.option(
    "-o", "--option", "options", multiple=True, metavar="KEY=VALUE", help="Ask for a setting, such as num_ctx."
)
@json_option
@pass_app
def command(app: App, model: str, options: tuple[str, ...], as_json: bool) -> None:
    """Tell whether a model fits in memory, where it would go, and what would have to leave for it.

    Nothing is loaded or evicted. Of a MODEL that is not in the store only the header is fetched, so it can be asked
    before a download; a token for gated repositories is taken from HF_TOKEN.

    The speed is the bandwidth of the memory over the weights that each token reads; of a mixture of experts those are
    its active ones. It is known once a model of about that size has answered on this machine.

    The exit status is 0 when the model fits, 1 when it does not. No place is shown then; with --json, `devices` says
    what it lacks room for.

    \b
    Examples:
      lm fit llama3.2
      lm fit hf.co/Qwen/Qwen3-30B-A3B-GGUF:Q4_K_M -o num_ctx=32768
      lm fit --json llama3.2 | jq '{fits, total_bytes, largest_context_length}'
    """
    from lmd.cli.fitting import fit_json, print_fit
    from lmd.cli.output import print_json
    from lmd.cli.parameters import parse_options
    from lmd.cli.pulling import token_from_environment
    from lmd.cli.spinner import Spinner
    from lmd.v1 import runtime_service_pb2 as pb

    request = pb.FitModelRequest(name=model, parameters=parse_options(options), token=token_from_environment())
    spinner = Spinner()
    with app.daemon() as client:
        spinner.say(f"looking at {model}")
        try:
            fit = client.call(client.runtime.FitModel, request)
        finally:
            spinner.clear()
    if as_json:
        print_json(fit_json(model, fit))
    else:
        print_fit(model, fit)
    if not fit.fits:
        click.get_current_context().exit(EXIT_FAILURE)
