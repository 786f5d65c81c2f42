"""Embeddings and ranks: asks the daemon, with a spinner meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

from google.protobuf.duration_pb2 import Duration

from lmd.cli.loading import ensure_model, load
from lmd.cli.output import print_table, shorten
from lmd.cli.spinner import Spinner
from lmd.cli.terminal import one_line, quiet_keyboard
from lmd.cli.ticking import with_ticks
from lmd.v1 import model_pb2

if TYPE_CHECKING:
    from lmd.cli.client import Client
    from lmd.v1 import inference_service_pb2 as pb

Reply = TypeVar("Reply")

#: Numbers of a vector, and cells of a text, that people are shown.
_SHOWN_NUMBERS = 4
_SHOWN_CELLS = 50


def duration(seconds: float | None) -> Duration | None:
    """Return a time as the wire has it; None is none."""
    if seconds is None:
        return None
    message = Duration()
    message.FromNanoseconds(int(seconds * 1e9))
    return message


def make_ready(
    client: Client, model: str, parameters: model_pb2.Parameters | None = None, keep_alive: Duration | None = None
) -> str:
    """Bring a model into the store and into memory; return its name.

    Raises:
        ClientError: there is no such model, or it cannot be loaded.
    """
    name = ensure_model(client, model).model.name
    load(client, name, parameters or model_pb2.Parameters(), keep_alive)
    return name


def replies(ask: Callable[[list[str]], Reply], parts: Sequence[list[str]], what: str) -> Iterator[Reply]:
    """Yield what *ask* returns for each part; meanwhile a spinner tells how many of all *what* are done.

    Raises:
        ClientError: a call fails.
    """
    spinner = Spinner()
    done, total = 0, sum(map(len, parts))
    left = iter(parts)

    def say() -> None:
        spinner.say(f"{done} of {total} {what} done" if total > 1 else "")

    say()
    try:
        with quiet_keyboard():
            for reply in with_ticks(map(ask, parts)):
                if reply is None:
                    spinner.refresh()
                    continue
                done += len(next(left))
                say()
                yield reply
    finally:
        spinner.clear()


def print_embeddings(texts: Sequence[str], embeddings: Sequence[pb.Embedding]) -> None:
    """Print the first numbers of each vector beside its text."""
    rows = []
    for text, embedding in zip(texts, embeddings, strict=True):
        first = " ".join(f"{number: .4f}" for number in embedding.values[:_SHOWN_NUMBERS])
        more = " …" if len(embedding.values) > _SHOWN_NUMBERS else ""
        rows.append([str(embedding.prompt_tokens), str(len(embedding.values)), first + more, _short(text)])
    print_table(["TOKENS", "NUMBERS", "VECTOR", "TEXT"], rows, right=("TOKENS", "NUMBERS"), optional=("NUMBERS",))


def print_ranking(documents: Sequence[str], results: Sequence[pb.RankedDocument]) -> None:
    """Print documents, best first, with their scores and their places in the request, counted from 0."""
    rows = [[f"{result.score:.4f}", str(result.index), _short(documents[result.index])] for result in results]
    print_table(["SCORE", "INDEX", "DOCUMENT"], rows, right=("SCORE", "INDEX"))


def _short(text: str) -> str:
    return shorten(one_line(text), _SHOWN_CELLS)
