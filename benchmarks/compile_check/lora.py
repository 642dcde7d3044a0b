"""lora_matmul alone: every shape of its `shapes.py` on every chip that it is for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from pallas_kernels.lora_matmul import LoraWeights, block_tokens, lora_matmul
from pallas_kernels.lora_matmul.blocks import TILE
from pallas_kernels.lora_matmul.gpu_plan import expand_adds_up, expand_plan, shrink_plan
from pallas_kernels.lora_matmul.shapes import CLASSES, SHAPES, Shape, refusal

#: Backend and the chips that it is compiled for.
CHIPS = {"tpu": ("v5e:1x1", "v6e:1x1", "tpu7x:1x1x1"), "gpu": ("h100:1",)}


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraRow:
    """One site on one chip; attributes as `KernelRow` has them."""

    shape: Shape
    backend: str
    slice: str

    @property
    def name(self) -> str:
        """Of the row, on the command line and in the table."""
        return f"lora_matmul/{self.shape.name}/{self.slice}"

    @property
    def refusal(self) -> str | None:
        """Why the backend refuses it; None where it compiles."""
        return refusal(self.backend, self.shape)

    @property
    def page_bytes(self) -> int:
        """Of what is changed in place: y."""
        return self.shape.num_rows * self.shape.num_columns * 2

    @property
    def num_kernels(self) -> int:
        """Of the site on a GPU: of each class two, and one more where XLA adds up; else 0."""
        if self.backend != "gpu":
            return 0
        own, found = self.shape, 0
        tiles = -(-own.num_rows // TILE)
        for rank, slots in CLASSES[self.backend]:
            most = min(slots * own.num_experts, TILE)
            first = shrink_plan(tiles, own.depth, rank * len(own.cycle), most)
            second = expand_plan(tiles, own.num_columns, rank, own.cycle)
            found += 2 if expand_adds_up(first, second, tiles, own.num_columns, rank) else 3
        return found

    def program(self, device: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """A function that donates its first argument, y, and what it takes."""
        place, own = SingleDeviceSharding(device), self.shape

        def array(*sizes: int, dtype: Any = jnp.bfloat16) -> Any:
            return jax.ShapeDtypeStruct(sizes, dtype, sharding=place)

        weights = tuple(
            LoraWeights(
                a=array(own.num_layers, count * own.num_experts, rank * len(own.cycle), own.depth),
                b=array(own.num_layers, count * own.num_experts, rank, own.num_columns),
            )
            for rank, count in CLASSES[self.backend]
        )
        slots, layer = array(own.num_rows, dtype=jnp.int32), array(dtype=jnp.int32)
        return partial(_add, self), (
            array(own.num_rows, own.num_columns),
            array(own.num_rows, own.depth),
            weights,
            slots,
            layer,
        )


def _add(row: LoraRow, y: Any, x: Any, weights: Any, slots: Any, layer: Any) -> Any:
    blocks, first = [], 0
    for _, count in CLASSES[row.backend]:
        blocks.append(block_tokens(slots - first, count * row.shape.num_experts))
        first += count * row.shape.num_experts
    cycle, backend = row.shape.cycle, row.backend
    return lora_matmul(x, y, weights, blocks, layer, cycle=cycle, backend=backend)


ROWS_OF_LORA = tuple(
    LoraRow(shape=shape, backend=backend, slice=slice)
    for backend, slices in CHIPS.items()
    for slice in slices
    for shape in SHAPES
)
