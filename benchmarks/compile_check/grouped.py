"""The Hopper kernel of grouped_matmul alone: a layer's experts of Qwen3-30B-A3B and of Mixtral."""

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

CHIPS = ("h100:1",)
TOKENS = {"decode": 64, "prefill": 2048}
DTYPES = ("bfloat16", "float16", "float32", "int8")
_LAYERS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixture:
    """One model's experts: E, A, D and F."""

    num_experts: int
    top_k: int
    size: int
    wide: int


_MIXTURES = {
    "qwen3-30b-a3b": Mixture(num_experts=128, top_k=8, size=2048, wide=768),
    "mixtral-8x7b": Mixture(num_experts=8, top_k=2, size=4096, wide=14336),
    "qwen3-30b-a3b-by-4": Mixture(num_experts=128, top_k=8, size=2048, wide=192),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupedRow:
    """Gate, up and down of one layer, for decoding rows or for chunks; as `KernelRow` has them."""

    model: str
    kind: str
    dtype: str
    slice: str

    @property
    def name(self) -> str:
        """Of the row, on the command line and in the table."""
        return f"grouped_matmul/{self.model}-{self.dtype}/{self.kind}/{self.slice}"

    @property
    def refusal(self) -> str | None:
        """Why the backend refuses it; None where it compiles."""
        if self.dtype in ("float32", "int8"):
            return "Hopper multiplies float32 only rounded to tf32, and codes are not written yet"
        return "its columns are no multiple of 128" if self._mixture.wide % 128 else None

    @property
    def page_bytes(self) -> int:
        """Of what is changed in place: the rows."""
        return self._rows * self._mixture.size * 2

    @property
    def _mixture(self) -> Mixture:
        return _MIXTURES[self.model]

    @property
    def _rows(self) -> int:
        return TOKENS[self.kind] * self._mixture.top_k

    def program(self, device: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """A function that donates its first argument, the rows, and what it takes."""
        place, own = SingleDeviceSharding(device), self._mixture

        def array(*sizes: int, dtype: Any = self.dtype) -> Any:
            return jax.ShapeDtypeStruct(sizes, dtype, sharding=place)

        values = jnp.bfloat16 if self.dtype == "int8" else self.dtype
        into = array(_LAYERS * own.num_experts, own.size, own.wide)
        out_of = array(_LAYERS * own.num_experts, own.wide, own.size)
        return partial(_mlp, own.num_experts, self.dtype == "int8"), (
            array(self._rows, own.size, dtype=values),
            into,
            into,
            out_of,
            array(own.num_experts, dtype=jnp.int32),
            array(dtype=jnp.int32),
        )


def _mlp(
    num_experts: int, codes: bool, rows: Any, gate: Any, up: Any, down: Any, sizes: Any, layer: Any
) -> Any:
    def multiply(x: Any, w: Any) -> Any:
        scale = jnp.ones((num_experts, w.shape[2])) if codes else None
        first = layer * num_experts
        return grouped_matmul(x, w, sizes, first_group=first, scale=scale, backend="gpu")

    return multiply(jax.nn.silu(multiply(rows, gate)) * multiply(rows, up), down)


ROWS_OF_GROUPED = tuple(
    GroupedRow(model=model, kind=kind, dtype=dtype, slice=slice)
    for slice, model, kind, dtype in itertools.product(CHIPS, _MIXTURES, TOKENS, DTYPES)
)
