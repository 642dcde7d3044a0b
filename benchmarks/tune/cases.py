"""The kernels that are tuned, each at the shape that it is mostly run with."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.gpu_check import codes, kernels
from benchmarks.tune.measure import Case
from pallas_kernels.grouped_matmul import grouped_matmul, reference
from pallas_kernels.grouped_matmul.tunables import GpuGrouped
from pallas_kernels.paged_attention import paged_attention
from pallas_kernels.paged_attention.tunables import GpuChunks, GpuDecode, TpuChunks, TpuDecode
from pallas_kernels.quant_matmul import int4_matmul
from pallas_kernels.quant_matmul.tunables import GpuInt4

OPS = ("paged_attention", "grouped_matmul", "quant_matmul")


def cases(op: str, platform: str) -> Iterator[Case]:
    """An operation's, on a platform; none where it has no such kernel there.

    Args:
        platform: "gpu" or "tpu".
    """
    if op == "paged_attention":
        yield from _attention(platform)
    if op == "grouped_matmul" and platform == "gpu":
        yield Case(
            kind=GpuGrouped,
            where="gate of Qwen3-30B-A3B, 2048 tokens, bfloat16",
            make=partial(_groups, [128] * 128, 2048, 768),
            run=partial(grouped_matmul, backend=platform),
            error=partial(_groups_error, platform),
        )
    if op == "quant_matmul" and platform == "gpu":
        yield Case(
            kind=GpuInt4,
            where="down of Llama 3 8B, 14336 x 4096, 8 tokens",
            make=lambda: (codes.rows_of(8, 14_336), codes.weights_of("int4", 14_336, 4096)),
            run=lambda x, weights: [int4_matmul(x, *w, backend=platform) for w in weights],
            error=lambda: max(codes.int4_error(platform, tokens).value for tokens in (1, 13, 64)),
        )


def _attention(platform: str) -> Iterator[Case]:
    sizes = kernels.Sizes()
    decode, chunks = (GpuDecode, GpuChunks) if platform == "gpu" else (TpuDecode, TpuChunks)
    heads = f"{sizes.num_heads} heads and {sizes.num_kv_heads} KV heads of {sizes.head_dim}"
    attend = partial(paged_attention, layer=0, scale=sizes.head_dim**-0.5, backend=platform)
    for kind, where, lens, small in (
        (
            decode,
            f"{sizes.rows} rows of {sizes.context} positions",
            [(1, sizes.context)] * sizes.rows,
            kernels.DECODE,
        ),
        (
            chunks,
            f"a prompt of {sizes.prompt} tokens",
            [(sizes.prompt, sizes.prompt)],
            kernels.MIXED,
        ),
    ):
        yield Case(
            kind=kind,
            where=f"{where}, {heads}, bfloat16, pages of {sizes.page_size}",
            make=partial(kernels.attention_inputs, sizes, lens),
            run=lambda q, pages, batch: attend(q, pages, batch=batch),
            error=partial(kernels.attention_error, platform, small),
        )


def _groups(sizes: list[int], depth: int, columns: int) -> tuple[Any, ...]:
    keys = jax.random.split(jax.random.key(secrets.randbits(31)), 2)
    x = jax.random.normal(keys[0], (sum(sizes), depth), jnp.bfloat16)
    w = jax.random.normal(keys[1], (len(sizes), depth, columns), jnp.bfloat16)
    return x, w, jnp.asarray(sizes, jnp.int32)


def _groups_error(backend: str) -> float:
    x, w, sizes = _groups([100, 37, 0, 350, 64, 9], 256, 384)
    expected = reference.grouped_matmul(x.astype(jnp.float32), w.astype(jnp.float32), sizes)
    out = jax.jit(partial(grouped_matmul, backend=backend))(x, w, sizes)
    return kernels.error_of(out, expected)
