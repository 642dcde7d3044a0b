"""Shapes that the kernels are compiled for on every chip, and what each chip cannot do.

`benchmarks.compile_check` compiles all of them; `REFUSALS` is exact: what it names is refused with
this reason, and everything else compiles.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """One call.

    Attributes:
        num_tokens: as many as rows where each row decodes.
        max_context: positions that a row's page table holds.
    """

    name: str
    num_tokens: int = 64
    num_rows: int = 64
    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    page_size: int = 32
    max_context: int = 8192
    dtype: str = "bfloat16"
    window: int | None = None
    soft_cap: float | None = None
    sinks: bool = False


def _shapes() -> list[Shape]:
    found = []
    for kind, tokens, rows in (("decode", 64, 64), ("mixed", 2048, 16)):
        size: dict[str, Any] = {"num_tokens": tokens, "num_rows": rows}
        for head_dim in (64, 80, 96, 128, 256):
            for dtype in ("bfloat16", "float32", "int8", "float8_e4m3fn"):
                heads = 8 if head_dim == 256 else 32
                found.append(
                    Shape(
                        name=f"{kind}-h{head_dim}-{dtype}",
                        head_dim=head_dim,
                        dtype=dtype,
                        num_heads=heads,
                        num_kv_heads=heads // 4,
                        **size,
                    )
                )
        found += [
            Shape(name=f"{kind}-mqa", num_heads=8, num_kv_heads=1, **size),
            Shape(name=f"{kind}-mha", num_heads=16, num_kv_heads=16, **size),
            Shape(name=f"{kind}-smollm2", num_heads=9, num_kv_heads=3, head_dim=64, **size),
            Shape(name=f"{kind}-window-cap-sinks", window=4096, soft_cap=50.0, sinks=True, **size),
            Shape(
                name=f"{kind}-128k",
                max_context=131_072,
                num_tokens=8 if kind == "decode" else 128,
                num_rows=8,
            ),
            Shape(
                name=f"{kind}-int8-smollm2",
                num_heads=9,
                num_kv_heads=3,
                head_dim=64,
                page_size=128,
                dtype="int8",
                **size,
            ),
            Shape(
                name=f"{kind}-fp8-mqa-window-cap-sinks",
                num_heads=8,
                num_kv_heads=1,
                page_size=64,
                dtype="float8_e4m3fn",
                window=4096,
                soft_cap=50.0,
                sinks=True,
                **size,
            ),
        ]
    return found


SHAPES = tuple(_shapes())

_NO_ROOM = "shared memory does not hold codes and widened codes beside the result"

#: (backend, dtype), or (backend, dtype, head dim) → why no shape of it compiles, in the kernel's
#: own words.
REFUSALS: dict[tuple[str, str] | tuple[str, str, int], str] = {
    ("gpu", "float32"): "pages are float32, which Hopper multiplies only rounded to tf32",
    ("gpu", "int8", 256): _NO_ROOM,
    ("gpu", "float8_e4m3fn", 256): _NO_ROOM,
}


def refusal(backend: str, shape: Shape) -> str | None:
    """Why a backend refuses a shape; None where it compiles."""
    for key in ((backend, shape.dtype), (backend, shape.dtype, shape.head_dim)):
        if key in REFUSALS:
            return REFUSALS[key]
    return None
