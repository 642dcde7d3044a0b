"""Lists of what kernels refuse, against the kernels' own words.

That all else compiles, `benchmarks.compile_check` tells.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import UnsupportedKernel
from pallas_kernels.grouped_matmul import gpu as grouped_gpu
from pallas_kernels.grouped_matmul import shapes as grouped
from pallas_kernels.kv_update import shapes as updates
from pallas_kernels.kv_update import tpu as updates_tpu
from pallas_kernels.kv_update import xla as updates_xla
from pallas_kernels.lora_matmul import LoraWeights, block_tokens, lora_matmul
from pallas_kernels.lora_matmul import gpu as lora_gpu
from pallas_kernels.lora_matmul import shapes as lora
from pallas_kernels.paged_attention import shapes as attention
from pallas_kernels.paged_attention import unsupported
from pallas_kernels.quant_matmul import int4_unsupported
from pallas_kernels.quant_matmul import shapes as quant


def agree(listed: str | None, own: str | None) -> None:
    """Both None, or the list's words are among the kernel's."""
    assert (listed is None) == (own is None), (listed, own)
    assert listed is None or listed in str(own)


@pytest.mark.parametrize("shape", quant.SHAPES, ids=lambda shape: shape.name)
def test_products_with_codes(shape: quant.Shape) -> None:
    own = int4_unsupported(shape.num_tokens, shape.depth, shape.num_columns, shape.dtype)
    assert own == quant.refusal("gpu", shape)


def test_products_of_groups() -> None:
    for shape in grouped.SHAPES:
        own = grouped_gpu.unsupported(
            depth=shape.depth, num_columns=shape.num_columns, dtype=shape.dtype
        )
        agree(grouped.refusal("gpu", shape), own)


def test_attention() -> None:
    for shape in attention.SHAPES:
        for backend in ("gpu", "tpu"):
            own = unsupported(backend, head_dim=shape.head_dim, dtype=shape.dtype)
            agree(attention.refusal(backend, shape), own)


def test_updates_are_never_refused() -> None:
    for shape in updates.SHAPES:
        for kernel in (updates_tpu, updates_xla):
            assert kernel.unsupported(head_dim=shape.head_dim, dtype=shape.dtype) is None


def test_what_adapters_add_on_hopper() -> None:
    ranks = [rank for rank, _ in lora.CLASSES["gpu"]]
    for shape in lora.SHAPES:
        own = lora_gpu.unsupported(
            depths=[shape.depth], widths=shape.cycle, ranks=ranks, dtype="bfloat16"
        )
        agree(lora.refusal("gpu", shape), own)


@pytest.mark.parametrize("site", [site for _, site in lora.REFUSALS])
def test_what_adapters_add_on_a_tpu(site: str) -> None:
    """Sites that are listed are refused, before anything is computed."""
    shape = next(shape for shape in lora.SHAPES if shape.site == site)
    (rank, count), *_ = lora.CLASSES["tpu"]
    weights = LoraWeights(
        a=jnp.zeros((1, count, rank * len(shape.cycle), shape.depth)),
        b=jnp.zeros((1, count, rank, shape.num_columns)),
    )
    blocks = block_tokens(jnp.zeros(1, jnp.int32), count)
    x, y = jnp.zeros((1, shape.depth)), jnp.zeros((1, shape.num_columns))
    with pytest.raises(UnsupportedKernel) as refused:
        jax.eval_shape(
            lambda x, y: lora_matmul(
                x, y, [weights], [blocks], 0, cycle=shape.cycle, backend="tpu"
            ),
            x,
            y,
        )
    agree(lora.refusal("tpu", shape), str(refused.value))
