"""What the device can do at best, measured in the same process as what is divided by it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.gpu_check.report import Finding

_REPEATS = 5


@dataclass(frozen=True, slots=True)
class Limits:
    """Of one device.

    Attributes:
        copy: bytes a second, read and written together.
        matmul: operations a second of a large bfloat16 matmul.
    """

    copy: float
    matmul: float

    def findings(self) -> list[Finding]:
        """They themselves."""
        return [
            Finding("copy bandwidth, GB/s", self.copy / 1e9),
            Finding("matmul peak, TFLOP/s", self.matmul / 1e12),
        ]


def seconds_a_call(function: Callable[..., Any], *arguments: Any, calls: int = 20) -> float:
    """Of calls that follow each other without waiting; the best of some repeats."""
    jax.block_until_ready(function(*arguments))
    best = float("inf")
    for _ in range(_REPEATS):
        start = time.perf_counter()
        for _ in range(calls - 1):
            function(*arguments)
        jax.block_until_ready(function(*arguments))
        best = min(best, (time.perf_counter() - start) / calls)
    return best


def measure_limits(copy_bytes: int = 4 << 30, size: int = 8192) -> Limits:
    """Copies and multiplies random numbers: with zeros or ones the device takes less power, and its
    clock stays higher than any model's weights let it.

    Args:
        copy_bytes: of the array that is copied.
        size: rows and columns of the matrices.
    """
    source = jax.random.normal(jax.random.key(0), (copy_bytes // 2,), jnp.bfloat16)
    copying = seconds_a_call(jax.jit(lambda x: x + 1), source)
    del source
    a, b = jax.random.normal(jax.random.key(1), (2, size, size), jnp.bfloat16)
    multiplying = seconds_a_call(jax.jit(jnp.matmul), a, b)
    return Limits(copy=2 * copy_bytes / copying, matmul=2 * size**3 / multiplying)
