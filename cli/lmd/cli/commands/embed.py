"""`lm embed`."""

from __future__ import annotations

from pathlib import Path

import click

from lmd.cli.context import App, pass_app
from lmd.cli.options import DURATION, MODEL, json_option


@click.command("embed", short_help="Turn texts into vectors")
@click.argument("model", type=MODEL)
@click.argument("texts", metavar="[TEXT]...", nargs=-1)
@click.option(
    "-f",
    "--file",
    "files",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    multiple=True,
    help="Embed the whole of a file as one text; may be repeated.",
)
@click.option("--truncate", is_flag=True, help="Cut the end of texts that are too long, instead of failing.")
@click.option(
    "--dimensions",
    type=click.IntRange(min=1),
    metavar="N",
    help="Keep the first N numbers of each vector; for models trained for that.",
)
@click.option("--raw", is_flag=True, help="Leave vectors as long as the model makes them, instead of length 1.")
@click.option("-o", "--option", "options", multiple=True, metavar="KEY=VALUE", help="Set a parameter; may be repeated.")
@click.option(
    "--keep-alive",
    type=DURATION,
    metavar="DURATION",
    help="How long the model stays in memory, such as 10m; -1 is for ever.",
)
@json_option
@pass_app
def command(
    app: App,
    /,
    model: str,
    texts: tuple[str, ...],
    files: tuple[Path, ...],
    truncate: bool,
    dimensions: int | None,
    raw: bool,
    options: tuple[str, ...],
    keep_alive: float | None,
    as_json: bool,
) -> None:
    """Turn texts into vectors: texts that mean alike get vectors that point alike.

    A TEXT of - stands for the lines of stdin, and so does no TEXT when something is piped in. Models made for
    embedding do it well; every model that generates can do it, by the mean over its tokens.

    Prints the first numbers of each vector; --json prints all of them.

    \b
    Examples:
      lm embed embeddinggemma "Why is the sky blue?"
      lm embed --json embeddinggemma - < sentences.txt | jq '.embeddings | length'
      lm embed --json --truncate -f a.md -f b.md embeddinggemma
    """
    from lmd.cli.embedding import duration, make_ready, print_embeddings, replies
    from lmd.cli.parameters import parse_options
    from lmd.cli.shapes import embeddings_json
    from lmd.cli.texts import batches, gather
    from lmd.v1 import inference_service_pb2 as pb

    parameters = parse_options(options)
    inputs = gather(texts, files, what="text")
    parts, stay = list(batches(inputs)), duration(keep_alive)
    with app.daemon() as client:
        name = make_ready(client, model, parameters, stay)

        def embed(part: list[str]) -> pb.EmbedResponse:
            request = pb.EmbedRequest(
                model=name, inputs=part, truncate=truncate, dimensions=dimensions or 0, raw=raw, parameters=parameters
            )
            if stay is not None:
                request.keep_alive.CopyFrom(stay)
            return client.call(client.inference.Embed, request)

        answers = list(replies(embed, parts, "texts"))
    if as_json:
        from lmd.cli.output import print_json

        print_json(embeddings_json(name, answers))
    else:
        print_embeddings(inputs, [embedding for answer in answers for embedding in answer.embeddings])
