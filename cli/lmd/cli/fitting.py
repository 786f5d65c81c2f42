"""What `lm fit` prints."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from lmd.cli.output import print_facts
from lmd.cli.shapes import shares_json
from lmd.cli.terminal import one_line, palette_for
from lmd.cli.units import format_size

if TYPE_CHECKING:
    from lmd.cli.shapes import Json
    from lmd.v1 import runtime_service_pb2 as pb


def fit_json(model: str, fit: pb.FitModelResponse) -> Json:
    """Return a fit for programs; the fields are those of the API, also of what does not fit."""
    return {
        "model": model,
        "fits": fit.fits,
        "reason": fit.reason,
        "total_bytes": fit.total_bytes,
        "weights_bytes": fit.weights_bytes,
        "kv_bytes": fit.kv_bytes,
        "compute_bytes": fit.compute_bytes,
        "beside_bytes": fit.beside_bytes,
        "measured": fit.measured,
        "devices": shares_json(fit.shares),
        "gpu_layers": fit.gpu_layers,
        "layers": fit.layers,
        "evicted": list(fit.evicted),
        "context_length": fit.context_length,
        "largest_context_length": fit.largest_context_length,
        "trained_context_length": fit.trained_context_length,
        "slots": fit.slots,
        "tokens_per_second": fit.tokens_per_second or None,
        "active_bytes": fit.active_bytes,
        "calibrated": fit.calibrated,
        "stored": fit.stored,
        "download_bytes": fit.download_bytes,
    }


def print_fit(model: str, fit: pb.FitModelResponse) -> None:
    """Print a fit for people: the answer first, then what it rests on."""
    palette = palette_for(sys.stdout)
    answer = "fits" if fit.fits else "does not fit"
    reason = one_line(fit.reason)
    # Most reasons begin with the answer.
    rest = reason.removeprefix(answer) if reason.startswith(answer) else f": {reason}"
    click.echo(f"{one_line(model)} {(palette.good if fit.fits else palette.error)(answer)}{rest}")
    click.echo()
    source = "as measured when it was loaded here" if fit.measured else "computed from its header"
    print_facts(
        [
            (
                "Memory",
                [
                    ("total", f"{format_size(fit.total_bytes)}, {source}"),
                    ("weights", format_size(fit.weights_bytes)),
                    ("context", f"{format_size(fit.kv_bytes)}{_for_requests(fit)}"),
                    ("compute", format_size(fit.compute_bytes)),
                    ("beside", _beside(fit)),
                ],
            ),
            ("Place", _place(fit)),
            (
                "Context",
                [
                    ("asked for", f"{fit.context_length} tokens for each request"),
                    ("largest", _largest(fit)),
                    ("trained", f"{fit.trained_context_length} tokens" if fit.trained_context_length else ""),
                ],
            ),
            (
                "Speed",
                [
                    ("expected", _speed(fit)),
                    ("each token", f"reads {format_size(fit.active_bytes)} of weights" if fit.active_bytes else ""),
                ],
            ),
            ("Download", [("still to fetch", format_size(fit.download_bytes) if fit.download_bytes else "")]),
        ]
    )


def _place(fit: pb.FitModelResponse) -> list[tuple[str, str]]:
    if not fit.fits:  # there is none
        return []
    return [
        ("devices", ", ".join(f"{format_size(share.bytes)} on {share.device}" for share in fit.shares)),
        ("layers", f"{fit.gpu_layers} of {fit.layers} on accelerators" if fit.gpu_layers else ""),
        ("leave for it", ", ".join(one_line(name) for name in fit.evicted)),
    ]


def _for_requests(fit: pb.FitModelResponse) -> str:
    return f", for {fit.slots} requests at once" if fit.slots > 1 else ""


def _beside(fit: pb.FitModelResponse) -> str:
    return f"{format_size(fit.beside_bytes)}, for a draft, adapters and parked prefixes" if fit.beside_bytes else ""


def _largest(fit: pb.FitModelResponse) -> str:
    if not fit.largest_context_length:
        return "none fits"
    return f"{fit.largest_context_length} tokens for each request"


def _speed(fit: pb.FitModelResponse) -> str:
    if not fit.tokens_per_second:
        return "not known before a model of about this size has answered here"
    speed = fit.tokens_per_second
    number = f"{speed:.0f}" if speed >= 10 else f"{speed:.1f}"
    source = "by what was measured here" if fit.calibrated else "by the bandwidth of the memory"
    return f"{number} tokens/s for one answer, {source}"
