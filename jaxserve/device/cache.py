"""The page pool: how many pages there are, and their arrays.

Sizing: no more than max_rows full contexts can use, no more than what the configuration or the
memory gives, shared between cache groups in proportion to what each could use. The share of the
memory depends on its size, not on what happens to be free: the shapes, and with them the compiled
programs in the persistent cache, are the same at every start. Page 0 of each group is the null
page; it comes on top of the numbers that a user sets.

Where the backend can, the arrays are allocated without being written: a page takes memory when it
is first used. So pages hold anything, NaN included, which attention is made for.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Int

from jaxserve.config import CacheConfig, SchedulerConfig
from jaxserve.device.memory import MEBIBYTE, Memory
from jaxserve.device.sharding import pages_sharding
from jaxserve.errors import ConfigError
from jaxserve.models.context import GroupPages, KVCache
from jaxserve.types import CacheGroup
from pallas_kernels.kv_update import empty_pages, page_width, scales_width
from pallas_kernels.quantized_pages import SCALE_BYTES, is_quantized

#: Of the host's memory, for pages, where cache.host_bytes does not say it.
HOST_BYTES = 4 << 30
#: Share of the free memory that the pool may take; the rest is for the step's own arrays.
USABLE = 0.9


def pages_per_sequence(max_context: int, page_size: int) -> int:
    """M: columns of a page table."""
    return -(-max_context // page_size)


def bytes_of_page(group: CacheGroup, page_size: int, dtype: str, backend: str) -> int:
    """Of all of the group's layers, scales included."""
    width = page_width(group.head_dim, backend)
    scales = SCALE_BYTES * scales_width(page_size, backend) if is_quantized(dtype) else 0
    return group.page_bytes(page_size, jnp.dtype(dtype).itemsize, width, scales)


