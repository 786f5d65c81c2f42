"""What became of the cases: figures, ratios, and a table of them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from bench.meter import Usage
from bench.serving_cases import Bar, Case

NOISY_CORES = 0.15
"""What else may run on the machine during a measurement, in cores."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One measurement of one server."""

    figures: dict[str, float]
    usage: Usage

    def disturbed(self, case: Case) -> bool:
        """Tell whether something else used the machine; where that belongs to the case, nobody can say."""
        return case.undisturbed and self.usage.others > NOISY_CORES


@dataclass(slots=True)
class CaseResult:
    """All measurements of one case."""

    case: Case
    samples: dict[str, list[Sample]] = field(default_factory=lambda: {"ours": [], "theirs": []})

    def add(self, server: str, sample: Sample) -> None:
        self.samples[server].append(sample)

    def median(self, server: str, metric: str) -> float:
        return statistics.median(sample.figures[metric] for sample in self.samples[server])

    def rows(self) -> list[tuple[Bar, float, float, float, bool]]:
        """Return each bar with our figure, theirs, what is compared, and whether it is met."""
        found = []
        for bar in self.case.bars:
            ours, theirs = self.median("ours", bar.metric), self.median("theirs", bar.metric)
            found.append((bar, ours, theirs, bar.compare(ours, theirs), bar.met(ours, theirs)))
        return found

    def warnings(self) -> list[str]:
        """Return what makes the figures doubtful."""
        found = []
        counts = {
            server: {
                metric: [sample.figures[metric] for sample in samples]
                for metric in samples[0].figures
                if metric.endswith("prompt_tokens")
            }
            for server, samples in self.samples.items()
        }
        if sorted(map(str, _flat(counts["ours"]))) != sorted(map(str, _flat(counts["theirs"]))):
            found.append(f"the servers count different prompts: {counts}")
        usages = [sample.usage for samples in self.samples.values() for sample in samples]
        if (idle := max(usage.idle for usage in usages)) > NOISY_CORES:
            found.append(f"the other server used {idle:.2f} cores")
        disturbed = [
            sample.usage.others
            for samples in self.samples.values()
            for sample in samples
            if sample.disturbed(self.case)
        ]
        if disturbed:
            found.append(f"something else used up to {max(disturbed):.2f} cores in {len(disturbed)} measurements")
        return found

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.case.name,
            "bars": [
                {"metric": bar.metric, "bar": bar.text, "ours": ours, "theirs": theirs, "value": value, "met": met}
                for bar, ours, theirs, value, met in self.rows()
            ],
            "warnings": self.warnings(),
            "samples": {
                server: [{**sample.figures, "usage": asdict(sample.usage)} for sample in samples]
                for server, samples in self.samples.items()
            },
        }

    def line(self) -> str:
        """Return one line for those who watch."""
        parts = [
            f"{bar.metric} {ours:.3g} to {theirs:.3g}: {value:.3g} ({bar.text}{'' if met else ', MISSED'})"
            for bar, ours, theirs, value, met in self.rows()
        ]
        if not parts:
            ours, theirs = (self.median(server, "tokens_per_s") for server in ("ours", "theirs"))
            parts = [f"tokens_per_s {ours:.3g} to {theirs:.3g}: {ours / theirs:.3g}"]
        return "; ".join([*parts, *self.warnings()])


def _flat(counts: dict[str, list[float]]) -> list[float]:
    return [value for values in counts.values() for value in values]


def table(results: Sequence[CaseResult], whole: dict[str, Any]) -> str:
    """Return all of it in Markdown."""
    lines = ["| case | figure | ours | llama-server | compared | bar | met |", "|---|---|---|---|---|---|---|"]
    for result in results:
        for bar, ours, theirs, value, met in result.rows():
            unit = " MB" if bar.kind == "+" else ""
            lines.append(
                f"| {result.case.title} | {bar.metric} | {ours:.3g} | {theirs:.3g} | {value:.3g}{unit} | {bar.text} "
                f"| {'yes' if met else '**no**'} |"
            )
    if restart := whole.get("restart"):
        lines.append(
            f"| restart, 2,000 tokens of conversation | resumed to read | {restart['resumed_ttft_s']:.3g} "
            f"| {restart['read_ttft_s']:.3g} (ours) | {restart['ratio']:.3g} | <= 0.15 x "
            f"| {'yes' if restart['met'] else '**no**'} |"
        )
    lines += _curve(results, whole.get("limits", {}))
    warnings = [f"- {result.case.name}: {warning}" for result in results for warning in result.warnings()]
    if warnings:
        lines += ["", "Doubts:", "", *warnings]
    return "\n".join(lines)


def _curve(results: Sequence[CaseResult], limits: dict[str, Any]) -> list[str]:
    """Return tokens a second by number of clients, beside what the engine does without a server."""
    batched = limits.get("llama_batched_bench", {})
    points = [result for result in results if result.case.name.startswith("curve-")]
    lines = []
    if points:
        lines += [
            "",
            "| clients | ours, tokens/s | llama-server | ratio | llama-batched-bench |",
            "|---|---|---|---|---|",
        ]
    for result in points:
        ours, theirs = (result.median(server, "tokens_per_s") for server in ("ours", "theirs"))
        clients = result.case.name.removeprefix("curve-")
        limit = batched.get(clients, {}).get("tokens_per_s")
        beside = f"{limit:.1f}" if limit else ""
        lines.append(f"| {clients} | {ours:.1f} | {theirs:.1f} | {ours / theirs:.2f} | {beside} |")
    if alone := limits.get("llama_bench"):
        lines += ["", f"llama-bench: {', '.join(f'{name} {value:g}' for name, value in alone.items())}"]
    return lines
