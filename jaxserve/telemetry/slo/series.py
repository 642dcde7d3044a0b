"""Counts in buckets of time, and their sums over windows that end now.

A bucket is `width_s` long. A window is a whole number of buckets, the one that runs included, so
what it spans is at most one bucket shorter than it says. What comes now is counted in the open
bucket alone; when that closes it is added to the sums of all windows, and what has become too old
is taken from them. So counting and reading cost next to nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

#: Columns of a count: see `judge.Verdict`.
Row = list[int]


class Series:
    """Counts of one thing, in buckets of one width.

    Args:
        windows_s: lengths of the windows that are summed; buckets are kept as long as the longest.
        num_columns: of a count.
    """

    def __init__(self, width_s: int, windows_s: Iterable[int], num_columns: int) -> None:
        self._width_s = width_s
        self._num_columns = num_columns
        self._lengths = {window_s: window_s // width_s for window_s in windows_s}
        self._longest = max(self._lengths.values())
        self._sums: dict[int, Row] = {window_s: self._zeros() for window_s in self._lengths}
        self._rows: dict[int, Row] = {}  # of closed buckets, those of the sums and no others
        self._newest = 0
        self._open = self._zeros()
        self._changed: set[int] = set()

    def advance(self, now_s: float) -> None:
        """Closes the open bucket if it is over, and lets what is too old leave its window."""
        newest = int(now_s // self._width_s)
        if newest <= self._newest:
            return
        self._close()
        oldest, self._newest = self._newest, newest
        if newest - oldest > len(self._rows):  # it was long ago, or begins
            self._rebuild()
            return
        for window_s, length in self._lengths.items():
            for bucket in range(oldest - length + 1, newest - length + 1):
                if (row := self._rows.get(bucket)) is not None:
                    _add(self._sums[window_s], row, -1)
        for bucket in range(oldest - self._longest + 1, newest - self._longest + 1):
            self._rows.pop(bucket, None)

    def add(self, at_s: float, column: int, count: int = 1) -> None:
        """Counts something; what is older than all windows is left out."""
        bucket = int(at_s // self._width_s)
        if bucket > self._newest:
            self.advance(at_s)
        age = self._newest - bucket
        if age == 0:
            self._open[column] += count
        elif age < self._longest:
            self._rows.setdefault(bucket, self._zeros())[column] += count
            self._changed.add(bucket)
            for window_s, length in self._lengths.items():
                if age < length:
                    self._sums[window_s][column] += count

    def total(self, window_s: int) -> Row:
        """Counts of a window, as of the last `advance`."""
        return [a + b for a, b in zip(self._sums[window_s], self._open, strict=True)]

    def changed(self) -> dict[int, Row]:
        """Buckets that have changed since the last call, with their counts."""
        changed, self._changed = self._changed, set()
        rows = {bucket: list(self._rows[bucket]) for bucket in changed if bucket in self._rows}
        if any(self._open):
            rows[self._newest] = list(self._open)
        return rows

    def unchanged(self, buckets: Iterable[int]) -> None:
        """Has `changed` give these once more: they could not be kept."""
        self._changed |= set(buckets)

    def restore(self, rows: Mapping[int, Row]) -> None:
        """What was kept, by its bucket."""
        self._rows = {bucket: list(row) for bucket, row in rows.items()}
        self._open = self._rows.pop(self._newest, self._zeros())
        self._rebuild()

    def _close(self) -> None:
        """The open bucket becomes one of the others."""
        if any(self._open):
            self._rows[self._newest] = self._open
            self._changed.add(self._newest)
            for sums in self._sums.values():
                _add(sums, self._open, 1)
        self._open = self._zeros()

    def _rebuild(self) -> None:
        oldest = self._newest - self._longest + 1
        self._rows = {bucket: row for bucket, row in self._rows.items() if bucket >= oldest}
        for window_s, length in self._lengths.items():
            sums = self._sums[window_s] = self._zeros()
            for bucket, row in self._rows.items():
                if bucket > self._newest - length:
                    _add(sums, row, 1)

    def _zeros(self) -> Row:
        return [0] * self._num_columns


def _add(sums: Row, row: Row, times: int) -> None:
    for column, count in enumerate(row):
        sums[column] += times * count
