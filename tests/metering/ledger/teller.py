"""A process that adds to a ledger until it is killed; says what was acknowledged.

python -m tests.metering.ledger.teller ADDRESS FIRST      requests from FIRST on, five at a time
python -m tests.metering.ledger.teller ADDRESS FIRST --max-bytes N   … no file beyond N bytes
python -m tests.metering.ledger.teller ADDRESS FIRST --as UID        … as somebody else
"""

from __future__ import annotations

import argparse
import itertools
import os
import resource
from pathlib import Path

from jaxserve.errors import LedgerUnavailable
from jaxserve.metering.ledger.book import Ledger, database_at
from tests.metering.ledger.entries import entry, line

BATCH = 5


def main() -> None:
    """Adds, and prints the number of each request behind which all is kept."""
    parser = argparse.ArgumentParser()
    parser.add_argument("address")
    parser.add_argument("first", type=int)
    parser.add_argument("--max-bytes", type=int)
    parser.add_argument("--as", type=int, dest="uid")
    arguments = parser.parse_args()
    ledger = Ledger(database_at(arguments.address, Path()))
    if arguments.max_bytes:
        resource.setrlimit(resource.RLIMIT_FSIZE, (arguments.max_bytes, resource.RLIM_INFINITY))
    if arguments.uid:
        os.setuid(arguments.uid)
    for first in itertools.count(arguments.first, BATCH):
        numbers = range(first, first + BATCH)
        try:
            # Each repeats what the one before has told, as after an answer that was lost.
            ledger.add(
                [entry(number) for number in (*range(max(0, first - BATCH), first), *numbers)],
                [line(number + 1) for number in numbers],
            )
        except LedgerUnavailable as error:
            print(f"unavailable: {error.message}", flush=True)
            return
        print(first + BATCH, flush=True)


if __name__ == "__main__":
    main()
