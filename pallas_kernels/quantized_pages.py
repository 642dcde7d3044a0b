"""Pages of 8-bit codes, with a scale for the key and the value of each position and KV head.

A code times its scale is the value: int8 in -127 … 127, or float8_e4m3fn up to 448, which is held
as its bits (XLA on the CPU widens, or copies, whole arrays of float8 that it gathers from). The
scale brings the largest element of a head's key, or value, to the largest code. Scales are laid
out [L, P, K, C], those of a page's keys from the start of a row and those of its values from its
middle: a page's are one tile, whose lanes are positions, as those of its scores are. C is twice the
page size, or more where a backend moves whole registers; what is behind a half's Z is undefined.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int8, Shaped

#: The largest code of each dtype.
LARGEST = {"int8": 127.0, "float8_e4m3fn": 448.0}
#: Bytes of a scale.
SCALE_BYTES = 4


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class QuantizedPages:
    """Pages as codes.

    Attributes:
        codes: int8, or the bits of a float8_e4m3fn.
        scales: of keys and of values.
        kind: "int8" or "float8_e4m3fn".
    """

    codes: Int8[Array, "L P K Z W"]
    scales: Float[Array, "L P K C"]
    kind: str = field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the codes."""
        return self.codes.shape

    @property
    def dtype(self) -> jnp.dtype:
        """What the codes are."""
        return jnp.dtype(self.kind)


#: Keys and values of some layers, as numbers or as codes.
Pages = Shaped[Array, "L P K Z W"] | QuantizedPages


def is_quantized(dtype: DTypeLike) -> bool:
    """Whether pages of this dtype have scales."""
    return jnp.dtype(dtype).name in LARGEST


def quantize(x: Float[Array, "*B H"], kind: str) -> tuple[Int8[Array, "*B H"], Float[Array, "*B"]]:
    """Codes of vectors, and each vector's scale, float32. A vector of zeros has scale 1."""
    x, largest = x.astype(jnp.float32), LARGEST[kind]
    peak = jnp.max(jnp.abs(x), axis=-1)
    scale = jnp.where(peak > 0, peak / largest, 1.0)
    code = x / scale[..., None]
    if kind == "int8":
        code = jnp.round(code)
    code = jnp.clip(code, -largest, largest).astype(kind)
    return jax.lax.bitcast_convert_type(code, jnp.int8), scale


def values(codes: Int8[Array, "*B"], kind: str) -> Float[Array, "*B"]:
    """What codes are, unscaled, in float32."""
    return jax.lax.bitcast_convert_type(codes, jnp.dtype(kind)).astype(jnp.float32)


def widened(codes: Int8[Array, "*B"], kind: str) -> Float[Array, "*B"]:
    """What codes are, unscaled, in bfloat16, which holds all of them.

    In whole numbers' arithmetic, for kernels; bits that are no number give some number.
    """
    if kind == "int8":
        return codes.astype(jnp.bfloat16)
    bits = codes.astype(jnp.int32)
    size, sign = bits & 0x7F, (bits & 0x80) << 24
    # The exponent counts from 7, float32's from 127. Below 2**-6 there is no hidden one: with it,
    # and one exponent higher, they are 2**-6 too large.
    is_small = size < 8
    x = jax.lax.bitcast_convert_type(
        (size << 20) + jnp.where(is_small, 121 << 23, 120 << 23), jnp.float32
    )
    x = jnp.where(is_small, x - 2.0**-6, x)
    x = jax.lax.bitcast_convert_type(jax.lax.bitcast_convert_type(x, jnp.int32) | sign, jnp.float32)
    return x.astype(jnp.bfloat16)


def dequantize(pages: QuantizedPages) -> Float[Array, "L P K Z W"]:
    """The values that all codes stand for, float32: as large as the cache four times over."""
    page_size, width = pages.shape[-2:]
    unscaled = values(pages.codes, pages.kind).reshape(*pages.shape[:-1], 2, width // 2)
    scales = jnp.stack(halves(pages.scales, page_size), axis=-1)
    return (unscaled * scales[..., None]).reshape(pages.shape)


def halves[A: (Array, np.ndarray)](scales: A, page_size: int) -> tuple[A, A]:
    """Of rows of scales [*B, C] those of keys and those of values, [*B, Z] each."""
    middle = scales.shape[-1] // 2
    return scales[..., :page_size], scales[..., middle : middle + page_size]


def kind_of(pages: Pages) -> str:
    """What codes are; "" of pages that are numbers."""
    return pages.kind if isinstance(pages, QuantizedPages) else ""


def arrays_of(pages: Pages) -> tuple[Array, ...]:
    """The arrays that pages are made of."""
    return (pages.codes, pages.scales) if isinstance(pages, QuantizedPages) else (pages,)
