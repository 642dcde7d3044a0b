"""Products with 4-bit codes that the kernel is compiled for, and what it cannot do.

`benchmarks.compile_check` compiles all of them; `REFUSALS` is exact: what it names is refused with
this reason, and everything else compiles. int8 and fp8 are XLA's everywhere, and have no shapes.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """One product: x [T, K] and codes [K, N].

    Attributes:
        num_tokens: T.
        depth: K.
        num_columns: N.
        dtype: of x.
    """

    name: str
    num_tokens: int
    depth: int
    num_columns: int
    dtype: str = "bfloat16"


#: Every matrix of a model that is held as codes: K and N.
_MATRICES = {
    "llama-3-8b-qkv": (4096, 6144),
    "llama-3-8b-out": (4096, 4096),
    "llama-3-8b-gate_up": (4096, 28_672),
    "llama-3-8b-down": (14_336, 4096),
    "qwen3-30b-a3b-qkv": (2048, 5120),
    "qwen3-30b-a3b-out": (4096, 2048),
    "smollm2-135m-qkv": (576, 960),
    "smollm2-135m-out": (576, 576),
    "smollm2-135m-gate_up": (576, 3072),
    "smollm2-135m-down": (1536, 576),
}
_TOKENS = (1, 8, 64)

SHAPES = (
    *(
        Shape(name=f"{name}/{tokens}", num_tokens=tokens, depth=depth, num_columns=columns)
        for (name, (depth, columns)), tokens in itertools.product(_MATRICES.items(), _TOKENS)
    ),
    Shape(name="llama-3-8b-out/65", num_tokens=65, depth=4096, num_columns=4096),
    Shape(name="depth-of-96/8", num_tokens=8, depth=96, num_columns=4096),
    Shape(
        name="llama-3-8b-out-float16/8",
        num_tokens=8,
        depth=4096,
        num_columns=4096,
        dtype="float16",
    ),
)

#: (backend, attribute of a shape, its value) → why no such shape compiles, in the kernel's words.
REFUSALS: dict[tuple[str, str, int | str], str] = {
    ("gpu", "dtype", "float16"): "x is float16, the kernel takes bfloat16",
    ("gpu", "num_tokens", 65): "65 tokens, the kernel takes 1 to 64",
    ("gpu", "depth", 96): "K is 96, no multiple of 64",
    ("gpu", "num_columns", 576): "N is 576, no multiple of 256",
    ("gpu", "num_columns", 960): "N is 960, no multiple of 256",
}


def refusal(backend: str, shape: Shape) -> str | None:
    """Why a backend refuses a shape; None where it compiles."""
    for (name, attribute, value), reason in REFUSALS.items():
        if name == backend and getattr(shape, attribute) == value:
            return reason
    return None
