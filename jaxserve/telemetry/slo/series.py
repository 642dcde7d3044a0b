"""Counts in buckets of time, and their sums over windows that end now.

A bucket is `width_s` long. A window is a whole number of buckets, the one that runs included, so
what it spans is at most one bucket shorter than it says. Sums are kept as counts come and buckets
leave, so that reading them costs nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

#: Columns of a count: see `judge.Verdict`.
Row = list[int]


class Series:
    """Counts of one thing, in buckets of one width.

    Args:
        windows_s: lengths of the windows that are summed; buckets are kept as long as the longest.
        num_columns: of a count.
    """

    def __init__(self, width_s: int, windows_s: Iterable[int], num_columns: int) -> None:
        self.width_s = width_s
        self._num_columns = num_columns
        self._lengths = {window_s: window_s // width_s for window_s in windows_s}
        self._sums: dict[int, Row] = {window_s: self._zeros() for window_s in self._lengths}
        self._longest = max(self._lengths.values())
        self._rows: dict[int, Row] = {}
        self._newest = 0
        self._changed: set[int] = set()

    def advance(self, now_s: float) -> None:
        """Lets what is older than a window leave it."""
        newest = int(now_s // self.width_s)
        if newest <= self._newest:
            return
        oldest, self._newest = self._newest, newest
        if newest - oldest > len(self._rows):  # it was long ago, or begins
            self._rebuild()
            return
        for window_s, length in self._lengths.items():
            sums = self._sums[window_s]
            for bucket in range(oldest - length + 1, newest - length + 1):
                row = self._rows.get(bucket)
                if row is not None:
                    for column, count in enumerate(row):
                        sums[column] -= count
        for bucket in range(oldest - self._longest + 1, newest - self._longest + 1):
            self._rows.pop(bucket, None)

    def add(self, at_s: float, column: int, count: int = 1) -> None:
        """Counts something; what is older than all windows is left out."""
        self.advance(at_s)
        bucket = int(at_s // self.width_s)
        age = self._newest - bucket
        if age >= self._longest:
            return
        row = self._rows.get(bucket)
        if row is None:
            row = self._rows[bucket] = self._zeros()
        row[column] += count
        self._changed.add(bucket)
        for window_s, length in self._lengths.items():
            if age < length:
                self._sums[window_s][column] += count

    def total(self, window_s: int) -> Row:
        """Counts of a window, as of the last `advance`; not to be changed."""
        return self._sums[window_s]

    def changed(self) -> dict[int, Row]:
        """Buckets that have changed since the last call, with their counts."""
        changed, self._changed = self._changed, set()
        return {bucket: list(self._rows[bucket]) for bucket in changed if bucket in self._rows}

    def unchanged(self, buckets: Iterable[int]) -> None:
        """Has `changed` give these once more: they could not be kept."""
        self._changed |= set(buckets)

    def restore(self, rows: Mapping[int, Row]) -> None:
        """What was kept, by its bucket."""
        for bucket, row in rows.items():
            self._rows[bucket] = list(row)
        self._rebuild()

    @property
    def oldest_bucket(self) -> int:
        """Before which nothing is of use any more."""
        return self._newest - self._longest + 1

    def __iter__(self) -> Iterator[tuple[int, Row]]:
        return iter(self._rows.items())

    def _rebuild(self) -> None:
        oldest = self.oldest_bucket
        self._rows = {bucket: row for bucket, row in self._rows.items() if bucket >= oldest}
        for window_s, length in self._lengths.items():
            sums = self._sums[window_s] = self._zeros()
            for bucket, row in self._rows.items():
                if bucket > self._newest - length:
                    for column, count in enumerate(row):
                        sums[column] += count

    def _zeros(self) -> Row:
        return [0] * self._num_columns
