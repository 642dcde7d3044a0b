"""The beginning of a GGUF file: metadata and the table of tensors, in milliseconds.

The `gguf` package reads the same, but keeps every array element as a numpy view of its own and so
takes seconds for a vocabulary. Format: github.com/ggml-org/ggml, docs/gguf.md (versions 2 and 3,
little-endian).

Invariant: nothing is trusted. A length that points past the file's end is an error, never an
allocation.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxserve.errors import WeightsError

_MAGIC = b"GGUF"
_ALIGNMENT = 32
_MAX_NESTING = 4

#: Metadata value types by number: struct letter of each scalar type.
_SCALARS: dict[int, str] = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_STRING = 8
_ARRAY = 9


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufTensor:
    """One row of the table of tensors.

    Attributes:
        shape: slowest axis first, as numpy has it (the file stores it reversed).
        kind: ggml's number of the element type.
        offset: bytes from the beginning of the file.
    """

    shape: tuple[int, ...]
    kind: int
    offset: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufHeader:
    """Metadata by key (numbers, strings, booleans, lists of them) and tensors by name."""

    version: int
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]


def read_gguf_header(path: Path) -> GgufHeader:
    """Reads all but the tensors' data.

    Raises:
        WeightsError: the file cannot be opened, is not GGUF, is of an unknown version, or is cut
            off inside the header.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Reader(path, data).header()
    except (OSError, ValueError) as error:  # ValueError: mmap of an empty file
        raise WeightsError(f"cannot read {path}: {error}") from error


class _Reader:
    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path = path
        self._data = data
        self._size = len(data)
        self._at = 0

    def header(self) -> GgufHeader:
        magic = self._data[:4]
        if magic != _MAGIC:
            raise WeightsError(f"{self._path} is not a GGUF file: it begins with {magic!r}")
        self._at = 4
        version = self._scalar("I")
        if version not in (2, 3):
            raise WeightsError(
                f"{self._path} is GGUF version {version}; little-endian versions 2 and 3 are read"
            )
        num_tensors, num_keys = self._scalar("Q"), self._scalar("Q")
        metadata: dict[str, Any] = {}
        for _ in range(num_keys):
            key = self._string()
            metadata[key] = self._value(self._scalar("I"), 0)
        rows = [self._tensor() for _ in range(num_tensors)]
        alignment = metadata.get("general.alignment", _ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1:
            raise WeightsError(f"{self._path} has a general.alignment of {alignment!r}")
        start = -(-self._at // alignment) * alignment
        tensors = {
            name: GgufTensor(shape=shape, kind=kind, offset=start + offset)
            for name, shape, kind, offset in rows
        }
        return GgufHeader(version=version, metadata=metadata, tensors=tensors)

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string()
        num_axes = self._scalar("I")
        if num_axes > 8:
            raise WeightsError(f"{self._path} is broken: tensor {name!r} has {num_axes} axes")
        shape = tuple(self._scalar("Q") for _ in range(num_axes))
        return name, shape[::-1], self._scalar("I"), self._scalar("Q")

    def _value(self, kind: int, nesting: int) -> Any:
        if kind in _SCALARS:
            return self._scalar(_SCALARS[kind])
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY and nesting < _MAX_NESTING:
            item_kind, count = self._scalar("I"), self._scalar("Q")
            if item_kind in _SCALARS:
                letter = _SCALARS[item_kind]
                start = self._skip(count * struct.calcsize("<" + letter))
                return list(struct.unpack_from(f"<{count}{letter}", self._data, start))
            if count > self._size:  # each item takes at least a byte
                raise self._cut_off()
            read: Callable[[], Any] = (
                self._string
                if item_kind == _STRING
                else lambda: self._value(item_kind, nesting + 1)
            )
            return [read() for _ in range(count)]
        raise WeightsError(f"{self._path} is broken: metadata of unknown type {kind}")

    def _scalar(self, letter: str) -> Any:
        start = self._skip(struct.calcsize("<" + letter))
        return struct.unpack_from("<" + letter, self._data, start)[0]

    def _string(self) -> str:
        at = self._at
        if at + 8 > self._size:
            raise self._cut_off()
        start = at + 8
        end = start + int.from_bytes(self._data[at:start], "little")
        if end > self._size:
            raise self._cut_off()
        self._at = end
        return self._data[start:end].decode("utf-8", "replace")

    def _skip(self, num_bytes: int) -> int:
        start = self._at
        self._at += num_bytes
        if self._at > self._size:
            raise self._cut_off()
        return start

    def _cut_off(self) -> WeightsError:
        return WeightsError(
            f"{self._path} is cut off or broken: its header runs past the file's {self._size} "
            "bytes; get the file again"
        )
