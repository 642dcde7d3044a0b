"""The Hopper kernel of quant_matmul alone: every shape of its `shapes.py`."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from pallas_kernels.quant_matmul import GROUP, int4_matmul
from pallas_kernels.quant_matmul.shapes import SHAPES, Shape, refusal

CHIPS = ("h100:1",)
_BACKEND = "gpu"


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantRow:
    """One product that is added to what is there; attributes as `KernelRow` has them."""

    shape: Shape
    slice: str

    @property
    def name(self) -> str:
        """Of the row, on the command line and in the table."""
        return f"quant_matmul/int4-{self.shape.name}/{self.slice}"

    @property
    def refusal(self) -> str | None:
        """Why the backend refuses it; None where it compiles."""
        return refusal(_BACKEND, self.shape)

    @property
    def page_bytes(self) -> int:
        """Of what is changed in place: what the product is added to."""
        return self.shape.num_tokens * self.shape.num_columns * 2

    def program(self, device: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """A function that donates its first argument, the sum, and what it takes."""
        place, own = SingleDeviceSharding(device), self.shape

        def array(*sizes: int, dtype: Any = jnp.bfloat16) -> Any:
            return jax.ShapeDtypeStruct(sizes, dtype, sharding=place)

        groups = own.depth // GROUP, own.num_columns
        return _add, (
            array(own.num_tokens, own.num_columns, dtype=own.dtype),
            array(own.num_tokens, own.depth, dtype=own.dtype),
            array(own.depth, own.num_columns, dtype=jnp.uint4),
            array(*groups),
            array(*groups),
        )


def _add(total: Any, x: Any, codes: Any, scale: Any, minimum: Any) -> Any:
    return total + int4_matmul(x, codes, scale, minimum, backend=_BACKEND)


ROWS_OF_QUANT = tuple(
    QuantRow(shape=shape, slice=slice) for slice, shape in itertools.product(CHIPS, SHAPES)
)
