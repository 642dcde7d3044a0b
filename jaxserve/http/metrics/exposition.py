"""Prometheus' text format (version 0.0.4), and OpenMetrics (1.0), written line by line.

The client library's own writer takes some 12 µs a sample, on the event loop that streams tokens;
this takes a tenth. Sources: prometheus.io/docs/instrumenting/exposition_formats,
prometheus.io/docs/specs/om/open_metrics_spec.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Sequence

from jaxserve.http.metrics.exemplars import Exemplar

CONTENT_TYPE = b"text/plain; version=0.0.4; charset=utf-8"
OPEN_CONTENT_TYPE = b"application/openmetrics-text; version=1.0.0; charset=utf-8"
#: OpenMetrics' last line.
END = b"# EOF\n"


class Text:
    """The text, as it grows: `head` once for a name, then its samples.

    Values that are no numbers are left out: a gap is honest, and NaN spoils every sum it is in.
    """

    def __init__(self) -> None:
        self._lines: list[str] = []

    def head(self, name: str, kind: str, documentation: str) -> None:
        """Begins a family. A counter's name ends in _total, as its samples' do."""
        self._lines.append(f"# HELP {name} {documentation}\n# TYPE {name} {kind}\n")

    def sample(self, name: str, labels: str, value: float) -> None:
        """One value.

        Args:
            labels: as `label_text` gives them.
        """
        if math.isfinite(value):
            braces = f"{{{labels}}}" if labels else ""
            self._lines.append(f"{name}{braces} {float(value)!r}\n")

    def histogram(
        self,
        name: str,
        labels: str,
        bounds: Sequence[float],
        counts: Sequence[float],
        total: float,
        exemplars: Sequence[Exemplar | None] = (),
    ) -> None:
        """One histogram.

        Args:
            counts: cumulative, one for each bound, then that of all.
            total: of what was observed.
            exemplars: one for each count, or none at all; this format does not know them.
        """
        comma = "," if labels else ""
        head = f"{name}_bucket{{{labels}{comma}le="
        texts = _bound_texts(tuple(bounds))
        lines = [
            f"{head}{text} {float(count)!r}{tail}\n"
            for text, count, tail in zip(texts, counts, self.tails(exemplars), strict=False)
        ]
        braces = f"{{{labels}}}" if labels else ""
        lines.append(f"{name}_count{braces} {float(counts[-1])!r}\n")
        lines.append(f"{name}_sum{braces} {float(total)!r}\n")
        self._lines.append("".join(lines))

    def tails(self, exemplars: Sequence[Exemplar | None]) -> Iterable[str]:
        """What follows the counts of a histogram, on their lines."""
        return itertools.repeat("")

    def encoded(self) -> bytes:
        """All of it."""
        return "".join(self._lines).encode()


class OpenText(Text):
    """The same as OpenMetrics; END comes after all that is told."""

    def head(self, name: str, kind: str, documentation: str) -> None:
        """Begins a family: a counter's is called without _total."""
        if kind == "counter":
            name = name.removesuffix("_total")
        super().head(name, kind, documentation)

    def tails(self, exemplars: Sequence[Exemplar | None]) -> Iterable[str]:
        """The exemplars."""
        if not exemplars:
            return itertools.repeat("")
        return [
            f' # {{trace_id="{one.trace_id}"}} {one.value!r} {one.at_s:.3f}' if one else ""
            for one in exemplars
        ]


def wants_open(accept: str) -> bool:
    """Whether an Accept header asks for OpenMetrics, and not rather for plain text."""
    weights = {"application/openmetrics-text": 0.0, "text/plain": 0.0}
    for entry in accept.lower().split(","):
        kind, *parameters = (part.strip() for part in entry.split(";"))
        if kind not in weights:
            continue
        weight = 1.0
        for parameter in parameters:
            name, _, value = parameter.partition("=")
            if name.strip() == "q":
                try:
                    weight = float(value)
                except ValueError:
                    weight = 0.0
        weights[kind] = max(weights[kind], weight)
    wanted, plain = weights.values()
    return wanted > 0 and wanted >= plain


def label_text(names: Iterable[str], values: Iterable[str], *, keep_empty: bool = False) -> str:
    """Labels as they stand between braces.

    Args:
        keep_empty: whether to write those without a value (the anonymous tenant's for one), which
            mean the same to Prometheus as none.
    """
    return ",".join(
        f'{name}="{_escaped(value)}"'
        for name, value in zip(names, values, strict=True)
        if value or keep_empty
    )


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


@functools.cache
def _bound_texts(bounds: tuple[float, ...]) -> list[str]:
    return [f'"{float(bound)!r}"}}' for bound in bounds] + ['"+Inf"}']
