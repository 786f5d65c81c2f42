"""What `lm ps --plan` shows."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from lmd.cli.output import print_table
from lmd.cli.shapes import Json, enum_text, seconds, shares_json, time_text, unix_time
from lmd.cli.terminal import is_terminal, palette_for
from lmd.cli.units import format_elapsed, format_size, format_span

if TYPE_CHECKING:
    from lmd.v1 import runtime_service_pb2 as pb


def plan_json(plan: pb.GetPlanResponse) -> Json:
    """Return `lm ps --plan --json`."""
    return {
        "waiting": [decision_json(decision) for decision in plan.waiting],
        "recent": [decision_json(decision) for decision in plan.recent],
    }


def decision_json(decision: pb.Decision) -> Json:
    """Return one decision."""
    return {
        "name": decision.name,
        "action": enum_text(decision, "action"),
        "shares": shares_json(decision.shares),
        "others": list(decision.others),
        "reason": decision.reason,
        "time": time_text(decision.time),
        "needed_bytes": decision.needed_bytes,
        "waited_seconds": round(seconds(decision.waited), 3),
    }


def print_plan(plan: pb.GetPlanResponse, now: float) -> None:
    """Print what waits, and then the decisions, latest first."""
    if plan.waiting:
        print_table(
            ["WAITING", "FOR", "NEEDS", "REASON"],
            [
                [
                    decision.name,
                    format_elapsed(seconds(decision.waited)),
                    format_size(decision.needed_bytes),
                    decision.reason,
                ]
                for decision in plan.waiting
            ],
            right=("FOR", "NEEDS"),
            optional=("NEEDS",),
            wrapped="REASON",
        )
        click.echo()
    elif is_terminal(sys.stdout):
        click.echo(palette_for(sys.stdout).faint("nothing waits for memory"))
        click.echo()
    if not plan.recent:
        if is_terminal(sys.stdout):
            click.echo(palette_for(sys.stdout).faint("nothing was decided yet"))
        return
    print_table(
        ["DECIDED", "NAME", "ACTION", "REASON"],
        [_row(decision, now) for decision in plan.recent],
        wrapped="REASON",
    )


def _row(decision: pb.Decision, now: float) -> Sequence[str]:
    return [
        f"{format_span(now - unix_time(decision.time))} ago",
        decision.name,
        enum_text(decision, "action"),
        decision.reason,
    ]
