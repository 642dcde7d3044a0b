"""Sites that the kernels are compiled for on every chip, and what each chip cannot do.

`benchmarks.compile_check` compiles all of them; `REFUSALS` is exact: what it names is refused with
this reason, and everything else compiles. Sites are those of Llama 3 8B, of SmolLM2, whose sizes a
TPU refuses, and of experts: to the kernels each pair of slot and expert is a slot, and each of a
token's experts a row.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """One site, for decoding rows or for chunks.

    Attributes:
        num_tokens: of the step.
        depth: K.
        num_columns: N.
        cycle: widths of the parts, which repeat.
        num_layers: that the weights are stacked of.
        num_experts, top_k: how many there are, and how many a token goes to.
    """

    site: str
    kind: str
    num_tokens: int
    depth: int
    num_columns: int
    cycle: tuple[int, ...]
    num_layers: int = 32
    num_experts: int = 1
    top_k: int = 1

    @property
    def name(self) -> str:
        """Of both."""
        return f"{self.site}/{self.kind}"

    @property
    def num_rows(self) -> int:
        """T: a token once for each of its experts."""
        return self.num_tokens * self.top_k


_TOKENS = {"decode": 64, "prefill": 2048}
#: Rank and slots of each class, by backend.
CLASSES = {"tpu": ((16, 8), (128, 2)), "gpu": ((8, 4), (16, 8), (128, 2))}
#: Site: K, N, and the widths of its parts, which repeat.
_SITES: dict[str, tuple[int, int, tuple[int, ...]]] = {
    "qkv": (4096, 6144, (512, 128, 128)),
    "out": (4096, 4096, (4096,)),
    "gate_up": (4096, 28_672, (14_336, 14_336)),
    "down": (14_336, 4096, (4096,)),
    "smollm2-qkv": (576, 960, (192, 64, 64)),
    "smollm2-out": (576, 576, (576,)),
    "qwen3-30b-expert-up": (2048, 768, (768,)),
    "mixtral-8x7b-expert-down": (14_336, 4096, (4096,)),
}
#: Site: of its layers as many as a chip holds beside all else, experts, and a token's.
_EXPERTS = {"qwen3-30b-expert-up": (2, 128, 8), "mixtral-8x7b-expert-down": (2, 8, 2)}


def _shape(site: str, kind: str) -> Shape:
    depth, columns, cycle = _SITES[site]
    layers, experts, top_k = _EXPERTS.get(site, (32, 1, 1))
    return Shape(
        site=site,
        kind=kind,
        num_tokens=_TOKENS[kind],
        depth=depth,
        num_columns=columns,
        cycle=cycle,
        num_layers=layers,
        num_experts=experts,
        top_k=top_k,
    )


SHAPES = tuple(_shape(site, kind) for site, kind in itertools.product(_SITES, _TOKENS))

#: (backend, site) → why no shape of it compiles, in the kernel's own words.
REFUSALS: dict[tuple[str, str], str] = {
    ("tpu", "smollm2-qkv"): "K=576 and N=960 must be multiples of 128 on a TPU",
    ("tpu", "smollm2-out"): "K=576 and N=576 must be multiples of 128 on a TPU",
}


def refusal(backend: str, shape: Shape) -> str | None:
    """Why a backend refuses a shape; None where it compiles."""
    return REFUSALS.get((backend, shape.site))
