"""Products with dense codes on the device: our Hopper kernel for int4, and XLA's own for all.

Correct: ‖out − ref‖/‖ref‖ against the weight that the codes stand for, multiplied in float32. Fast:
bytes of codes and scales a second as a share of the measured copy bandwidth, at decode's numbers of
tokens, and how many times as fast as the same product with bfloat16 weights. Each call multiplies
by more weights than the L2 cache holds. XLA takes so long for int4 that its share is taken once, of
one weight.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.gpu_check.limits import Limits, seconds_a_call
from benchmarks.gpu_check.parts import Check
from benchmarks.gpu_check.report import Finding
from pallas_kernels.quant_matmul import GROUP, fp8_matmul, int4_matmul, int8_matmul, traffic

TOLERANCE = 1e-2
#: What rounding the activations to fp8 may add.
FP8_TOLERANCE = 0.06
#: Llama-3-8B's gate and up, and its down: K and N.
SIZES = ((4096, 28672), (14336, 4096))
TOKENS = (8, 64)
#: Tokens of a step that decodes, and of one that reads prompts.
FP8_TOKENS = (8, 2048)
#: Of all weights that a call reads: several times an L2 cache.
_READ_BYTES = 192 << 20


def checks(
    backend: str,
    limits: Callable[[], Limits],
    sizes: tuple[tuple[int, int], ...] = SIZES,
    read_bytes: int = _READ_BYTES,
) -> Iterator[Check]:
    """Every check of them.

    Args:
        backend: of int4, beside "xla".
        sizes: K and N; all but int4's in the first one only.
        read_bytes: of the weights that one call multiplies by.
    """
    for num_tokens in (1, 13, *TOKENS):
        right = partial(int4_error, backend, num_tokens)
        yield Check(f"int4 product, {num_tokens} tokens", lambda right=right: [right()])
    for num_tokens in FP8_TOKENS:
        right = partial(_fp8_error, num_tokens, *sizes[0])
        yield Check(f"fp8 product, {num_tokens} tokens", lambda right=right: [right()])

    @cache
    def plain(num_tokens: int) -> float:
        """Seconds of a product with bfloat16 weights."""
        return _seconds(jnp.dot, num_tokens, weights_of("bfloat16", *sizes[0], read_bytes))

    def int4(depth: int, columns: int) -> Iterator[Finding]:
        weights = weights_of("int4", depth, columns, read_bytes)
        least = traffic.int4_bytes(depth, columns) / limits().copy
        name = f"int4 product {depth}x{columns}"
        for num_tokens in TOKENS:
            ours = _seconds(partial(int4_matmul, backend=backend), num_tokens, weights)
            yield Finding(f"{name}, {num_tokens} tokens: share of copy bandwidth", least / ours)
            if (depth, columns) == sizes[0] and num_tokens == TOKENS[0]:
                ratio = plain(num_tokens) / ours
                yield Finding(f"{name}, {num_tokens} tokens: times as fast as bfloat16", ratio)
                theirs = _seconds(int4_matmul, num_tokens, weights[:1])
                yield Finding(f"{name}, {num_tokens} tokens: XLA's share", least / theirs)

    def int8(depth: int, columns: int) -> Iterator[Finding]:
        weights = weights_of("int8", depth, columns, read_bytes)
        least = traffic.int8_bytes(depth, columns) / limits().copy
        for num_tokens in TOKENS:
            theirs = _seconds(int8_matmul, num_tokens, weights)
            name = f"int8 product {depth}x{columns}, {num_tokens} tokens: XLA's share"
            yield Finding(name, least / theirs)

    def fp8(depth: int, columns: int) -> Iterator[Finding]:
        weights = weights_of("fp8", depth, columns, read_bytes)
        for num_tokens in FP8_TOKENS:
            ratio = plain(num_tokens) / _seconds(fp8_matmul, num_tokens, weights)
            name = f"fp8 product {depth}x{columns}, {num_tokens} tokens: times as fast as bfloat16"
            yield Finding(name, ratio)

    for size in sizes:
        name = f"int4 product {size[0]}x{size[1]}"
        yield Check(name, lambda size=size: int4(*size), timed=True)
    for kind, fast in (("int8", int8), ("fp8", fp8)):
        name = f"{kind} product {sizes[0][0]}x{sizes[0][1]}"
        yield Check(name, lambda fast=fast: fast(*sizes[0]), timed=True)


def weights_of(
    kind: str, depth: int, columns: int, read_bytes: int = _READ_BYTES
) -> list[tuple[jax.Array, ...]]:
    """As many as a call is to read, at least one."""
    first = _weight(0, kind, depth, columns)
    copies = -(-read_bytes // sum(_num_bytes(part) for part in first))
    return [first, *(_weight(seed, kind, depth, columns) for seed in range(1, copies))]


def _num_bytes(part: jax.Array) -> int:
    return part.size // 2 if part.dtype == jnp.uint4 else part.nbytes


@partial(jax.jit, static_argnums=(1, 2, 3))
def _weight(seed: int, kind: str, depth: int, columns: int) -> tuple[jax.Array, ...]:
    """Random codes, their scales, and int4's minima; or a bfloat16 weight."""
    keys = jax.random.split(jax.random.key(seed), 2)
    if kind == "bfloat16":
        return (jax.random.normal(keys[0], (depth, columns), jnp.bfloat16),)
    bits = jax.random.bits(keys[0], (depth, columns), jnp.uint8)
    if kind == "int8":
        codes = jax.lax.bitcast_convert_type(bits, jnp.int8)
        return codes, jax.random.uniform(keys[1], (columns,), jnp.float32) / 127
    if kind == "fp8":
        normal = jax.random.normal(keys[0], (depth, columns), jnp.bfloat16)
        return normal.astype(jnp.float8_e4m3fn), jax.random.uniform(keys[1], (columns,))
    scale = (1 + jax.random.uniform(keys[1], (depth // GROUP, columns))) / 16
    scale, minimum = (part.astype(jnp.bfloat16) for part in (scale, -7.5 * scale))
    return (bits & 15).astype(jnp.uint4), scale, minimum


def rows_of(num_tokens: int, depth: int) -> jax.Array:
    """Random activations."""
    key = jax.random.key(secrets.randbits(31))
    return jax.random.normal(key, (num_tokens, depth), jnp.bfloat16)


def int4_error(backend: str, num_tokens: int) -> Finding:
    """Against the weight that fresh codes stand for."""
    codes, scale, minimum = _weight(secrets.randbits(31), "int4", 1024, 768)
    wide_scale, wide_minimum = (
        jnp.repeat(values.astype(jnp.float32), GROUP, 0) for values in (scale, minimum)
    )
    x = rows_of(num_tokens, 1024)
    out = jax.jit(partial(int4_matmul, backend=backend))(x, codes, scale, minimum)
    error = _error(x, out, codes.astype(jnp.float32) * wide_scale + wide_minimum)
    return Finding(f"int4 product, {num_tokens} tokens: error", error, "<", TOLERANCE)


def _fp8_error(num_tokens: int, depth: int, columns: int) -> Finding:
    codes, scale = _weight(secrets.randbits(31), "fp8", depth, columns)
    x = rows_of(num_tokens, depth)
    error = _error(x, jax.jit(fp8_matmul)(x, codes, scale), codes.astype(jnp.float32) * scale)
    return Finding(f"fp8 product, {num_tokens} tokens: error", error, "<", FP8_TOLERANCE)


@jax.jit
def _relative(x: jax.Array, out: jax.Array, weight: jax.Array) -> jax.Array:
    expected = jnp.dot(x.astype(jnp.float32), weight, precision=jax.lax.Precision.HIGHEST)
    return jnp.linalg.norm(out.astype(jnp.float32) - expected) / jnp.linalg.norm(expected)


def _error(x: jax.Array, out: jax.Array, weight: jax.Array) -> float:
    return float(_relative(x, out, weight))


def _seconds(product: Callable[..., Any], num_tokens: int, weights: list[Any]) -> float:
    """Of multiplying by one of the weights, of which a call takes all."""
    run = jax.jit(lambda x, weights: [product(x, *weight) for weight in weights])
    x = rows_of(num_tokens, weights[0][0].shape[0])
    return seconds_a_call(run, x, weights, calls=5) / len(weights)
