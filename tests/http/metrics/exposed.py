"""Reads what /metrics says, with the client library's own parser."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families


class Exposed:
    """Samples by name and labels.

    Attributes:
        kinds: of families, by the name that the parser gives them (a counter's without _total).
    """

    def __init__(self, text: bytes | str) -> None:
        text = text if isinstance(text, str) else text.decode()
        self.text = text
        self.kinds: dict[str, str] = {}
        self.samples: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
        for family in text_string_to_metric_families(text):
            assert family.name not in self.kinds, f"{family.name} is there twice"
            self.kinds[family.name] = family.type
            for sample in family.samples:
                key = sample.name, frozenset(sample.labels.items())
                assert key not in self.samples, f"{key} is there twice"
                self.samples[key] = sample.value

    def value(self, name: str, **labels: str) -> float:
        """One sample."""
        return self.samples[name, frozenset(labels.items())]

    def has(self, name: str) -> bool:
        """Whether there is any sample of a name."""
        return any(key == name for key, _ in self.samples)

    def labels(self, name: str) -> list[dict[str, str]]:
        """Of all samples of a name."""
        return [dict(labels) for key, labels in self.samples if key == name]

    def buckets(self, name: str, **labels: str) -> dict[float, float]:
        """Cumulative counts of a histogram, by boundary."""
        return {
            float(dict(found)["le"]): value
            for (key, found), value in self.samples.items()
            if key == f"{name}_bucket" and dict(found) | labels == dict(found)
        }
