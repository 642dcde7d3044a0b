"""KV pages in the host's memory: the bytes behind the scheduler's host pages.

    save   gather on the device ──▶ copy to the host, while steps run ──▶ writer thread ──▶ memory
    load   memory ──▶ one array ──▶ scatter into the pages, in the chain of device calls

A save's gather stands in the chain of calls, so it reads pages as of all steps launched before;
what follows runs beside the steps. A load waits only for pending saves of its own pages. Page
numbers are given by the scheduler (`scheduler.host_pages`), nothing is looked up here.

Memory is laid out a page at a time, all layers and KV heads of a page together, whatever the mesh:
[host pages, L, K, Z, W] for each array that pages are made of. Bits are moved, never converted. It
is allocated at start and takes memory where it is written. Each copy of the model has its own.

Invariants: writes reach the memory in the order of the saves, so that a page may be saved anew
while an earlier save of it is under way. At most `PENDING_BYTES` wait on the device to be copied; a
save beyond that waits for the writer, since the device's memory is what ran out.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Int

from jaxserve.device.lowering import Wanted, integers
from jaxserve.device.sharding import moved_sharding
from jaxserve.device.state import DeviceState
from jaxserve.models.context import KVCache

#: Pages that one call moves; the rest of a call is padding.
SIZES = (4, 16)
#: Of pages gathered on the device that the host has not taken yet.
PENDING_BYTES = 256 << 20
#: Weight of a new measurement.
_FRESHNESS = 0.1
_ROUNDS = 3

#: (group, page, host page), or (group, host page, page).
Move = tuple[int, int, int]
#: Runs the program of this key; returns what it reads of the state.
Run = Callable[[Hashable, Any], Any]


class HostStore:
    """The host's pages of every copy of the model.

    Args:
        cache: of the device; its arrays' shapes are what counts.
        num_pages: host pages of each cache group, for each copy.
        mesh: that the cache is on; all of its devices are this host's.
    """

    def __init__(self, cache: KVCache, num_pages: Sequence[int], mesh: Mesh) -> None:
        self._mesh = mesh
        self._copies = mesh.shape["data"]
        self._kinds = [
            [(_page_shape(x.shape), np.dtype(x.dtype)) for x in jax.tree.leaves(group)]
            for group in cache.groups
        ]
        self._memory = [
            [
                [np.empty((pages, *shape), _bits(dtype)) for shape, dtype in kinds]
                for pages, kinds in zip(num_pages, self._kinds, strict=True)
            ]
            for _ in range(self._copies)
        ]
        self._writer = ThreadPoolExecutor(1, "jaxserve host store")
        self._pending: dict[tuple[int, int, int], Future[None]] = {}
        self._latest: Future[None] | None = None
        largest = SIZES[-1] * max(map(self._page_bytes, range(len(self._kinds))))
        self._room = threading.BoundedSemaphore(max(2, PENDING_BYTES // largest))
        self._move_ns = [0.0] * len(self._kinds)  # gather and scatter, measured at warm-up
        self._save_ns = [0.0] * len(self._kinds)
        self._load_ns = [0.0] * len(self._kinds)

    @property
    def page_ns(self) -> tuple[float, ...]:
        """By cache group, measured: to save a page and to load it again."""
        return tuple(map(sum, zip(self._move_ns, self._save_ns, self._load_ns, strict=True)))

    def _page_bytes(self, group: int) -> int:
        return sum(int(np.prod(shape)) * dtype.itemsize for shape, dtype in self._kinds[group])

    # ------------------------------------------------------------------ programs

    def wanted(self) -> dict[Hashable, Wanted]:
        """The programs that move pages, by key."""
        wanted: dict[Hashable, Wanted] = {}
        for group, kinds in enumerate(self._kinds):
            for size in SIZES:
                pages = integers(size)
                sharding = moved_sharding(self._mesh) if self._mesh.size > 1 else None
                values = tuple(
                    jax.ShapeDtypeStruct((size, *shape), dtype, sharding=sharding)
                    for shape, dtype in kinds
                )
                save = Wanted(_make_save(group), pages, reads=moved_sharding(self._mesh))
                wanted["save", group, size] = save
                wanted["load", group, size] = Wanted(_make_load(group), (pages, values))
        return wanted

    def warm_up(self, run: Run, wait: Callable[[], None]) -> None:
        """Runs every program, and measures how long a page takes; the store is empty.

        Args:
            wait: for all that runs on the device.
        """
        for copy, group, size in itertools.product(
            range(self._copies), range(len(self._kinds)), SIZES
        ):
            count = min(size, len(self._memory[copy][group][0]))
            moves = []
            for _ in range(_ROUNDS):
                wait()
                start = time.perf_counter_ns()
                jax.block_until_ready(run(("save", group, size), self._indices(copy, size, ())))
                moves.append(time.perf_counter_ns() - start)
                self.save(copy, [(group, 0, page) for page in range(count)], run)
                self._settle()
                start = time.perf_counter_ns()
                self.load(copy, [(group, page, 0) for page in range(count)], run)
                called = time.perf_counter_ns()
                wait()
                moves[-1] += time.perf_counter_ns() - called
            self._move_ns[group] = min(moves[1:]) / size
            self._save_ns[group], self._load_ns[group] = 0.0, 0.0  # the first ones are no measure
            self.save(copy, [(group, 0, page) for page in range(count)], run)
            self.load(copy, [(group, page, 0) for page in range(count)], run)
        wait()

    # ------------------------------------------------------------------ moves

    def save(self, copy: int, saves: Sequence[Move], run: Run) -> None:
        """Starts to copy (group, page, host page) of one copy of the model to the host."""
        for group, size, moves in _batches(saves):
            pages, host_pages = [p for p, _ in moves], [h for _, h in moves]
            self._room.acquire()
            arrays = run(("save", group, size), self._indices(copy, size, pages))
            parts = [self._parts(copy, array) for array in arrays]
            for _, data in itertools.chain(*parts):
                data.copy_to_host_async()
            future = self._writer.submit(self._write, copy, group, host_pages, parts)
            self._latest = future
            for host_page in host_pages:
                self._pending[copy, group, host_page] = future

    def load(self, copy: int, loads: Sequence[Move], run: Run) -> None:
        """Copies (group, host page, page) of one copy of the model to the device."""
        for group, size, moves in _batches(loads):
            host_pages, pages = [h for h, _ in moves], [p for _, p in moves]
            for host_page in host_pages:
                future = self._pending.pop((copy, group, host_page), None)
                if future is not None:
                    future.result()
            start = time.perf_counter_ns()
            values = []
            for memory, (shape, dtype) in zip(
                self._memory[copy][group], self._kinds[group], strict=True
            ):
                bits = np.empty((size, *shape), memory.dtype)  # what is padding goes to page 0
                for place, host_page in enumerate(host_pages):
                    bits[place] = memory[host_page]
                values.append(self._for_copies(copy, bits.view(dtype)))
            run(("load", group, size), (self._indices(copy, size, pages), tuple(values)))
            _observe(self._load_ns, group, start, len(host_pages))

    def _write(
        self,
        copy: int,
        group: int,
        host_pages: Sequence[int],
        parts: list[list[tuple[slice, Array]]],
    ) -> None:
        """The writer's: brings gathered pages into the memory."""
        try:
            jax.block_until_ready(parts)
            start = time.perf_counter_ns()
            for memory, own in zip(self._memory[copy][group], parts, strict=True):
                for heads, data in own:
                    values = np.asarray(data).reshape(-1, *data.shape[-memory.ndim + 1 :])
                    bits = values.view(memory.dtype)
                    for place, host_page in enumerate(host_pages):
                        memory[host_page, :, heads] = bits[place]
            _observe(self._save_ns, group, start, len(host_pages))
        finally:
            self._room.release()

    def _settle(self) -> None:
        """Waits for the writer."""
        if self._latest is not None:
            self._latest.result()

    # ------------------------------------------------------------------ copies and devices

    def _indices(self, copy: int, size: int, pages: Sequence[int]) -> Int[np.ndarray, "..."]:
        """Page numbers for one copy, page 0 for the others and behind the last."""
        if self._mesh.size == 1:
            indices = np.zeros(size, np.int32)
            indices[: len(pages)] = pages
            return indices
        indices = np.zeros((self._copies, size), np.int32)
        indices[copy, : len(pages)] = pages
        return indices

    def _for_copies(self, copy: int, values: np.ndarray) -> Any:
        """Pages for one copy, each device's KV heads to it; zeros for the other copies."""
        if self._mesh.size == 1:
            return values

        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            own = values[None, *index[1:]]
            return own if (index[0].start or 0) == copy else np.zeros_like(own)

        shape = (self._copies, *values.shape)
        return jax.make_array_from_callback(shape, moved_sharding(self._mesh), part)

    def _parts(self, copy: int, array: Array) -> list[tuple[slice, Array]]:
        """(KV heads, their pages) of one copy, as they lie on its devices."""
        if self._mesh.size == 1:
            return [(slice(None), array)]
        return [
            (shard.index[3], shard.data)
            for shard in array.addressable_shards
            if (shard.index[0].start or 0) == copy
        ]


