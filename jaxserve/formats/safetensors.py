"""Safetensors files, single or with an index over shards: tensors by name, read when asked for.

Format: a little-endian 64-bit length, so many bytes of JSON (dtype, shape and byte range of each
tensor), then the data. Source: github.com/huggingface/safetensors. Files are memory-mapped;
bfloat16 comes as ml_dtypes' type.

Invariant: every tensor's range is checked against the file when it is opened, so a file that was
cut off is refused before anything is read.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxserve.errors import WeightsError

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit


@dataclass(frozen=True, slots=True, kw_only=True)
class _Entry:
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int


class SafetensorsFile:
    """One file.

    Raises:
        WeightsError: it cannot be read, is no safetensors file, or is cut off.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._bytes = np.memmap(path, np.uint8, mode="r")
        except (OSError, ValueError) as error:  # ValueError: an empty file
            raise WeightsError(f"cannot read {path}: {error}") from error
        size = len(self._bytes)
        if size < 8:
            raise self._broken(f"it has {size} bytes")
        (header_bytes,) = struct.unpack("<Q", self._bytes[:8].tobytes())
        if header_bytes > min(size - 8, _MAX_HEADER_BYTES):
            raise self._broken(f"its header of {header_bytes} bytes is longer than the file")
        try:
            header = json.loads(self._bytes[8 : 8 + header_bytes].tobytes())
        except (ValueError, RecursionError) as error:
            raise self._broken(f"its header is no JSON: {error}") from error
        if not isinstance(header, dict):
            raise self._broken("its header is no JSON object")
        header.pop("__metadata__", None)
        self._entries = {
            name: self._entry(name, row, 8 + header_bytes, size) for name, row in header.items()
        }

    def names(self) -> frozenset[str]:
        """Of its tensors."""
        return frozenset(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of one tensor."""
        return self._entries[name].shape

    def read(self, name: str) -> np.ndarray:
        """A view of the tensor in the mapped file."""
        entry = self._entries[name]
        count = int(np.prod(entry.shape, dtype=np.int64))
        data = self._bytes[entry.start : entry.start + count * entry.dtype.itemsize]
        return data.view(entry.dtype).reshape(entry.shape)

    def _entry(self, name: str, row: Any, data_start: int, size: int) -> _Entry:
        try:
            dtype_name, shape = row["dtype"], tuple(row["shape"])
            begin, end = row["data_offsets"]
            whole = all(isinstance(n, int) and n >= 0 for n in (*shape, begin, end))
        except (KeyError, TypeError, ValueError):
            raise self._broken(f"its entry of {name!r} is malformed") from None
        dtype = DTYPES.get(dtype_name) if isinstance(dtype_name, str) else None
        if dtype is None:
            raise WeightsError(
                f"{self.path}: tensor {name!r} has dtype {dtype_name!r}; "
                f"{', '.join(DTYPES)} are read"
            )
        count = 1
        for axis in shape:
            count *= axis
        if not whole or end - begin != count * dtype.itemsize:
            raise self._broken(f"tensor {name!r} of shape {shape} does not fill its bytes")
        if data_start + end > size:
            raise WeightsError(
                f"{self.path} is cut off: tensor {name!r} ends at byte {data_start + end}, the "
                f"file has {size}; get the file again"
            )
        return _Entry(dtype=dtype, shape=shape, start=data_start + begin)

    def _broken(self, why: str) -> WeightsError:
        return WeightsError(f"{self.path} is not a whole safetensors file: {why}")


class SafetensorsFiles:
    """The tensors of several files, each in one of them."""

    def __init__(self, files: Iterable[SafetensorsFile]) -> None:
        self._files = {name: file for file in files for name in file.names()}

    def names(self) -> frozenset[str]:
        """Of all tensors."""
        return frozenset(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of one tensor."""
        return self._files[name].shape(name)

    def read(self, name: str) -> np.ndarray:
        """A view of the tensor in its mapped file."""
        return self._files[name].read(name)


def open_safetensors(directory: Path) -> SafetensorsFiles:
    """The tensors of a model directory: by its index, else of all *.safetensors files in it.

    Raises:
        WeightsError: no such files, a shard that the index names is missing, or a broken file.
    """
    index = directory / INDEX
    if index.is_file():
        try:
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise WeightsError(f"{index} is no index of safetensors shards: {error!r}") from error
        paths = [directory / str(shard) for shard in sorted(shards, key=str)]
        if any(path.parent != directory for path in paths):
            raise WeightsError(f"{index} names shards outside {directory}")
        missing = [path.name for path in paths if not path.is_file()]
        if missing:
            raise WeightsError(
                f"{directory} lacks {len(missing)} of {len(paths)} shards that {INDEX} names, "
                f"e.g. {missing[0]}; get them again"
            )
    else:
        single = directory / SINGLE
        paths = [single] if single.is_file() else sorted(directory.glob("*.safetensors"))
        if not paths:
            raise WeightsError(f"{directory} has no .safetensors files")
    return SafetensorsFiles([SafetensorsFile(path) for path in paths])
