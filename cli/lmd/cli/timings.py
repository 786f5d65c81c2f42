"""Counts and timings of an answer."""

from __future__ import annotations

import click

from lmd.cli.shapes import seconds
from lmd.cli.units import format_elapsed
from lmd.v1 import inference_service_pb2 as pb


def print_timings(done: pb.AnswerDone) -> None:
    """Print counts and timings on stderr."""
    prompt_s, generate_s = seconds(done.prompt_duration), seconds(done.generate_duration)
    computed = done.prompt_tokens - done.cached_tokens
    # The time and the speed are those of what was computed, so that is what they stand beside.
    prompt = f"{computed} of {_tokens(done.prompt_tokens)} computed" if done.cached_tokens else _tokens(computed)
    reused = f", {done.cached_tokens} reused" if done.cached_tokens else ""
    rows = [
        ("total", format_elapsed(seconds(done.total_duration))),
        ("load", format_elapsed(seconds(done.load_duration))),
        ("queue", format_elapsed(seconds(done.queue_duration))),
        ("prompt", f"{prompt} in {format_elapsed(prompt_s)}{_rate(computed, prompt_s)}{reused}"),
        (
            "answer",
            f"{_tokens(done.generated_tokens)} in {format_elapsed(generate_s)}"
            f"{_rate(done.generated_tokens, generate_s)}",
        ),
    ]
    if done.drafted_tokens:
        share = done.accepted_tokens / done.drafted_tokens
        rows.append(("draft", f"{_tokens(done.drafted_tokens)}, {done.accepted_tokens} accepted ({share:.0%})"))
    rows.append(("seed", str(done.seed)))
    click.echo(err=True)
    for label, value in rows:
        click.echo(f"{label:<8}{value}", err=True)


def _tokens(count: int) -> str:
    return "1 token" if count == 1 else f"{count} tokens"


def _rate(tokens: int, elapsed_s: float) -> str:
    return f", {tokens / elapsed_s:.1f} tokens/s" if tokens > 0 and elapsed_s > 0 else ""
