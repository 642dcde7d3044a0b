"""Products with dense codes on the device: our Hopper kernel beside XLA's lowering, in one run.

Correct: ‖out − ref‖/‖ref‖ against the weight that the codes stand for, multiplied in float32. Fast:
bytes of codes and scales a second as a share of the measured copy bandwidth, for both, at decode's
numbers of tokens; each call multiplies by several weights, more than the L2 cache holds. Where ours
is ahead it is to become what models take (`pallas_kernels/quant_matmul/api.py`).
"""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.gpu_check.limits import Limits, seconds_a_call
from benchmarks.gpu_check.parts import Check
from benchmarks.gpu_check.report import Finding
from pallas_kernels.quant_matmul import GROUP, int4_matmul, int8_matmul, traffic

TOLERANCE = 1e-2
#: Llama-3-8B's gate and up, and its down: K and N.
SIZES = ((4096, 28672), (14336, 4096))
TOKENS = (8, 64)
#: Of all weights that a call reads: several times an L2 cache.
_READ_BYTES = 256 << 20
_PRODUCTS: dict[str, tuple[Callable[..., Any], Callable[[int, int], int]]] = {
    "int8": (int8_matmul, traffic.int8_bytes),
    "int4": (int4_matmul, traffic.int4_bytes),
}


def checks(
    backend: str,
    limits: Callable[[], Limits],
    sizes: tuple[tuple[int, int], ...] = SIZES,
    read_bytes: int = _READ_BYTES,
) -> Iterator[Check]:
    """Every check of them.

    Args:
        backend: ours, beside "xla".
        sizes: K and N.
        read_bytes: of the weights that one call multiplies by.
    """
    for kind, num_tokens in itertools.product(_PRODUCTS, (1, 13, *TOKENS)):
        right = partial(_correct, backend, kind, num_tokens)
        yield Check(f"{kind} product, {num_tokens} tokens", lambda right=right: [right()])
    for kind, size in itertools.product(_PRODUCTS, sizes):
        name = f"{kind} product {size[0]}x{size[1]}"
        fast = partial(_shares, backend, limits, read_bytes, kind, *size)
        yield Check(name, fast, timed=True)


def _shares(
    backend: str, limits: Callable[[], Limits], read_bytes: int, kind: str, depth: int, columns: int
) -> Iterator[Finding]:
    product, count_bytes = _PRODUCTS[kind]
    num_bytes = count_bytes(depth, columns)
    copies = -(-read_bytes // num_bytes)
    weights = [_weight(kind, depth, columns, seed) for seed in range(copies)]
    for num_tokens in TOKENS:
        x = jnp.ones((num_tokens, depth), jnp.bfloat16)
        ours, theirs = (
            _seconds(partial(product, backend=which), x, weights) for which in (backend, "xla")
        )
        what = f"{kind} product {depth}x{columns}, {num_tokens} tokens"
        share = copies * num_bytes / limits().copy
        yield Finding(f"{what}: share of copy bandwidth", share / ours)
        yield Finding(f"{what}: XLA's share", share / theirs)


def _weight(kind: str, depth: int, columns: int, seed: int) -> tuple[jax.Array, ...]:
    """Random codes, their scales, and int4's minima."""
    keys = jax.random.split(jax.random.key(seed), 3)
    if kind == "int8":
        codes = jax.random.randint(keys[0], (depth, columns), -127, 128, jnp.int8)
        return codes, jax.random.uniform(keys[1], (columns,), jnp.float32) / 127
    codes = (jax.random.bits(keys[0], (depth, columns), jnp.uint8) & 15).astype(jnp.uint4)
    groups = (depth // GROUP, columns)
    scale = (1 + jax.random.uniform(keys[1], groups)) / 16
    return codes, scale.astype(jnp.bfloat16), (-7.5 * scale).astype(jnp.bfloat16)


def _correct(backend: str, kind: str, num_tokens: int) -> Finding:
    depth, columns = 1024, 768
    codes, *scales = _weight(kind, depth, columns, secrets.randbits(31))
    x = jax.random.normal(jax.random.key(secrets.randbits(31)), (num_tokens, depth), jnp.bfloat16)
    weight = codes.astype(jnp.float32)
    if kind == "int8":
        weight = weight * scales[0]
    else:
        scale, minimum = (jnp.repeat(s.astype(jnp.float32), GROUP, 0) for s in scales)
        weight = weight * scale + minimum
    expected = jnp.dot(x.astype(jnp.float32), weight, precision=jax.lax.Precision.HIGHEST)
    product = partial(_PRODUCTS[kind][0], backend=backend)
    out = jax.jit(product)(x, codes, *scales).astype(jnp.float32)
    error = float(jnp.linalg.norm(out - expected) / jnp.linalg.norm(expected))
    return Finding(f"{kind} product, {num_tokens} tokens: error", error, "<", TOLERANCE)


def _seconds(product: Callable[..., Any], x: jax.Array, weights: list[Any]) -> float:
    run = jax.jit(lambda x, weights: [product(x, *weight) for weight in weights])
    return seconds_a_call(run, x, weights, calls=5)