def _make_save(group: int) -> Callable[[DeviceState, Array], tuple[Array, ...]]:
    """Gathers pages of a group, a page's layers together.

    Sliced one by one: for a gather XLA on a TPU lays the pages out anew, all of them (compiled for
    v5e, 4.0 GiB of temporary memory beside 3.9 GiB of pages).
    """

    def save(state: DeviceState, pages: Int[Array, "C"]) -> tuple[Array, ...]:
        def gather(x: Array) -> Array:
            own = [jax.lax.dynamic_index_in_dim(x, page, axis=1, keepdims=False) for page in pages]
            return jnp.stack(own)

        return tuple(gather(x) for x in jax.tree.leaves(state.cache.groups[group]))

    return save


def _make_load(group: int) -> Callable[[DeviceState, Any], DeviceState]:
    """Writes pages of a group."""

    def load(state: DeviceState, inputs: tuple[Array, tuple[Array, ...]]) -> DeviceState:
        pages, values = inputs
        leaves, structure = jax.tree.flatten(state.cache.groups[group])
        written = [
            x.at[:, pages].set(jnp.moveaxis(new, 0, 1))
            for x, new in zip(leaves, values, strict=True)
        ]
        groups = list(state.cache.groups)
        groups[group] = jax.tree.unflatten(structure, written)
        return replace(state, cache=KVCache(groups=tuple(groups)))

    return load


def _batches(moves: Sequence[Move]) -> Iterator[tuple[int, int, list[tuple[int, int]]]]:
    """(group, pages of the call, moves without their group)."""
    for group in sorted({group for group, _, _ in moves}):
        own = [(source, target) for g, source, target in moves if g == group]
        while own:
            size = next((size for size in SIZES if len(own) <= 2 * size), SIZES[-1])
            yield group, size, own[:size]
            own = own[size:]


def _observe(means: list[float], group: int, start_ns: int, num_pages: int) -> None:
    found = (time.perf_counter_ns() - start_ns) / num_pages
    mean = means[group]
    means[group] = mean + _FRESHNESS * (found - mean) if mean else found


def _page_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """Of one page, [L, K, …], in an array of pages, [L, P, K, …]."""
    return (shape[0], *shape[2:])


def _bits(dtype: np.dtype) -> np.dtype:
    """Whole numbers of the same size: numpy moves them without looking at them."""
    return np.dtype(f"u{dtype.itemsize}")
