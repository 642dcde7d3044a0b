"""Mixtures that the kernel is compiled for, and what it cannot do.

`benchmarks.compile_check` compiles all of them; `REFUSALS` is exact: what it names is refused with
this reason, and everything else compiles.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Gate, up and down of one layer: [E, D, F] twice and [E, F, D].

    Attributes:
        num_rows: of tokens, once for each of their experts.
        depth: D.
        num_columns: F.
        dtype: of the matrices.
    """

    name: str
    num_rows: int
    num_groups: int
    depth: int
    num_columns: int
    dtype: str


#: Name, E, experts of a token, D and F; of the last a device has a quarter of the columns.
_MIXTURES = (
    ("qwen3-30b-a3b", 128, 8, 2048, 768),
    ("mixtral-8x7b", 8, 2, 4096, 14_336),
    ("qwen3-30b-a3b-by-4", 128, 8, 2048, 192),
)
_TOKENS = {"decode": 64, "prefill": 2048}
_DTYPES = ("bfloat16", "float16", "float32", "int8")

SHAPES = tuple(
    Shape(
        name=f"{name}-{dtype}/{kind}",
        num_rows=tokens * top_k,
        num_groups=num_groups,
        depth=depth,
        num_columns=num_columns,
        dtype=dtype,
    )
    for (name, num_groups, top_k, depth, num_columns), (kind, tokens), dtype in itertools.product(
        _MIXTURES, _TOKENS.items(), _DTYPES
    )
)

#: (backend, dtype), or (backend, dtype, F) → why no shape of it compiles, in the kernel's words.
REFUSALS: dict[tuple[str, str] | tuple[str, str, int], str] = {
    ("gpu", "float32"): "not float32, which Hopper multiplies only rounded to tf32",
    ("gpu", "int8"): "not int8: it reads no codes yet",
    ("gpu", "bfloat16", 192): "matrices are 2048 x 192, which must be multiples of 64 and 128",
    ("gpu", "float16", 192): "matrices are 2048 x 192, which must be multiples of 64 and 128",
}


def refusal(backend: str, shape: Shape) -> str | None:
    """Why a backend refuses a shape; None where it compiles."""
    for key in ((backend, shape.dtype), (backend, shape.dtype, shape.num_columns)):
        if key in REFUSALS:
            return REFUSALS[key]
    return None
