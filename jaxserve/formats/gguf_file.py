"""Tensors of a GGUF file, dequantized when they are read.

Names, layouts and values are GGUF's own here; `weights.gguf_checkpoint` turns them into Hugging
Face's. The header comes from `gguf_header`, the element types from `ggml_types`. Data are
memory-mapped.

Invariant: in a file that opens, every tensor is whole and of a type that is read, so nothing about
the file can fail half-way through loading.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from jaxserve.errors import UnsupportedModel, WeightsError
from jaxserve.formats.ggml_types import TYPES, dequantize
from jaxserve.formats.gguf_header import GgufTensor, read_gguf_header

_MAX_AXES = 4


class GgufFile:
    """One file.

    Raises:
        WeightsError: it cannot be read, is no GGUF file, is cut off, or contradicts itself.
        UnsupportedModel: it is one part of several, or a tensor is of a type that is not read.

    Attributes:
        metadata: by key.
    """

    def __init__(self, path: Path) -> None:
        header = read_gguf_header(path)
        self.path = path
        self.metadata = header.metadata
        parts = self.metadata.get("split.count", 1)
        if parts not in (0, 1):
            raise UnsupportedModel(
                f"{path} is one of {parts} parts; join them with llama-gguf-split --merge"
            )
        self._tensors = header.tensors
        try:
            self._bytes = np.memmap(path, np.uint8, mode="r")
        except (OSError, ValueError) as error:
            raise WeightsError(f"cannot read {path}: {error}") from error
        self._num_bytes = {name: self._check(name, row) for name, row in self._tensors.items()}

    def names(self) -> frozenset[str]:
        """Of its tensors."""
        return frozenset(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of one tensor, slowest axis first."""
        return self._tensors[name].shape

    def read(self, name: str) -> np.ndarray:
        """The tensor: a view of the mapped file where it is plain, else dequantized to float32.

        Raises:
            WeightsError: its type needs the `gguf` package, which is not installed.
        """
        tensor = self._tensors[name]
        data = self._bytes[tensor.offset : tensor.offset + self._num_bytes[name]]
        try:
            return dequantize(np.asarray(data), tensor.kind, tensor.shape)
        except ImportError as error:
            raise WeightsError(
                f"{self.path}: tensor {name!r} is {TYPES[tensor.kind].name}, which the gguf "
                "package reads: pip install gguf"
            ) from error

    def _check(self, name: str, tensor: GgufTensor) -> int:
        """Bytes of a tensor that is whole and can be read."""
        ggml = TYPES.get(tensor.kind)
        if ggml is None:
            raise UnsupportedModel(
                f"{self.path}: tensor {name!r} is of ggml type {tensor.kind}; "
                f"{', '.join(known.name for known in TYPES.values())} are read"
            )
        shape = tensor.shape
        if not 1 <= len(shape) <= _MAX_AXES or 0 in shape or shape[-1] % ggml.block:
            raise WeightsError(
                f"{self.path} is broken: tensor {name!r} has the shape {shape}, of which "
                f"{ggml.name} cannot be"
            )
        num_bytes = math.prod(shape) // ggml.block * ggml.size
        end = tensor.offset + num_bytes
        if end > len(self._bytes):
            raise WeightsError(
                f"{self.path} is cut off: tensor {name!r} ends at byte {end}, the file has "
                f"{len(self._bytes)}; get the file again"
            )
        return num_bytes
