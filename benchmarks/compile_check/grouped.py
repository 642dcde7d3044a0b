"""The Hopper kernel of grouped_matmul alone: every shape of its `shapes.py`."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from pallas_kernels.grouped_matmul import grouped_matmul
from pallas_kernels.grouped_matmul.shapes import SHAPES, Shape, refusal

CHIPS = ("h100:1",)
_BACKEND = "gpu"
_LAYERS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupedRow:
    """Gate, up and down of one layer, for decoding rows or for chunks; as `KernelRow` has them."""

    shape: Shape
    slice: str

    @property
    def name(self) -> str:
        """Of the row, on the command line and in the table."""
        return f"grouped_matmul/{self.shape.name}/{self.slice}"

    @property
    def refusal(self) -> str | None:
        """Why the backend refuses it; None where it compiles."""
        return refusal(_BACKEND, self.shape)

    @property
    def page_bytes(self) -> int:
        """Of what is changed in place: the rows."""
        return self.shape.num_rows * self.shape.depth * 2

    def program(self, device: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """A function that donates its first argument, the rows, and what it takes."""
        place, own = SingleDeviceSharding(device), self.shape

        def array(*sizes: int, dtype: Any = own.dtype) -> Any:
            return jax.ShapeDtypeStruct(sizes, dtype, sharding=place)

        values = jnp.bfloat16 if own.dtype == "int8" else own.dtype
        into = array(_LAYERS * own.num_groups, own.depth, own.num_columns)
        out_of = array(_LAYERS * own.num_groups, own.num_columns, own.depth)
        return partial(_mlp, own.num_groups, own.dtype == "int8"), (
            array(own.num_rows, own.depth, dtype=values),
            into,
            into,
            out_of,
            array(own.num_groups, dtype=jnp.int32),
            array(dtype=jnp.int32),
        )


def _mlp(
    num_groups: int, codes: bool, rows: Any, gate: Any, up: Any, down: Any, sizes: Any, layer: Any
) -> Any:
    def multiply(x: Any, w: Any) -> Any:
        scale = jnp.ones((num_groups, w.shape[2])) if codes else None
        first = layer * num_groups
        return grouped_matmul(x, w, sizes, first_group=first, scale=scale, backend=_BACKEND)

    return multiply(jax.nn.silu(multiply(rows, gate)) * multiply(rows, up), down)


ROWS_OF_GROUPED = tuple(
    GroupedRow(shape=shape, slice=slice) for slice, shape in itertools.product(CHIPS, SHAPES)
)
