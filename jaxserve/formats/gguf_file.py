"""Tensors of a GGUF file, dequantized when they are read.

The header comes from `gguf_header`; the block formats are the `gguf` package's. F32, F16 and BF16
are views of the mapped file.
"""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np

from jaxserve.errors import UnsupportedModel, WeightsError
from jaxserve.formats.gguf_header import GgufTensor, read_gguf_header

#: ggml's numbers of the types that need no dequantization.
_PLAIN: dict[int, np.dtype] = {
    0: np.dtype(np.float32),
    1: np.dtype(np.float16),
    30: np.dtype(ml_dtypes.bfloat16),
}
#: Block formats that are read, by name in `gguf.GGMLQuantizationType`.
QUANTIZED = frozenset(
    [
        "Q4_0",
        "Q4_1",
        "Q5_0",
        "Q5_1",
        "Q8_0",
        "Q2_K",
        "Q3_K",
        "Q4_K",
        "Q5_K",
        "Q6_K",
        "IQ4_NL",
        "IQ4_XS",
    ]
)
#: Values a piece, so that dequantization needs little memory beside its result.
_PIECE_VALUES = 1 << 22


class GgufFile:
    """One file.

    Raises:
        WeightsError: it cannot be read, is no GGUF file, or is cut off.
        UnsupportedModel: a tensor is of a type that the `gguf` package cannot dequantize.

    Attributes:
        metadata: by key.
    """

    def __init__(self, path: Path) -> None:
        header = read_gguf_header(path)
        self.path = path
        self.metadata = header.metadata
        self._tensors = header.tensors
        self._bytes = np.memmap(path, np.uint8, mode="r")
        for name, tensor in header.tensors.items():
            end = tensor.offset + self._num_bytes(name, tensor)
            if end > len(self._bytes):
                raise WeightsError(
                    f"{path} is cut off: tensor {name!r} ends at byte {end}, the file has "
                    f"{len(self._bytes)}; get the file again"
                )

    def names(self) -> frozenset[str]:
        """Of its tensors."""
        return frozenset(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of one tensor, slowest axis first."""
        return self._tensors[name].shape

    def read(self, name: str) -> np.ndarray:
        """The tensor: as it is where it is plain, else dequantized to float32."""
        tensor = self._tensors[name]
        data = self._bytes[tensor.offset : tensor.offset + self._num_bytes(name, tensor)]
        plain = _PLAIN.get(tensor.kind)
        if plain is not None:
            return data.view(plain).reshape(tensor.shape)
        from gguf.constants import GGMLQuantizationType
        from gguf.quants import dequantize

        kind = GGMLQuantizationType(tensor.kind)
        width = tensor.shape[-1]
        rows = data.reshape(-1, self._row_bytes(name, tensor))
        out = np.empty((len(rows), width), np.float32)
        step = max(1, _PIECE_VALUES // width)
        for start in range(0, len(rows), step):
            out[start : start + step] = dequantize(rows[start : start + step], kind)
        return out.reshape(tensor.shape)

    def _num_bytes(self, name: str, tensor: GgufTensor) -> int:
        rows = 1
        for axis in tensor.shape[:-1]:
            rows *= axis
        return rows * self._row_bytes(name, tensor)

    def _row_bytes(self, name: str, tensor: GgufTensor) -> int:
        width = tensor.shape[-1] if tensor.shape else 1
        plain = _PLAIN.get(tensor.kind)
        if plain is not None:
            return width * plain.itemsize
        block, block_bytes = self._block(name, tensor)
        if width == 0 or width % block:
            raise WeightsError(
                f"{self.path} is broken: tensor {name!r} has rows of {width} values, its type has "
                f"blocks of {block}"
            )
        return width // block * block_bytes

    def _block(self, name: str, tensor: GgufTensor) -> tuple[int, int]:
        """Values and bytes of one block."""
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        try:
            kind = GGMLQuantizationType(tensor.kind)
        except ValueError:
            raise WeightsError(
                f"{self.path} is broken or too new: tensor {name!r} is of unknown type "
                f"{tensor.kind}"
            ) from None
        if kind.name not in QUANTIZED:
            raise UnsupportedModel(
                f"{self.path}: tensor {name!r} is {kind.name}; F32, F16, BF16 and "
                f"{', '.join(sorted(QUANTIZED))} are read"
            )
        return GGML_QUANT_SIZES[kind]
