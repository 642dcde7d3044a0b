"""What docs/observability.md says of traces is so."""

from __future__ import annotations

import re
from pathlib import Path

from jaxserve.http.observer.parts import check_parts
from jaxserve.protocol.messages import Interval
from jaxserve.settings import load_config
from jaxserve.telemetry.tracing.content import MAX_CHARACTERS
from jaxserve.telemetry.tracing.export import MAX_ATTEMPTS
from jaxserve.telemetry.tracing.spans import spans_of
from tests.telemetry.tracing.records import record, sequence

PAGE = (Path(__file__).parent.parent.parent.parent / "docs" / "observability.md").read_text()


def test_the_configuration_is_one(tmp_path: Path) -> None:
    (block,) = re.findall(r"^```yaml\n(tracing:\n.*?)^```", PAGE, re.M | re.S)
    (tmp_path / "config.yaml").write_text(block)
    config = load_config(tmp_path / "config.yaml", environ={})
    check_parts(config)
    assert config.tracing.endpoint and config.tracing.slow_ttft_ms == 2000


def test_every_span_is_in_the_tables() -> None:
    kinds = ("held", "adapter", "grammar", "preempted", "swapped", "replay")
    for kind in kinds:
        assert kind in (Interval.__doc__ or ""), kind
    waits = [Interval(kind=kind, start_ns=600, end_ns=601) for kind in kinds]
    spans = spans_of(record(sequences=[sequence(intervals=waits)]))[1:]
    rows = " ".join(line.split("|")[1] for line in PAGE.splitlines() if line.startswith("|"))
    for span in spans:
        assert f"`{span.name}`" in rows, span.name
    assert len(spans) == 8 + len(kinds)


def test_its_numbers_are_those_of_the_code() -> None:
    assert f"{MAX_CHARACTERS:,} characters" in PAGE
    assert MAX_ATTEMPTS == 4 and "sent four times" in PAGE