def most_pages(group: CacheGroup, *, page_size: int, max_context: int, max_step_tokens: int) -> int:
    """Pages that one sequence ever holds at once in a group."""
    whole = pages_per_sequence(max_context, page_size)
    if group.window is None:
        return whole
    # The window behind a step's first token, the step's tokens, and a page cut at either end.
    return min(whole, -(-(group.window + max_step_tokens) // page_size) + 1)


def pool_sizes(
    groups: Sequence[CacheGroup],
    config: CacheConfig,
    limits: SchedulerConfig,
    *,
    max_context: int,
    dtype: str,
    memory: Memory,
    backend: str = "xla",
) -> tuple[int, ...]:
    """Pages of each group's pool, its null page included.

    Args:
        max_context: positions a sequence may have.
        dtype: of the pages.
        memory: of the device, with everything else in it.
        backend: of `kv_update`, which decides how wide a page's rows are.

    Raises:
        ConfigError: the pool that was asked for does not fit the free memory, or the memory does
            not hold even one sequence of max_context.
    """
    page_bytes = [bytes_of_page(group, config.page_size, dtype, backend) for group in groups]
    null_bytes = sum(page_bytes)
    if config.num_pages:
        return _asked_for(config.num_pages, page_bytes, memory)

    def most(context: int) -> list[int]:
        """Pages of each group that one sequence of so many positions holds."""
        return [
            most_pages(
                group,
                page_size=config.page_size,
                max_context=context,
                max_step_tokens=limits.max_step_tokens,
            )
            for group in groups
        ]

    def need(context: int) -> int:
        """Bytes of the smallest pool that holds such a sequence."""
        pairs = zip(most(context), page_bytes, strict=True)
        return null_bytes + sum(pages * size for pages, size in pairs)

    least = need(max_context)
    budget, source = _budget(config, memory, least)
    if budget < least:
        fits = bisect_right(range(1, max_context), budget, key=need)
        remedy = f"set model.max_context to at most {fits}, or " if fits else ""
        raise ConfigError(
            f"the KV cache needs {_mib(least)} for one sequence of {max_context} "
            f"positions, and {source} {_mib(budget)}: {remedy}give the cache more memory"
        )
    per_row = least - null_bytes
    usable = min(budget - null_bytes, limits.max_rows * per_row)
    return tuple(1 + pages * usable // per_row for pages in most(max_context))


def _asked_for(num_pages: int, page_bytes: Sequence[int], memory: Memory) -> tuple[int, ...]:
    """The same number of pages for each group, as cache.num_pages says."""
    need, free = (num_pages + 1) * sum(page_bytes), memory.free_bytes
    if need > free:
        fits = free // sum(page_bytes) - 1
        remedy = f"set it to at most {fits}" if fits > 0 else "not even one fits"
        raise ConfigError(
            f"cache.num_pages={num_pages} needs {_mib(need)}, and {_mib(free)} are free: {remedy}"
        )
    return tuple(num_pages + 1 for _ in page_bytes)


def _budget(config: CacheConfig, memory: Memory, least: int) -> tuple[int, str]:
    """Bytes for all pools, and where they come from.

    Args:
        least: below this nothing can be served; a share is not halved beyond it.
    """
    if config.memory_bytes:
        if config.memory_bytes > memory.free_bytes:
            raise ConfigError(
                f"cache.memory_bytes={config.memory_bytes} ({_mib(config.memory_bytes)}) is more "
                f"than the {_mib(memory.free_bytes)} that are free"
            )
        return config.memory_bytes, "cache.memory_bytes gives"
    share = int(memory.total_bytes * config.memory_fraction)
    usable = int(memory.free_bytes * USABLE)
    source = f"cache.memory_fraction={config.memory_fraction:g} of {_mib(memory.total_bytes)}"
    if share > usable:
        source += f", of which {_mib(memory.free_bytes)} are free,"
    budget = share
    while budget > usable:
        budget //= 2
    return max(budget, min(least, usable, share)), f"{source} gives"


def host_pool_sizes(
    groups: Sequence[CacheGroup],
    config: CacheConfig,
    num_pages: Sequence[int],
    *,
    dtype: str,
    copies: int,
    free_bytes: int | None,
    several_hosts: bool = False,
    backend: str = "xla",
) -> tuple[int, ...]:
    """Pages of each group in the host's memory, for each copy; shared out as the pools are.

    Args:
        num_pages: of each group's pool on the device, in each copy.
        dtype: of the pages.
        free_bytes: of the host's memory; None where it cannot be told.
        backend: of `kv_update`, which decides how wide a page's rows are.

    Raises:
        ConfigError: cache.host_bytes is more than there is, or less than a page of each group; or
            the model is on several hosts.
    """
    asked = config.host_bytes
    if asked > 0 and several_hosts:
        raise ConfigError(
            f"cache.host_bytes={asked}: pages of a model on several hosts cannot be kept in the "
            "host's memory: set cache.host_bytes=0"
        )
    if asked == 0 or several_hosts or config.preemption == "recompute":
        return tuple(0 for _ in groups)
    if asked > 0 and free_bytes is not None and asked > free_bytes:
        raise ConfigError(
            f"cache.host_bytes={asked} ({_mib(asked)}) is more than the {_mib(free_bytes)} of the "
            "host's memory that are free: set it lower, or to 0"
        )
    page_bytes = [bytes_of_page(group, config.page_size, dtype, backend) for group in groups]
    pool = sum((n - 1) * size for n, size in zip(num_pages, page_bytes, strict=True))
    budget = asked if asked > 0 else min(HOST_BYTES, (free_bytes or 0) // 8, pool * copies)
    sizes = tuple((pages - 1) * (budget // copies) // pool for pages in num_pages)
    if min(sizes) > 0:
        return sizes
    if asked > 0:
        raise ConfigError(
            f"cache.host_bytes={asked} does not hold a page of each of {len(groups)} cache groups "
            f"in each of {copies} copies of the model ({copies * sum(page_bytes)} bytes at least)"
        )
    return tuple(0 for _ in groups)


def init_cache(
    groups: Sequence[CacheGroup],
    num_pages: Sequence[int],
    *,
    page_size: int,
    dtype: str,
    mesh: Mesh,
    backend: str,
) -> KVCache:
    """The pools' arrays, with undefined content.

    Args:
        num_pages: of each group, in each copy of the model.
        backend: of `kv_update`.
    """
    copies, sharding = mesh.shape["data"], pages_sharding(mesh)

    def allocate(group: CacheGroup, pages: int) -> GroupPages:
        width = page_width(group.head_dim, backend)
        shape = (len(group.layers), copies * pages, group.num_kv_heads, page_size, width)
        empty = jax.jit(
            lambda: empty_pages(shape, jnp.dtype(dtype), backend=backend), out_shardings=sharding
        )
        return GroupPages(kv=empty())

    return KVCache(groups=tuple(allocate(*group) for group in zip(groups, num_pages, strict=True)))


def copy_pages(pages: GroupPages, sources: Int[Array, "C"], targets: Int[Array, "C"]) -> GroupPages:
    """Copies pages of one group; all are read before any is written. 0 → 0 is padding."""
    return jax.tree.map(lambda x: x.at[:, targets].set(x[:, sources]), pages)


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / MEBIBYTE:.1f} MiB"
