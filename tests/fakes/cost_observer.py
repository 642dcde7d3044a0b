"""An observer's process that prices requests into a file: entries, lines, and steps.

The file is `ledger.jsonl` in the state's directory, a document a line, written once each.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from pathlib import Path

from jaxserve.config import Config
from jaxserve.http.observer import process
from jaxserve.http.observer.metering import Metering
from jaxserve.http.observer.part import Part
from jaxserve.metering.entry import Entry, Line
from jaxserve.protocol.status import StepStats

FILE = "ledger.jsonl"


class FileLedger:
    """A `Ledger` that a test can read."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen: set[tuple] = set()
        if path.exists():
            self._seen = {_key(json.loads(line)) for line in path.read_text().splitlines()}

    def add(self, entries: Sequence[Entry], lines: Sequence[Line]) -> None:
        """See `Ledger`."""
        self.write([dataclasses.asdict(item) for item in (*entries, *lines)])

    def month_totals(self, month: str) -> Mapping[str, Decimal]:
        """See `Ledger`."""
        return {}

    def write(self, documents: list[dict]) -> None:
        """Appends those that are not there."""
        with self._path.open("a") as file:
            for document in documents:
                if _key(document) not in self._seen:
                    self._seen.add(_key(document))
                    file.write(json.dumps(document, default=str) + "\n")


def _key(document: dict) -> tuple:
    if "request_id" in document:
        return (document["request_id"],)
    return document.get("source"), document.get("number"), document.get("step_ns")


def make_parts(
    config: Config, state: Path, tell: Callable[[str, bytes], None], news: object
) -> list[Part]:
    """The part that prices, and one that writes steps down."""
    ledger = FileLedger(state / FILE)

    def step(stats: StepStats) -> None:
        ledger.write([{"step_ns": stats.at_ns, "device_ns": stats.device_ns}])

    metering = Metering(config.metering, ledger, tell, state)
    return [metering.part, Part(name="steps", step=step)]


if __name__ == "__main__":
    process.make_parts = make_parts
    sys.exit(process.main())
