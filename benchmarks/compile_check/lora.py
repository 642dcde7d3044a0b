"""lora_matmul alone: sites of Llama 3 8B, of SmolLM2, whose sizes a TPU refuses, and of experts.

To the kernel each pair of slot and expert is a slot, and each of a token's experts a row.
"""

from __future__ import annotations

import itertools
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

#: Backend and the chips that it is compiled for.
CHIPS = {"tpu": ("v5e:1x1", "v6e:1x1", "tpu7x:1x1x1"), "gpu": ("h100:1",)}
TOKENS = {"decode": 64, "prefill": 2048}
#: Rank and slots of each class, by backend.
CLASSES = {"tpu": ((16, 8), (128, 2)), "gpu": ((8, 4), (16, 8), (128, 2))}
#: What the sizes of a site are multiples of.
_MULTIPLES = {"tpu": 128, "gpu": 64}
_LAYERS = 32
#: Site: K, N, and the widths of its parts, which repeat.
_SITES: dict[str, tuple[int, int, tuple[int, ...]]] = {
    "qkv": (4096, 6144, (512, 128, 128)),
    "out": (4096, 4096, (4096,)),
    "gate_up": (4096, 28672, (14336, 14336)),
    "down": (14336, 4096, (4096,)),
    "smollm2-qkv": (576, 960, (192, 64, 64)),
    "smollm2-out": (576, 576, (576,)),
    "qwen3-30b-expert-up": (2048, 768, (768,)),
    "mixtral-8x7b-expert-down": (14336, 4096, (4096,)),
}
#: Site: experts, and how many a token goes to.
_EXPERTS = {"qwen3-30b-expert-up": (128, 8), "mixtral-8x7b-expert-down": (8, 2)}
#: Of their layers as many as a chip holds beside all else.
_EXPERT_LAYERS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraRow:
    """One site on one chip, for decoding rows or for chunks; attributes as `KernelRow` has them."""

    site: str
    kind: str
    backend: str
    slice: str

    @property
    def name(self) -> str:
        """Of the row, on the command line and in the table."""
        return f"lora_matmul/{self.site}/{self.kind}/{self.slice}"

    @property
    def refusal(self) -> str | None:
        """Why the backend refuses it, in its own words; None where it compiles."""
        multiple = _MULTIPLES[self.backend]
        odd = any(size % multiple for size in _SITES[self.site][:2])
        return f"multiples of {multiple}" if odd else None

    @property
    def page_bytes(self) -> int:
        """Of what is changed in place: y."""
        return self.num_rows * _SITES[self.site][1] * 2

    @property
    def num_rows(self) -> int:
        """T."""
        return TOKENS[self.kind] * _EXPERTS.get(self.site, (1, 1))[1]

    @property
    def num_kernels(self) -> int:
        """Of the site on a GPU: of each class two, and one more where XLA adds up; else 0."""
        if self.backend != "gpu":
            return 0
        depth, columns, cycle = _SITES[self.site]
        tiles, experts, found = -(-self.num_rows // TILE), _EXPERTS.get(self.site, (1, 1))[0], 0
        for rank, slots in CLASSES[self.backend]:
            most = min(slots * experts, TILE)
            first = shrink_plan(tiles, depth, rank * len(cycle), most)
            second = expand_plan(tiles, columns, rank, cycle)
            found += 2 if expand_adds_up(first, second, tiles, columns, rank) else 3
        return found

    def program(self, device: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """A function that donates its first argument, y, and what it takes."""
        place = SingleDeviceSharding(device)
        depth, columns, cycle = _SITES[self.site]
        tokens, experts = self.num_rows, _EXPERTS.get(self.site, (1, 1))[0]
        layers = _EXPERT_LAYERS if self.site in _EXPERTS else _LAYERS

        def array(*sizes: int, dtype: Any = jnp.bfloat16) -> Any:
            return jax.ShapeDtypeStruct(sizes, dtype, sharding=place)

        weights = tuple(
            LoraWeights(
                a=array(layers, slots * experts, rank * len(cycle), depth),
                b=array(layers, slots * experts, rank, columns),
            )
            for rank, slots in CLASSES[self.backend]
        )
        slots, layer = array(tokens, dtype=jnp.int32), array(dtype=jnp.int32)
        return partial(_add, cycle, self.backend, experts), (
            array(tokens, columns),
            array(tokens, depth),
            weights,
            slots,
            layer,
        )


def _add(
    cycle: tuple[int, ...],
    backend: str,
    experts: int,
    y: Any,
    x: Any,
    weights: Any,
    slots: Any,
    layer: Any,
) -> Any:
    blocks, first = [], 0
    for _, count in CLASSES[backend]:
        blocks.append(block_tokens(slots - first, count * experts))
        first += count * experts
    return lora_matmul(x, y, weights, blocks, layer, cycle=cycle, backend=backend)


ROWS_OF_LORA = tuple(
    LoraRow(site=site, kind=kind, backend=backend, slice=slice)
    for backend, slices in CHIPS.items()
    for slice, site, kind in itertools.product(slices, _SITES, TOKENS)
)
