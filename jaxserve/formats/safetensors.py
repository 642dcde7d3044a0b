"""Safetensors files, single or with an index over shards: tensors by name, read when asked for.

Format: a little-endian 64-bit length, so many bytes of JSON (dtype, shape and byte range of each
tensor), then the data. Source: github.com/huggingface/safetensors. Files are memory-mapped;
bfloat16 comes as ml_dtypes' type. Single files are written, too.

Invariant: every tensor's range is checked against the file when it is opened, so a file that was
cut off is refused before anything is read.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

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
#: What NumPy can shape, also where one size is 0 and the tensor has no bytes.
_MAX_DIMENSIONS, _MAX_ITEMS = 32, 2**48


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
        self._names = frozenset(self._entries)

    def names(self) -> frozenset[str]:
        """Of its tensors."""
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        """Of one tensor."""
        return self._entries[name].shape

    def read(self, name: str) -> np.ndarray:
        """A view of the tensor in the mapped file."""
        entry = self._entries[name]
        count = math.prod(entry.shape)
        data = self._bytes[entry.start : entry.start + count * entry.dtype.itemsize]
        return data.view(entry.dtype).reshape(entry.shape)

    def _entry(self, name: str, row: Any, data_start: int, size: int) -> _Entry:
        row = row if isinstance(row, dict) else {}
        dtype_name, shape, place = row.get("dtype"), row.get("shape"), row.get("data_offsets")
        if not (_are_counts(shape) and _are_counts(place) and len(place) == 2):
            raise self._broken(f"its entry of {name!r} is malformed")
        if len(shape) > _MAX_DIMENSIONS or math.prod(max(n, 1) for n in shape) > _MAX_ITEMS:
            raise self._broken(f"tensor {name!r} has a shape that no array can have")
        dtype = DTYPES.get(dtype_name) if isinstance(dtype_name, str) else None
        if dtype is None:
            raise WeightsError(
                f"{self.path}: tensor {name!r} has dtype {dtype_name!r:.80}; "
                f"{', '.join(DTYPES)} are read"
            )
        begin, end = place
        if end - begin != math.prod(shape) * dtype.itemsize:
            raise self._broken(f"tensor {name!r} of shape {shape} does not fill its bytes")
        if data_start + end > size:
            raise WeightsError(
                f"{self.path} is cut off: tensor {name!r} ends at byte {data_start + end}, the "
                f"file has {size}; get the file again"
            )
        return _Entry(dtype=dtype, shape=tuple(shape), start=data_start + begin)

    def _broken(self, why: str) -> WeightsError:
        return WeightsError(f"{self.path} is not a whole safetensors file: {why}")


class SafetensorsFiles:
    """The tensors of several files.

    Args:
        files: the one that holds each tensor, by the tensor's name.
    """

    def __init__(self, files: dict[str, SafetensorsFile]) -> None:
        self._files = files

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
        WeightsError: no such files, a shard that the index names is missing or lacks a tensor that
            the index places in it, or a broken file.
    """
    index = directory / INDEX
    if index.is_file():
        return SafetensorsFiles(_by_index(index))
    single = directory / SINGLE
    paths = [single] if single.is_file() else sorted(directory.glob("*.safetensors"))
    if not paths:
        raise WeightsError(f"{directory} has no .safetensors files")
    opened = [SafetensorsFile(path) for path in paths]
    return SafetensorsFiles({name: file for file in opened for name in file.names()})


def write_safetensors(
    path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes one file, whole or not at all.

    Raises:
        ValueError: a dtype that the format has no name for.
        OSError: it cannot be written.
    """
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, tensor in tensors.items():
        if tensor.dtype not in names:
            raise ValueError(f"tensor {name!r} has dtype {tensor.dtype}, which is not written")
        start, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": names[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for tensor in tensors.values():
                file.write(np.ascontiguousarray(tensor).view(np.uint8).data)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _by_index(index: Path) -> dict[str, SafetensorsFile]:
    places = _weight_map(index)
    files: dict[str, SafetensorsFile] = {}
    for name, shard in places.items():
        if shard not in files:
            path = index.parent / shard
            if not path.is_file():
                raise WeightsError(
                    f"{path} is missing: {INDEX} places {name!r} in it; get it again"
                )
            files[shard] = SafetensorsFile(path)
        if name not in files[shard].names():
            raise WeightsError(
                f"{files[shard].path} lacks the tensor {name!r} that {INDEX} places in it"
            )
    return {name: files[shard] for name, shard in places.items()}


def _weight_map(index: Path) -> dict[str, str]:
    try:
        document = json.loads(index.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError(f"cannot read {index}: {error}") from error
    places = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(places, dict) or not places:
        raise WeightsError(f"{index} is no index of safetensors shards: it has no weight_map")
    for name, shard in places.items():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise WeightsError(f"{index} places {name!r} in {shard!r}, which is no file beside it")
    return places


def _are_counts(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)
