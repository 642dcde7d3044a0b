"""The pool's sizes, what is said where they do not fit, its arrays, and copies between pages."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.config import CacheConfig, SchedulerConfig
from jaxserve.device.cache import (
    bytes_of_page,
    copy_pages,
    init_cache,
    most_pages,
    pages_per_sequence,
    pool_sizes,
)
from jaxserve.device.memory import MEBIBYTE, Memory
from jaxserve.device.sharding import make_mesh
from jaxserve.errors import ConfigError
from jaxserve.models.context import GroupPages
from jaxserve.types import CacheGroup
from pallas_kernels import native

GIB = 1024 * MEBIBYTE
#: 16 KiB a page of 16: 2 layers × K and V × 2 heads × 16 positions × 32 × 4 bytes.
FULL = CacheGroup(kind="full", layers=(0, 2), num_kv_heads=2, head_dim=32)
#: Half of that.
SLIDING = CacheGroup(kind="sliding", layers=(1,), num_kv_heads=2, head_dim=32, window=100)
PAGE_BYTES = 16 * 1024
LIMITS = SchedulerConfig(max_rows=8, max_step_tokens=60)


def sizes(
    *groups: CacheGroup,
    free: int = GIB,
    total: int = 4 * GIB,
    max_context: int = 1600,
    max_rows: int = 8,
    **config: Any,
) -> tuple[int, ...]:
    """Pools of these groups, of 16 KiB a page in FULL."""
    return pool_sizes(
        groups or (FULL,),
        CacheConfig(page_size=16, **config),
        SchedulerConfig(max_rows=max_rows, max_step_tokens=60),
        max_context=max_context,
        dtype="float32",
        memory=Memory(total_bytes=total, free_bytes=free),
    )


def test_pages_that_a_sequence_holds_at_once() -> None:
    def most(group: CacheGroup, max_context: int, page_size: int = 16, tokens: int = 60) -> int:
        return most_pages(
            group, page_size=page_size, max_context=max_context, max_step_tokens=tokens
        )

    assert [pages_per_sequence(context, 16) for context in (1, 16, 17)] == [1, 1, 2]
    assert [most(FULL, context) for context in (1, 16, 17, 1600)] == [1, 1, 2, 100]
    # 100 behind and 60 in the step lie on 10 pages, or on 11 where they begin within one
    assert [most(SLIDING, context) for context in (16, 160, 177, 1600)] == [1, 10, 11, 11]
    assert most(SLIDING, 1600, page_size=1, tokens=1) == 102


def test_num_pages_are_as_asked_with_the_null_page_on_top() -> None:
    assert sizes(num_pages=50) == (51,)
    assert sizes(FULL, SLIDING, num_pages=50) == (51, 51)
    assert sizes(num_pages=9, free=10 * PAGE_BYTES) == (10,)
    with pytest.raises(ConfigError) as error:
        sizes(num_pages=12, free=10 * PAGE_BYTES)
    assert "num_pages=12 needs 0.2 MiB, and 0.2 MiB are free: set it to at most 9" in str(error)
    with pytest.raises(ConfigError, match="at most 5$"):
        sizes(FULL, SLIDING, num_pages=7, free=10 * PAGE_BYTES)
    with pytest.raises(ConfigError, match="not even one fits"):
        sizes(num_pages=1, free=PAGE_BYTES)


def test_memory_bytes_are_spent_and_not_exceeded() -> None:
    assert sizes(memory_bytes=401 * PAGE_BYTES) == (401,)
    assert sizes(memory_bytes=402 * PAGE_BYTES - 1) == (401,)
    with pytest.raises(ConfigError, match=r"\(1025\.0 MiB\) is more than the 1024\.0 MiB"):
        sizes(memory_bytes=1025 * MEBIBYTE)


def test_no_more_than_all_rows_can_use() -> None:
    assert sizes(memory_bytes=GIB // 2) == (1 + 8 * 100,)
    assert sizes(memory_bytes=GIB // 2, max_rows=3) == (1 + 3 * 100,)
    assert sizes(FULL, SLIDING, memory_bytes=GIB // 2) == (1 + 8 * 100, 1 + 8 * 11)


def test_groups_share_in_proportion_to_what_they_can_use() -> None:
    """Three rows of 100 pages and 11 half as large, and half of a fourth."""
    budget = PAGE_BYTES + PAGE_BYTES // 2 + int(3.5 * (100 * PAGE_BYTES + 11 * PAGE_BYTES // 2))
    assert sizes(FULL, SLIDING, memory_bytes=budget) == (1 + 350, 1 + 38)


def test_a_share_of_the_memory_is_halved_until_it_is_free() -> None:
    def share(free_mib: float, **config: Any) -> int:
        pages = sizes(
            total=4 * GIB, free=int(free_mib * MEBIBYTE), max_rows=4096, max_context=160, **config
        )
        return pages[0] * PAGE_BYTES // MEBIBYTE

    # a page of each sequence's ten is lost at most
    assert share(4096) == 640  # 4096 rows' worth
    assert share(4096, memory_fraction=0.125) == 512
    assert share(560, memory_fraction=0.125) == 256  # a tenth stays free
    assert share(300, memory_fraction=0.125) == 256
    assert share(280, memory_fraction=0.125) == 128
    assert share(100, memory_fraction=0.125) == 64


@given(st.integers(320, 550))
def test_the_pool_is_the_same_while_free_memory_varies(free_mib: int) -> None:
    free = free_mib * MEBIBYTE
    assert sizes(free=free, memory_fraction=0.125, max_rows=200) == (256 * 64,)


def test_one_sequence_is_served_though_the_halved_share_is_smaller() -> None:
    """A share is halved only down to what one sequence of the whole context needs."""
    least = 101 * PAGE_BYTES
    assert sizes(total=400 * PAGE_BYTES, free=int(least / 0.9) + 1, memory_fraction=0.5) == (101,)


def test_a_context_that_does_not_fit_is_told_with_one_that_does() -> None:
    with pytest.raises(ConfigError) as error:
        sizes(memory_bytes=100 * PAGE_BYTES)
    assert "needs 1.6 MiB for one sequence of 1600 positions" in str(error)
    assert "cache.memory_bytes gives 1.6 MiB" in str(error)
    assert "set model.max_context to at most 1584, or give" in str(error)
    assert sizes(memory_bytes=100 * PAGE_BYTES, max_context=1584) == (100,)
    with pytest.raises(ConfigError, match=r"memory_fraction=0\.01 of 100\.0 MiB gives 1\.0 MiB"):
        sizes(total=100 * MEBIBYTE, free=50 * MEBIBYTE, memory_fraction=0.01)
    with pytest.raises(ConfigError, match=r"of which 1\.0 MiB are free, gives 0\.9 MiB"):
        sizes(total=100 * MEBIBYTE, free=MEBIBYTE)
    with pytest.raises(ConfigError, match=r"gives 0\.0 MiB: give the cache more memory"):
        sizes(memory_bytes=2 * PAGE_BYTES - 1)


groups = st.builds(
    CacheGroup,
    kind=st.just("any"),
    layers=st.integers(1, 200).map(lambda n: tuple(range(n))),
    num_kv_heads=st.integers(1, 256),
    head_dim=st.integers(1, 1024),
    window=st.one_of(st.none(), st.integers(1, 2**31 - 1)),
)
#: Small, usual and absurd numbers.
numbers = st.one_of(st.integers(0, 100), st.integers(0, 2**36), st.integers(0, 2**62))


@given(
    st.lists(groups, min_size=1, max_size=3),
    st.data(),
    st.builds(lambda a, b: Memory(total_bytes=max(a, b), free_bytes=min(a, b)), numbers, numbers),
)
def test_whatever_the_numbers_it_fits_or_says_what_would(
    groups: list[CacheGroup], data: st.DataObject, memory: Memory
) -> None:
    config = CacheConfig(
        page_size=data.draw(st.integers(1, 1024)),
        num_pages=data.draw(st.one_of(st.just(0), st.integers(0, 2**31 - 1))),
        memory_bytes=data.draw(st.one_of(st.just(0), st.integers(0, 2**50))),
        memory_fraction=data.draw(st.floats(0.01, 0.95)),
    )
    limits = SchedulerConfig(
        max_rows=data.draw(st.integers(1, 4096)), max_step_tokens=data.draw(st.integers(1, 65536))
    )
    max_context = data.draw(st.one_of(st.integers(1, 10_000), st.integers(1, 2**31 - 1)))

    def ask(config: CacheConfig, max_context: int) -> tuple[int, ...]:
        return pool_sizes(
            groups, config, limits, max_context=max_context, dtype="bfloat16", memory=memory
        )

    try:
        pools = ask(config, max_context)
    except ConfigError as error:
        words = error.message.replace(",", "").split()
        if "most" not in words:
            return
        fits = int(words[words.index("most") + 1])
        if config.num_pages:
            pools = ask(CacheConfig(page_size=config.page_size, num_pages=fits), max_context)
        else:
            pools = ask(config, fits)
            with pytest.raises(ConfigError):
                ask(config, fits + 1)
    used = [
        pages * group.page_bytes(config.page_size, 2)
        for pages, group in zip(pools, groups, strict=True)
    ]
    assert sum(used) <= memory.free_bytes
    if not config.num_pages:
        share = memory.total_bytes * config.memory_fraction
        assert sum(used) <= (config.memory_bytes or share)
    assert min(pools) >= 2


def _backends() -> list[Any]:
    reason = native.load().reason
    marks = [pytest.mark.skip(reason=f"native kernels: {reason}")] if reason else []
    return ["xla", pytest.param("cpu", marks=marks)]


@pytest.mark.parametrize("backend", _backends())
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_arrays_of_the_pool(backend: str, dtype: str) -> None:
    mesh = make_mesh(jax.devices()[:1])
    cache = init_cache(
        (FULL, SLIDING), (5, 7), page_size=16, dtype=dtype, mesh=mesh, backend=backend
    )
    for group, shape in zip(cache.groups, ((2, 5, 2, 16, 64), (1, 7, 2, 16, 64)), strict=True):
        assert (group.kv.shape, group.kv.dtype) == (shape, dtype)
        assert group.kv.sharding.mesh == mesh
    pointers = [pages.unsafe_buffer_pointer() for pages in jax.tree.leaves(cache)]
    assert len(set(pointers)) == 2  # or a donated one would take another with it


@pytest.mark.parametrize(("backend", "page_size", "width"), [("xla", 16, 64), ("tpu", 96, 128)])
@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn", "float32"])
def test_a_page_takes_the_bytes_it_is_counted_with(
    dtype: str, backend: str, page_size: int, width: int
) -> None:
    mesh = make_mesh(jax.devices()[:1])
    cache = init_cache((FULL,), (5,), page_size=page_size, dtype=dtype, mesh=mesh, backend=backend)
    (group,) = cache.groups
    assert (group.kv.shape, group.kv.dtype) == ((2, 5, 2, page_size, width), dtype)
    held = sum(array.nbytes for array in jax.tree.leaves(group))
    assert held == 5 * bytes_of_page(FULL, page_size, dtype, backend)
    targets, sources = jnp.asarray([2, 0]), jnp.asarray([1, 0])
    marked = jax.tree.map(lambda x: x.at[:, 1].set(1), group)
    for array in jax.tree.leaves(copy_pages(marked, sources, targets)):
        assert (np.asarray(array[:, 2], np.float32) == 1).all()
        assert not np.asarray(array[:, 3], np.float32).any()


@pytest.mark.skipif(native.load().reason is not None, reason="no native kernels")
def test_an_unused_pool_takes_no_memory() -> None:
    before = _resident_bytes()
    group = CacheGroup(kind="full", layers=(0, 1, 2, 3), num_kv_heads=8, head_dim=64)
    cache = init_cache(
        (group,),
        (16384,),
        page_size=16,
        dtype="float32",
        mesh=make_mesh(jax.devices()[:1]),
        backend="cpu",
    )
    jax.block_until_ready(cache)
    assert sum(pages.nbytes for pages in jax.tree.leaves(cache)) == 4 * GIB
    assert _resident_bytes() - before < GIB // 8


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _numbered(num_pages: int = 6) -> np.ndarray:
    """Pages full of their number, in the second layer minus it."""
    number = np.arange(num_pages, dtype=np.float32)[None, :, None, None, None]
    pages = np.broadcast_to(number, (2, num_pages, 2, 4, 8)).copy()
    pages[1] *= -1
    return pages


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        ([(1, 4)], [0, 1, 2, 3, 1, 5]),
        ([(1, 4), (1, 5), (0, 0), (0, 0)], [0, 1, 2, 3, 1, 1]),
        ([(1, 2), (2, 1)], [0, 2, 1, 3, 4, 5]),  # all are read before any is written
        ([(1, 2), (2, 3), (3, 4), (4, 5)], [0, 1, 1, 2, 3, 4]),
    ],
)
def test_pages_are_copied_in_all_layers(pairs: list[tuple[int, int]], expected: list[int]) -> None:
    pages = _numbered()
    sources, targets = jnp.asarray(pairs, jnp.int32).T
    copied = jax.jit(copy_pages)(GroupPages(kv=jnp.asarray(pages)), sources, targets)
    np.testing.assert_array_equal(copied.kv, pages[:, expected])


def test_copies_are_made_in_place() -> None:
    pages = jax.ShapeDtypeStruct((3, 4096, 2, 4, 16), jnp.float32)
    places = jax.ShapeDtypeStruct((16,), jnp.int32)
    compiled = (
        jax.jit(copy_pages, donate_argnums=0).lower(GroupPages(kv=pages), places, places).compile()
    )
    memory = compiled.memory_analysis()
    assert memory is not None
    assert memory.alias_size_in_bytes == pages.size * 4
    assert memory.temp_size_in_bytes < pages.size * 4 // 16
