"""ggml's element types: their sizes, and their values as float arrays.

Used by `gguf_file`. Plain types need numpy alone; the three commonest block types are decoded
here, several times faster than the `gguf` package does it and bit for bit alike; the others go
through that package, imported on first use. Layouts: github.com/ggml-org/ggml, ggml-common.h.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import ml_dtypes
import numpy as np
from jaxtyping import Float, Shaped, UInt8

#: Blocks decoded at a time: their float32 values stay in a core's cache.
_CHUNK = 4096


@dataclass(frozen=True, slots=True)
class GgmlType:
    """An element type: `size` bytes hold `block` values of a row."""

    name: str
    block: int
    size: int


#: What is read, by ggml's number.
TYPES: dict[int, GgmlType] = {
    0: GgmlType("F32", 1, 4),
    1: GgmlType("F16", 1, 2),
    2: GgmlType("Q4_0", 32, 18),
    3: GgmlType("Q4_1", 32, 20),
    6: GgmlType("Q5_0", 32, 22),
    7: GgmlType("Q5_1", 32, 24),
    8: GgmlType("Q8_0", 32, 34),
    10: GgmlType("Q2_K", 256, 84),
    11: GgmlType("Q3_K", 256, 110),
    12: GgmlType("Q4_K", 256, 144),
    13: GgmlType("Q5_K", 256, 176),
    14: GgmlType("Q6_K", 256, 210),
    20: GgmlType("IQ4_NL", 32, 18),
    23: GgmlType("IQ4_XS", 256, 136),
    30: GgmlType("BF16", 1, 2),
}

_PLAIN: dict[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


def dequantize(
    data: UInt8[np.ndarray, "num_bytes"], kind: int, shape: tuple[int, ...]
) -> Shaped[np.ndarray, "..."]:
    """The values of a tensor: in their own dtype if it is a plain one, else in float32.

    Args:
        data: the tensor's bytes; plain types are views of it.
        kind: one of TYPES.
        shape: of the values; the last axis must be whole blocks.

    Raises:
        ImportError: the type needs the `gguf` package, which is not installed.
    """
    ggml = TYPES[kind]
    if ggml.name in _PLAIN:
        return data.view(_PLAIN[ggml.name]).reshape(shape)
    blocks = data.reshape(-1, ggml.size)
    decode = _DECODERS.get(ggml.name)
    if decode is not None:
        values = np.empty((len(blocks), ggml.block), np.float32)
        for start in range(0, len(blocks), _CHUNK):
            decode(blocks[start : start + _CHUNK], values[start : start + _CHUNK])
        return values.reshape(shape)
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize as decode_others

    return decode_others(blocks, GGMLQuantizationType(kind)).reshape(shape)


def _scales(blocks: UInt8[np.ndarray, "n size"], count: int) -> Float[np.ndarray, "n count"]:
    """The float16 numbers that a block begins with."""
    return np.ascontiguousarray(blocks[:, : 2 * count]).view(np.float16).astype(np.float32)


def _q8_0(blocks: UInt8[np.ndarray, "n 34"], out: Float[np.ndarray, "n 32"]) -> None:
    np.multiply(blocks[:, 2:].view(np.int8), _scales(blocks, 1), out=out)


def _q4_0(blocks: UInt8[np.ndarray, "n 18"], out: Float[np.ndarray, "n 32"]) -> None:
    scale, nibbles = _scales(blocks, 1), blocks[:, 2:]
    np.multiply((nibbles & 15).view(np.int8) - np.int8(8), scale, out=out[:, :16])
    np.multiply((nibbles >> 4).view(np.int8) - np.int8(8), scale, out=out[:, 16:])


def _q4_1(blocks: UInt8[np.ndarray, "n 20"], out: Float[np.ndarray, "n 32"]) -> None:
    scale, nibbles = _scales(blocks, 2), blocks[:, 4:]
    np.multiply(nibbles & 15, scale[:, :1], out=out[:, :16])
    np.multiply(nibbles >> 4, scale[:, :1], out=out[:, 16:])
    out += scale[:, 1:]


_DECODERS: dict[str, Callable[[UInt8[np.ndarray, "n size"], Float[np.ndarray, "n 32"]], None]] = {
    "Q8_0": _q8_0,
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
}
