"""How the parts of a decoding row's softmax become one, on Hopper.

A part is a maximum, a sum and the weighted values. Two warpgroups of a block of threads join theirs
through shared memory; those of the splits of a context go through global memory, in float32, and
XLA joins them.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels.paged_attention import gpu_block as block

#: Parts that are added up in one expression each, which XLA makes one kernel of.
UNROLLED_PARTS = 32


class Partial(NamedTuple):
    """What each split has seen.

    Attributes:
        values: weighted, not yet divided by the sums.
        tops, totals: maxima, in log2, and sums.
    """

    values: Float[Array, "S R X G H"]
    tops: Float[Array, "S R X G"]
    totals: Float[Array, "S R X G"]


class Exchange(NamedTuple):
    """Shared memory through which warpgroup 1's softmax goes to warpgroup 0, which joins it to its
    own and takes the result out.

    Attributes:
        values: [64, C], of one of `block.columns` after the other.
        stats: [2, 64].
        given, taken: barriers: something is there; room for the next.
    """

    values: Any
    stats: Any
    given: Any
    taken: Any

    def give(self, running: block.Running) -> None:
        """Warpgroup 1's part."""
        self.stats[0], self.stats[1] = running.top, running.total
        for index, part in enumerate(running.parts):
            if index:
                plgpu.barrier_wait(self.taken)
            self.values[:, pl.ds(0, part.shape[1])] = part
            plgpu.barrier_arrive(self.given)

    def finish(self, running: block.Running, result: Any, out: Any) -> None:
        """Warpgroup 0's, where there are no other splits.

        Args:
            result: shared memory [64, C], in rows.
            out: [G, H] in global memory.
        """
        plgpu.barrier_wait(self.given)
        _, total, fades = self._join(running)
        over = 1.0 / jnp.where(total > 0, total, 1.0)
        for index, (first, wide) in enumerate(block.columns_of(running)):
            values = self._values(running, index, fades)
            values = values * lax.broadcast_in_dim(over, values.shape, [0])
            result[:, pl.ds(0, wide)] = values.astype(result.dtype)
            if index + 1 < len(running.parts):
                plgpu.barrier_arrive(self.taken)
            plgpu.commit_smem()
            source = result.at[pl.ds(0, out.shape[0]), pl.ds(0, wide)]
            plgpu.copy_smem_to_gmem(source, out.at[:, pl.ds(first, wide)])
            plgpu.wait_smem_to_gmem(0)

    def write(self, running: block.Running, out: Any, tops: Any, totals: Any) -> None:
        """Warpgroup 0's, where there are other splits.

        Args:
            out, tops, totals: [G, H] and [G] in global memory, G a multiple of TILE.
        """
        rows = pl.ds(0, out.shape[0])
        plgpu.barrier_wait(self.given)
        top, total, fades = self._join(running)
        self.stats[0], self.stats[1] = top, total
        plgpu.commit_smem()
        for index, target in enumerate((tops, totals)):
            plgpu.copy_smem_to_gmem(self.stats.at[index, rows], target)
        for index, (first, wide) in enumerate(block.columns_of(running)):
            values = self._values(running, index, fades)
            self.values[:, pl.ds(0, wide)] = values
            plgpu.commit_smem()
            source = self.values.at[rows, pl.ds(0, wide)]
            plgpu.copy_smem_to_gmem(source, out.at[:, pl.ds(first, wide)])
            plgpu.wait_smem_to_gmem(0)
            if index + 1 < len(running.parts):
                plgpu.barrier_arrive(self.taken)

    def _join(self, running: block.Running) -> tuple[Array, Array, tuple[Array, Array]]:
        """Maximum and sum of both, and what their values are to be multiplied by."""
        layout = plgpu.Layout.WGMMA.reduce(1)
        top, total = (plgpu.load(self.stats.at[i], layout=layout, optimized=False) for i in (0, 1))
        most = jnp.maximum(running.top, top)
        fades = jnp.exp2(running.top - most), jnp.exp2(top - most)
        return most, running.total * fades[0] + total * fades[1], fades

    def _values(
        self, running: block.Running, index: int, fades: tuple[Array, Array]
    ) -> Float[Array, "64 C"]:
        """One of `block.columns`, of both."""
        if index:
            plgpu.barrier_wait(self.given)
        own = running.parts[index]
        place = self.values.at[:, pl.ds(0, own.shape[1])]
        other = plgpu.load(place, layout=plgpu.Layout.WGMMA)
        mine, others = (lax.broadcast_in_dim(fade, own.shape, [0]) for fade in fades)
        return own * mine + other * others


def merge(partial: Partial, sinks: Float[Array, "X G"] | None) -> Float[Array, "R X G H"]:
    """The softmax over all parts; zeros where nothing was seen.

    Args:
        sinks: scores that count in the sum and have no value, in log2.
    """
    values, tops, totals = partial
    top = _over_parts(jnp.maximum, tops)
    if sinks is not None:
        top = jnp.maximum(top, sinks)
    weights = jnp.exp2(tops - top)
    total = _over_parts(jnp.add, totals * weights)
    if sinks is not None:
        total += jnp.exp2(sinks - top)
    values = _over_parts(jnp.add, values * weights[..., None])
    return values / jnp.where(total > 0, total, 1.0)[..., None]


def _over_parts(function: Any, parts: Float[Array, "S *B"]) -> Float[Array, "*B"]:
    """As a reduction, which XLA makes a kernel of its own of, or element by element.

    Args:
        function: a ufunc of two.
    """
    if parts.shape[0] > UNROLLED_PARTS:
        return function.reduce(parts, axis=0)
    return functools.reduce(function, (parts[i] for i in range(parts.shape[0])))
