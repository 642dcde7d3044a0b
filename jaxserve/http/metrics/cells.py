"""Where metrics are counted: cells of float64 in one file that all HTTP workers share.

    directory: which series has which cells │ row of worker 0 │ row of worker 1 │ …

Each worker writes the cells of its own row only, from one thread, so counting takes no lock; who
renders adds the rows up. A series gets its cells when it is first counted: its key and place are
appended to the directory under a lock of the file, and are the same in every row from then on.
Nothing is ever taken back, so that no sum falls.

Invariants: at most `ROW_CELLS` are given away, and at most as many labels of a kind as its bound
says. A series that finds no room shares one block that nobody reads, and is counted as refused.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

#: Cells of one worker.
ROW_CELLS = 1 << 16
DIRECTORY_BYTES = 1 << 20
#: Cells at the start of each row that nobody reads; no series has more.
_NOWHERE_CELLS = 64
_HEAD = struct.Struct("<IIII")  # entries, bytes of them, cells given away, series refused
_ENTRY = struct.Struct("<HHI")  # bytes of the key, cells, the first of them
_ROW_BYTES = 8 * ROW_CELLS
#: Between the parts of a key: a name, then label values.
_SEPARATOR = "\0"
#: Where a label's value goes once its kind has as many as it may have.
OTHER = "other"
#: Characters of a label's value; longer ones are cut.
MAX_LABEL = 128


@dataclass(frozen=True, slots=True)
class Series:
    """One series of a name.

    Attributes:
        labels: its values, in the order in which the name declares them.
        first, size: its cells in a row.
    """

    labels: tuple[str, ...]
    first: int
    size: int


def create_shared(path: Path, num_workers: int) -> None:
    """Makes the file that workers count in, and takes its room on the disk."""
    size = DIRECTORY_BYTES + _ROW_BYTES * num_workers
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.posix_fallocate(file, 0, size)  # a full disk later would kill whoever counts
        os.pwrite(file, _HEAD.pack(0, 0, _NOWHERE_CELLS, 0), 0)
    finally:
        os.close(file)


class Cells:
    """The cells, as one worker sees them.

    Args:
        shared: the file of all workers; None where this process is alone.
        index: of this worker among them.

    Attributes:
        own: this worker's row.
    """

    def __init__(self, shared: Path | None = None, index: int = 0) -> None:
        self._file = -1
        if shared is None:
            whole = memoryview(bytearray(DIRECTORY_BYTES + _ROW_BYTES))
            _HEAD.pack_into(whole, 0, 0, 0, _NOWHERE_CELLS, 0)
        else:
            self._file = os.open(shared, os.O_RDWR | os.O_CLOEXEC)
            whole = memoryview(mmap.mmap(self._file, 0))
        self._directory = whole[:DIRECTORY_BYTES]
        cells = whole[DIRECTORY_BYTES:].cast("d")
        self._rows = [cells[at : at + ROW_CELLS] for at in range(0, len(cells), ROW_CELLS)]
        self.own = self._rows[index]
        self._read_bytes = 0  # of the directory's entries
        self._places: dict[str, int] = {}
        self._series: dict[str, list[Series]] = {}
        self._full: set[str] = set()

    def __del__(self) -> None:
        if self._file >= 0:
            os.close(self._file)

    @property
    def num_refused(self) -> int:
        """Series that found no room."""
        return _HEAD.unpack_from(self._directory)[3]

    def claim(self, name: str, labels: tuple[str, ...], size: int) -> int:
        """The first cell of a series, which is made where it is new."""
        key = _SEPARATOR.join((name, *labels))
        place = self._places.get(key)
        if place is not None:
            return place
        with self._locked():
            self._read()
            place = self._places.get(key)
            if place is None:
                place = self._append(key, size)
        if place is None:
            self._places[key] = place = 0
        return place

    def label(self, kind: str, value: str, bound: int) -> str:
        """The value that a label may show: its own, or OTHER once `bound` of its kind have shown.

        Args:
            kind: of label: "tenant", "adapter"…
        """
        value = value.replace(_SEPARATOR, "")[:MAX_LABEL].encode("utf-8", "replace").decode()
        key = f"{kind}{_SEPARATOR}{value}"
        if key in self._places or value == OTHER:
            return value
        if kind in self._full:
            return OTHER
        with self._locked():
            self._read()
            if key in self._places:
                return value
            if len(self._series.get(kind, ())) >= bound:
                self._full.add(kind)
                return OTHER
            return OTHER if self._append(key, 0) is None else value

    def series(self, name: str) -> list[Series]:
        """All series of a name that any worker has counted, oldest first."""
        return self._series.get(name, [])

    def refresh(self) -> None:
        """Learns of series that other workers have made."""
        with self._locked():
            self._read()

    def totals(self, series: Series) -> list[float]:
        """What all workers have counted in the cells of a series."""
        span = slice(series.first, series.first + series.size)
        if len(self._rows) == 1:
            return list(self.own[span])
        return [sum(cells) for cells in zip(*(row[span] for row in self._rows), strict=True)]

    def largest(self, series: Series) -> float:
        """The largest that any worker has in a series' first cell."""
        return max(row[series.first] for row in self._rows)

    def _append(self, key: str, size: int) -> int | None:
        """A new entry's first cell; None where there is no room. The directory is locked."""
        entries, used_bytes, next_cell, refused = _HEAD.unpack_from(self._directory)
        name = key.encode()
        end = used_bytes + _ENTRY.size + len(name)
        assert size <= _NOWHERE_CELLS, f"{key} has {size} cells"
        if _HEAD.size + end > DIRECTORY_BYTES or next_cell + size > ROW_CELLS:
            _HEAD.pack_into(self._directory, 0, entries, used_bytes, next_cell, refused + 1)
            return None
        at = _HEAD.size + used_bytes
        _ENTRY.pack_into(self._directory, at, len(name), size, next_cell)
        self._directory[at + _ENTRY.size : at + _ENTRY.size + len(name)] = name
        _HEAD.pack_into(self._directory, 0, entries + 1, end, next_cell + size, refused)
        self._read()
        return next_cell

    def _read(self) -> None:
        """Takes in entries that are new. The directory is locked."""
        used_bytes = _HEAD.unpack_from(self._directory)[1]
        while self._read_bytes < used_bytes:
            at = _HEAD.size + self._read_bytes
            length, size, first = _ENTRY.unpack_from(self._directory, at)
            start = at + _ENTRY.size
            key = bytes(self._directory[start : start + length]).decode()
            name, *labels = key.split(_SEPARATOR)
            self._places[key] = first
            self._series.setdefault(name, []).append(Series(tuple(labels), first, size))
            self._read_bytes += _ENTRY.size + length

    @contextmanager
    def _locked(self) -> Iterator[None]:
        if self._file < 0:
            yield
            return
        fcntl.flock(self._file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(self._file, fcntl.LOCK_UN)
