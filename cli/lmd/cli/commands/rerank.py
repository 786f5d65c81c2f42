"""`lm rerank`."""

from __future__ import annotations

from pathlib import Path

import click

from lmd.cli.context import App, pass_app
from lmd.cli.errors import BadUsage
from lmd.cli.options import DURATION, MODEL, json_option


@click.command("rerank", short_help="Rank documents by how well they answer a query")
@click.argument("model", type=MODEL)
@click.argument("query")
@click.argument("documents", metavar="[DOCUMENT]...", nargs=-1)
@click.option(
    "-f",
    "--file",
    "files",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    multiple=True,
    help="Rank the whole of a file as one document; may be repeated.",
)
@click.option("-n", "--top", type=click.IntRange(min=1), metavar="N", help="Print the best N only.")
@click.option("--truncate", is_flag=True, help="Cut the end of documents that are too long, instead of failing.")
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
    query: str,
    documents: tuple[str, ...],
    files: tuple[Path, ...],
    top: int | None,
    truncate: bool,
    keep_alive: float | None,
    as_json: bool,
) -> None:
    """Rank documents by how well they answer a query, best first.

    A DOCUMENT of - stands for the lines of stdin, and so does no DOCUMENT when something is piped in. Only models made
    for ranking can do it; `lm show` lists what a model can do. Scores of different queries cannot be compared.

    \b
    Examples:
      lm rerank ./reranker.gguf "Why is the sky blue?" "Light scatters." "Ice is slippery."
      lm rerank --top 3 ./reranker.gguf "Why is the sky blue?" - < sentences.txt
      lm rerank --json ./reranker.gguf "error handling" -f a.md -f b.md
    """
    from lmd.cli.embedding import duration, make_ready, print_ranking, replies
    from lmd.cli.texts import MAX_TEXTS, gather
    from lmd.v1 import inference_service_pb2 as pb

    texts = gather(documents, files, what="document")
    if len(texts) > MAX_TEXTS:
        raise BadUsage(f"{len(texts)} documents are more than the {MAX_TEXTS} that can be ranked at once")
    stay = duration(keep_alive)
    with app.daemon() as client:
        name = make_ready(client, model, keep_alive=stay)

        def rerank(part: list[str]) -> pb.RerankResponse:
            request = pb.RerankRequest(model=name, query=query, documents=part, top_n=top or 0, truncate=truncate)
            if stay is not None:
                request.keep_alive.CopyFrom(stay)
            return client.call(client.inference.Rerank, request)

        (ranking,) = replies(rerank, [texts], "documents")
    if as_json:
        from lmd.cli.output import print_json
        from lmd.cli.shapes import ranking_json

        print_json(ranking_json(name, texts, ranking))
    else:
        print_ranking(texts, ranking.results)
