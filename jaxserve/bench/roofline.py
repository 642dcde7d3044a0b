"""What this machine can do: bytes read per second and FLOPs per second, measured.

The limits that benchmarks divide by. Measured in the same run as what they bound, between its
repeats, since a shared machine's own speed drifts.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np

#: Larger than any cache, small beside the memory.
_CPU_BYTES, _DEVICE_BYTES = 512 << 20, 2 << 30
_CPU_SIZE, _DEVICE_SIZE = 2048, 8192


class Roofline:
    """Measures both limits on the default device, again at each call.

    Attributes:
        bandwidths: bytes/s of each measurement.
        peaks: FLOP/s of each measurement.
    """

    def __init__(self) -> None:
        self.bandwidths: list[float] = []
        self.peaks: list[float] = []
        on_cpu = jax.default_backend() == "cpu"
        self._read, self._read_bytes = _host_read() if on_cpu else _device_read()
        size = _CPU_SIZE if on_cpu else _DEVICE_SIZE
        dtype = jnp.float32 if on_cpu else jnp.bfloat16
        operand = jnp.ones((size, size), dtype)
        matmul = jax.jit(lambda a, b: a @ b)
        self._multiply: Callable[[], object] = lambda: matmul(operand, operand).block_until_ready()
        self._multiply_flops = 2 * size**3
        self._read()  # compiled here, not while something is measured
        self._multiply()

    def measure(self, *, repeats: int = 3) -> None:
        """Adds one measurement of each: the best of `repeats`, after one that is not counted."""
        self.bandwidths.append(self._read_bytes / _best(self._read, repeats))
        self.peaks.append(self._multiply_flops / _best(self._multiply, repeats))


def _best(work: Callable[[], object], repeats: int) -> float:
    work()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def _device_read() -> tuple[Callable[[], object], int]:
    data = jnp.zeros((_DEVICE_BYTES // 4,), jnp.float32)
    total = jax.jit(jnp.sum)
    return lambda: total(data).block_until_ready(), data.nbytes


def _host_read() -> tuple[Callable[[], object], int]:
    """One thread a core; numpy's maximum is vectorised and lets go of the interpreter."""
    num_threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    parts = np.array_split(
        np.ones(_CPU_BYTES // 4, np.float32), num_threads
    )  # zeros are not stored
    pool = ThreadPoolExecutor(num_threads)
    return lambda: list(pool.map(np.max, parts)), _CPU_BYTES
