"""Pages in the host's memory: bits are kept in every form and on every mesh."""

from __future__ import annotations

import subprocess
import sys
import threading
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.config import CacheConfig
from jaxserve.device import host_store
from jaxserve.device.cache import bytes_of_page, host_pool_sizes
from jaxserve.device.sharding import make_mesh
from jaxserve.device.step import empty_inputs
from jaxserve.errors import ConfigError
from tests.device import moves
from tests.device.rig import NUM_HOST_PAGES, Rig, Warm, prompt_of

MESH = make_mesh(jax.devices()[:1])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8", "float8_e4m3fn"])
def test_bits_come_back(dtype: str) -> None:
    moves.check(MESH, dtype)


@pytest.mark.parametrize(
    ("data", "model", "dtype"), [(1, 8, "float8_e4m3fn"), (4, 2, "bfloat16"), (8, 1, "int8")]
)
def test_bits_come_back_on_a_mesh(data: int, model: int, dtype: str) -> None:
    command = [sys.executable, "-m", "tests.device.moves", str(data), str(model), dtype]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_save_waits_for_nobody_and_a_load_for_its_own_pages() -> None:
    """While the writer is held up: saves return, a load of what is in memory does too."""
    device = moves.Device(MESH, "float32")
    store, held = device.store, threading.Event()
    expected = {page: device.page(0, 0, page) for page in (3, 4)}
    store.save(0, [(0, 3, 7)], device.run)
    store._settle()
    store._writer.submit(held.wait, 60)
    store.save(0, [(0, 4, 8)], device.run)
    assert not store._pending[0, 0, 8].done()
    store.load(0, [(0, 7, 10)], device.run)
    assert device.page(0, 0, 10) == expected[3]
    device.fill(9)  # the save has read the page as it was
    loading = threading.Thread(target=store.load, args=(0, [(0, 8, 11)], device.run))
    loading.start()
    loading.join(0.2)
    assert loading.is_alive()
    held.set()
    loading.join(60)
    assert device.page(0, 0, 11) == expected[4]


def test_a_fault_of_the_writer_is_told_by_the_load() -> None:
    device = moves.Device(MESH, "float32")
    device.store._memory[0][0][0].flags.writeable = False
    device.store.save(0, [(0, 3, 7)], device.run)
    with pytest.raises(ValueError, match="read-only"):
        device.store.load(0, [(0, 7, 3)], device.run)


def test_gathered_pages_that_wait_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_store, "PENDING_BYTES", 1)
    device = moves.Device(MESH, "float32")
    held = threading.Event()
    device.store._writer.submit(held.wait, 60)
    for page in (1, 2):
        device.store.save(0, [(0, page, page)], device.run)
    third = threading.Thread(target=device.store.save, args=(0, [(0, 3, 3)], device.run))
    third.start()
    third.join(0.2)
    assert third.is_alive() and not device.store._room.acquire(blocking=False)
    held.set()
    third.join(60)
    device.store._settle()


SIZES = {"dtype": "float32", "copies": 2, "free_bytes": 1 << 30}
PAGE_BYTES = [bytes_of_page(group, 16, "float32", "xla") for group in moves.GROUPS]


def test_the_store_is_as_large_as_it_was_asked_to_be() -> None:
    config = CacheConfig(host_bytes=10_000_000)
    sizes = host_pool_sizes(moves.GROUPS, config, (41, 21), **SIZES)
    used = 2 * int(np.dot(sizes, PAGE_BYTES))
    assert 0 <= 10_000_000 - used < 2 * sum(PAGE_BYTES) * 2
    assert abs(sizes[0] - 2 * sizes[1]) <= 2  # shared as the pools are


@pytest.mark.parametrize(
    ("config", "more", "expected"),
    [
        (CacheConfig(), {}, (40, 20)),  # the pools' size
        (CacheConfig(), {"free_bytes": 0}, (0, 0)),
        (CacheConfig(), {"free_bytes": None}, (0, 0)),
        (CacheConfig(), {"several_hosts": True}, (0, 0)),
        (CacheConfig(host_bytes=0), {}, (0, 0)),
        (CacheConfig(preemption="recompute"), {}, (0, 0)),
    ],
)
def test_without_being_asked(config: CacheConfig, more: dict, expected: tuple) -> None:
    assert host_pool_sizes(moves.GROUPS, config, (41, 21), **SIZES | more) == expected


def test_an_eighth_of_what_is_free() -> None:
    sizes = host_pool_sizes(moves.GROUPS, CacheConfig(), (10**6, 10**6), **SIZES)
    assert (1 << 27) * 0.99 < 2 * int(np.dot(sizes, PAGE_BYTES)) <= 1 << 27


@pytest.mark.parametrize(
    ("host_bytes", "more", "message"),
    [
        (1 << 31, {}, r"2147483648 \(2048.0 MiB\) is more than the 1024.0 MiB"),
        (100, {}, "does not hold a page of each of 2 cache groups in each of 2 copies"),
        (1 << 20, {"several_hosts": True}, "several hosts.*host_bytes=0"),
    ],
)
def test_what_does_not_fit_is_told_at_start(host_bytes: int, more: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        host_pool_sizes(moves.GROUPS, CacheConfig(host_bytes=host_bytes), (41, 21), **SIZES | more)


@pytest.mark.slow
def test_a_step_saves_first_and_loads_last(llama: Warm) -> None:
    """A page that is saved, copied over and loaded in one step: each change sees those before."""
    executor = llama.executor
    llama.poison()
    executor._state = replace(
        executor._state,
        cache=jax.tree.map(
            lambda x: x.at[:, :10].set(jnp.arange(10.0).reshape(1, 10, 1, 1, 1)),
            executor._state.cache,
        ),
    )
    changes = replace(
        empty_inputs(llama.buckets.choose(1, 1), llama.limits.max_rows),
        page_saves=[(0, 3, 5), (0, 4, 6)],
        page_copies=[(0, 1, 3), (0, 2, 7)],
        page_loads=[(0, 5, 7), (0, 6, 8)],
    )
    (outputs,) = executor.collect(executor.launch([changes]))
    (pages,) = jax.tree.leaves(executor._state.cache.groups[0])
    found = np.asarray(pages)[:, :10]
    for page, value in enumerate([None, 1, 2, 1, 4, 5, 6, 3, 4, 9]):
        assert value is None or (found[:, page] == value).all()
    assert outputs.page_ns == executor.page_ns and outputs.page_ns[0] > 0


@pytest.mark.slow
@pytest.mark.parametrize("sampling", [{}, {"presence_penalty": 0.6, "repetition_penalty": 1.3}])
def test_tokens_are_equal_with_and_without_preemption(llama: Warm, sampling: dict) -> None:
    """A real model: pages for one and a half sequences, which take turns."""
    found = []
    for pages, host_pages in ((200, 0), (20, NUM_HOST_PAGES), (20, 0)):
        rig = Rig(llama, pages, host_pages)
        sequences = [
            *rig.submit(prompt_of(20), max_tokens=40, **sampling),
            *rig.submit(prompt_of(24, 1), max_tokens=40, n=2, **sampling),
            *rig.submit(prompt_of(9, 2), max_tokens=30, **sampling),
        ]
        rig.run()
        found.append([rig.emitted[sequence] for sequence in sequences])
        swapped = sum(sequence.num_swapped for sequence in sequences)
        recomputed = sum(sequence.num_recomputed for sequence in sequences)
        assert (swapped > 0) is (host_pages > 0)
        assert (recomputed > 0) is (pages == 20 and host_pages == 0)
    assert found[0] == found[1] == found[2]
