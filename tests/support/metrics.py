"""Reads what `/metrics` says."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families


class Values:
    """The samples of a text in Prometheus' format; one that stands twice is a failure."""

    def __init__(self, text: str) -> None:
        self._samples: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                key = sample.name, frozenset(sample.labels.items())
                assert key not in self._samples, f"{key} stands twice"
                self._samples[key] = sample.value

    def __call__(self, name: str, **labels: str) -> float | None:
        """Return a value; None when there is none with exactly these labels."""
        return self._samples.get((name, frozenset(labels.items())))

    def labelled(self, name: str) -> list[tuple[dict[str, str], float]]:
        """Return all values of one name with their labels."""
        return [(dict(labels), value) for (known, labels), value in self._samples.items() if known == name]

    def by(self, name: str, label: str) -> dict[str, float]:
        """Return the sums of one name for each value of a label."""
        sums: dict[str, float] = {}
        for labels, value in self.labelled(name):
            sums[labels[label]] = sums.get(labels[label], 0) + value
        return sums
