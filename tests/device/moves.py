"""Moves pages to the host and back and compares their bits; run as a program, on eight devices.

    python -m tests.device.moves DATA MODEL DTYPE

In a process of its own, since the number of CPU devices is fixed when JAX starts.
"""

from __future__ import annotations

import sys
from collections.abc import Hashable
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxserve.config import ParallelConfig
from jaxserve.device.cache import init_cache
from jaxserve.device.host_store import HostStore
from jaxserve.device.lowering import Lowering
from jaxserve.device.sharding import make_mesh
from jaxserve.device.state import DeviceState, init_device_state
from jaxserve.types import CacheGroup

NUM_DEVICES = 8
PAGE_SIZE = 4
NUM_PAGES = (40, 24)
HOST_PAGES = (30, 18)
GROUPS = (
    CacheGroup(kind="full", layers=(0, 2, 3), num_kv_heads=8, head_dim=6),
    CacheGroup(kind="sliding", layers=(1,), num_kv_heads=8, head_dim=4, window=9),
)


class Device:
    """A state whose pages are random bits, and a host store over it."""

    def __init__(self, mesh: Mesh, dtype: str) -> None:
        cache = init_cache(
            GROUPS, NUM_PAGES, page_size=PAGE_SIZE, dtype=dtype, mesh=mesh, backend="xla"
        )
        self.state = init_device_state(
            cache,
            max_rows=2,
            vocab_size=32,
            pages_per_sequence=4,
            hidden=jax.ShapeDtypeStruct((2, 8), "float32"),
            mesh=mesh,
        )
        self.copies = mesh.shape["data"]
        self.store = HostStore(cache, HOST_PAGES, mesh)
        lowering = Lowering(mesh, [], self.state, shared=False)
        wanted = self.store.wanted()
        self.programs = {key: lowering.lower(wanted[key]).compile() for key in wanted}
        self.store.warm_up(self.run, lambda: jax.block_until_ready(self.state))
        self.fill(0)

    def run(self, key: Hashable, inputs: Any) -> Any:
        """As `Executor` runs the store's programs."""
        found = self.programs[key](self.state, inputs)
        if isinstance(found, DeviceState):
            self.state = found
        return found

    def fill(self, seed: int) -> None:
        """Other random bits in every page, NaN among them."""
        random = np.random.default_rng(seed)

        def bits(x: jax.Array) -> jax.Array:
            drawn = np.frombuffer(random.bytes(x.nbytes), x.dtype).reshape(x.shape)
            return jax.device_put(drawn, x.sharding)

        self.state = replace(self.state, cache=jax.tree.map(bits, self.state.cache))

    def page(self, copy: int, group: int, page: int) -> bytes:
        """All bits of a page."""
        own = copy * NUM_PAGES[group] + page
        return b"".join(
            np.asarray(x)[:, own].tobytes() for x in jax.tree.leaves(self.state.cache.groups[group])
        )


def check(mesh: Mesh, dtype: str) -> None:
    """Pages come back bit by bit, and nothing else changes; a page saved again is the later one."""
    device = Device(mesh, dtype)
    assert all(ns > 0 for ns in device.store.page_ns)
    random = np.random.default_rng(1)
    for round in range(3):
        kept: dict[tuple[int, int, int], bytes] = {}
        for again in range(2):  # the second time some host pages are saved once more, unread
            device.fill(10 * round + again)
            for copy in range(device.copies):
                saves = []
                for group, num_pages in enumerate(HOST_PAGES):
                    count = int(random.integers(1, num_pages + 1))
                    hosts = random.permutation(num_pages)[:count].tolist()
                    pages = (1 + random.permutation(NUM_PAGES[group] - 1)[:count]).tolist()
                    saves += [(group, page, host) for page, host in zip(pages, hosts, strict=True)]
                device.store.save(copy, saves, device.run)
                kept |= {(copy, g, host): device.page(copy, g, page) for g, page, host in saves}
        device.fill(10 * round + 5)
        loaded: dict[tuple[int, int, int], bytes] = {}
        for copy in range(device.copies):
            loads = []
            for group in range(len(GROUPS)):
                hosts = [host for c, g, host in kept if (c, g) == (copy, group)]
                pages = (1 + random.permutation(NUM_PAGES[group] - 1)[: len(hosts)]).tolist()
                loads += [(group, host, page) for host, page in zip(hosts, pages, strict=True)]
            device.store.load(copy, loads, device.run)
            loaded |= {(copy, g, page): kept[copy, g, host] for g, host, page in loads}
        found = device.state
        device.fill(10 * round + 5)
        before = {
            (copy, group, page): device.page(copy, group, page)
            for copy in range(device.copies)
            for group, num_pages in enumerate(NUM_PAGES)
            for page in range(1, num_pages)  # page 0 takes what is padding
        }
        device.state = found
        for place, bits in (before | loaded).items():
            assert device.page(*place) == bits, place


def main(data: str, model: str, dtype: str) -> None:
    """On a mesh of eight simulated devices."""
    jax.config.update("jax_num_cpu_devices", NUM_DEVICES)
    mesh = make_mesh(jax.devices(), ParallelConfig(data=int(data), model=int(model)))
    check(mesh, dtype)


if __name__ == "__main__":
    main(*sys.argv[1:])
