"""The softmax of a tile of queries on one Hopper warpgroup, while the tensor cores multiply.

A block's scores are multiplied together with the weights and values of the block before:

    tensor cores   | q·k 0 |            | q·k 1, p·v 0 |            | q·k 2, p·v 1 | …
    registers              | softmax 0  |        | softmax 1        |        | softmax 2 …

`Softmax.first` is the first block, `step` each one more, and `end` the last product. The other
warpgroup does the same at its own pace: with turns, as FlashAttention-3 (arXiv 2407.08608) has
them, it was slower.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from pallas_kernels.hopper import ROWS, accumulator, swizzled
from pallas_kernels.paged_attention import gpu_block as block
from pallas_kernels.paged_attention.score import LOWEST, Score

#: Below every score and above LOWEST in any unit: the maximum of nothing.
_NOTHING = LOWEST / 2.0**32


class Ring(NamedTuple):
    """Blocks of keys, or of values, in shared memory.

    Attributes:
        tiles: [slots, block, H].
        ready, free: barriers, a slot each.
        kind: what codes are; "" of numbers.
        staging: [warpgroups, block, H], where each widens codes.
        warpgroup: which one.
    """

    tiles: Any
    ready: Any
    free: Any
    kind: str
    staging: Any
    warpgroup: Any

    def slot(self, i: Any) -> Any:
        """Of the i-th block."""
        return lax.rem(i, jnp.int32(self.tiles.shape[0]))

    def wait(self, i: Any) -> None:
        """Until the i-th block is there."""
        block.await_pages(self.ready, self.slot(i))

    def release(self, i: Any) -> None:
        """The i-th block is not read any more."""
        plgpu.barrier_arrive(self.free.at[self.slot(i)])

    def operand(self, i: Any) -> Any:
        """The i-th block as wgmma takes it."""
        tile = self.tiles.at[self.slot(i)]
        if not self.kind:
            return tile
        return block.widen(tile, self.staging.at[self.warpgroup], self.kind)


class Mask(NamedTuple):
    """What the queries of a warpgroup see.

    Attributes:
        position: of the first query.
        end: behind the last position that one sees.
        tile_begin, tile_end: positions outside which values may be NaN.
        window: of each query; None for all.
    """

    position: Any
    end: Any
    tile_begin: Any
    tile_end: Any
    window: int | None

    def visible(self, place: Any, shape: tuple[int, ...]) -> Bool[Array, "64 B"]:
        """Which scores of a block at a place count."""
        rows = plgpu.broadcasted_iota(jnp.int32, shape[:1], 0, layout=plgpu.Layout.WGMMA.reduce(1))
        newest = self.position - place + rows
        key = block.iota(shape, 1)
        last = jnp.minimum(newest, self.end - 1 - place)
        seen = key <= lax.broadcast_in_dim(last, shape, [0])
        if self.window is None:
            return seen
        return seen & (key > lax.broadcast_in_dim(newest - self.window, shape, [0]))

    def inside(self, place: Any) -> Bool[Array, "X Y"]:
        """Whether positions hold numbers."""
        return (place >= self.tile_begin) & (place < self.tile_end)


class Weighted(NamedTuple):
    """Weighted values so far, `block.columns` of them each, in wgmma's accumulators.

    The interpreter neither stores to an accumulator nor multiplies registers: there the parts and
    the weights are in shared memory.
    """

    parts: tuple[Any, ...]
    weights: Any

    def add(self, p: Float[Array, "64 B"], values: Any) -> None:
        """Starts multiplying."""
        if self.weights is not None:
            self.weights[...] = p
            plgpu.commit_smem()
        first = 0
        for part in self.parts:
            v = values.at[:, pl.ds(first, part.shape[1])]
            first += part.shape[1]
            if self.weights is None:
                plgpu.wgmma(part, p, v)
                continue

            def multiply(out: Any, v: Any = v) -> Array:
                plgpu.wgmma(out, self.weights, v)
                return out[...]

            part[...] = part[...] + pl.run_scoped(multiply, accumulator(*part.shape))

    def read(self) -> list[Float[Array, "64 C"]]:
        """Once all products are done."""
        return [lax.optimization_barrier(part[...]) for part in self.parts]

    def fade(self, fade: Float[Array, "64"]) -> None:
        """Multiplies them, once all products are done."""
        for part, values in zip(self.parts, self.read(), strict=True):
            part[...] = values * lax.broadcast_in_dim(fade, values.shape, [0])


class Running(NamedTuple):
    """The softmax so far, of ROWS queries.

    Attributes:
        top, total: running maximum, in log2, and sum.
        p: weights of the block before, whose values are still to be multiplied.
    """

    top: Float[Array, "64"]
    total: Float[Array, "64"]
    p: Float[Array, "64 B"]


class Softmax(NamedTuple):
    """The products and the softmax of one warpgroup, block by block from the last to the first.

    Attributes:
        queries: [64, H] in shared memory.
        scales: of codes, in the slots of keys; None of numbers.
        last: block of positions that i = 0 is.
    """

    queries: Any
    keys: Ring
    values: Ring
    scales: block.Scales | None
    weighted: Weighted
    score: Score
    last: Any

    def skip(self, i: Any, _: None) -> None:
        """A block that only the other warpgroup's tokens see."""
        for ring in (self.keys, self.values):
            ring.wait(i)
            ring.release(i)

    def first(self, i: Any, mask: Mask, sink: Any) -> Running:
        """The first block that is not skipped.

        Args:
            sink: a score, in log2, that counts in the sum and has no value; None for none.
        """

        def multiply(out: Any) -> Array:
            plgpu.wgmma(out, self.queries, self.keys.operand(i).transpose((1, 0)))
            return out[...]

        self.keys.wait(i)
        s = pl.run_scoped(multiply, accumulator(ROWS, self._span))
        top, total = row(_NOTHING if sink is None else sink), row(0.0 if sink is None else 1.0)
        return self._weights(i, s, top, total, mask, is_first=True)

    def step(self, i: Any, running: Running, mask: Mask | None = None) -> Running:
        """One block more.

        Args:
            mask: None where all queries see all of it.
        """

        def multiply(out: Any) -> Array:
            plgpu.wgmma(out, self.queries, self.keys.operand(i).transpose((1, 0)))
            self.weighted.add(running.p, self.values.operand(i - 1))
            return plgpu.wgmma_accumulator_load(out, wait_n=len(self.weighted.parts))

        self.keys.wait(i)
        s = pl.run_scoped(multiply, accumulator(ROWS, self._span))
        return self._weights(i, s, running.top, running.total, mask)

    def end(self, i: Any, running: Running) -> tuple[Array, list[Array]]:
        """The sum and the weighted values, once the i-th block's are multiplied."""
        self.weighted.add(running.p, self.values.operand(i))
        parts = self.weighted.read()
        self.values.release(i)
        return running.total, parts

    @property
    def _span(self) -> int:
        return self.keys.tiles.shape[1]

    def _weights(
        self, i: Any, s: Array, top: Array, total: Array, mask: Mask | None, is_first: bool = False
    ) -> Running:
        """Weights of a block's scores; then the product that is under way is awaited."""
        place = (self.last - i) * self._span
        s = lax.optimization_barrier(s)
        slot = self.keys.slot(i)
        scales = [self.scales.row(slot, which) for which in range(2)] if self.scales else []
        self.keys.release(i)
        if scales:
            s = s * scales[0]
        factor = self.score.scale * block.LOG2_E
        if self.score.soft_cap is not None:
            s = jnp.tanh(s * (self.score.scale / self.score.soft_cap))
            factor = self.score.soft_cap * block.LOG2_E
        if mask is not None:
            s = jnp.where(mask.visible(place, s.shape), s, LOWEST)
        new = jnp.maximum(top, s.max(axis=1) * factor)
        fade = jnp.exp2(top - new)
        p = jnp.exp2(s * factor - lax.broadcast_in_dim(new, s.shape, [0]))
        total = total * fade + p.sum(axis=1)
        if scales:
            v_scales = scales[1]
            if mask is not None:
                is_inside = mask.inside(place + block.iota(s.shape, 1))
                v_scales = jnp.where(is_inside, v_scales, 0.0)
            p = p * v_scales
        # Awaiting the values here ends a basic block: the compiler would put off the softmax until
        # after the product, which reads the weights before these.
        p, total, fade = lax.optimization_barrier((p, total, fade))
        self.values.wait(i)
        if not is_first:
            self.weighted.fade(fade)
            self.values.release(i - 1)
        weights = p.astype(self.queries.dtype)
        if mask is not None and not scales:
            v = self.values.operand(i)
            is_edge = (place < mask.tile_begin) | (place + self._span > mask.tile_end)
            pl.when(is_edge)(
                lambda: block.blank(v, v.shape[1], lambda offset: mask.inside(place + offset))
            )
        return Running(new, total, weights)


def row(value: Any) -> Float[Array, "64"]:
    """A number of each query."""
    return plgpu.layout_cast(jnp.full((ROWS,), value, jnp.float32), plgpu.Layout.WGMMA.reduce(1))


def zeros(size: int) -> Float[Array, "64 C"]:
    """Weighted values of nothing."""
    return plgpu.layout_cast(jnp.zeros((ROWS, size), jnp.float32), plgpu.Layout.WGMMA)


def with_accumulators(
    attend: Callable[..., Any], head_dim: int, is_interpreted: bool, refs: Any, warpgroup: Any
) -> Any:
    """Calls it with the accumulators of `Weighted`, zero.

    Args:
        refs: memory of `interpreted_scratch`.
    """
    if not is_interpreted:
        return pl.run_scoped(
            attend, *(accumulator(ROWS, size) for _, size in block.columns(head_dim))
        )
    parts = [refs[0].at[warpgroup, :, pl.ds(c, size)] for c, size in block.columns(head_dim)]
    for part in parts:
        part[...] = zeros(part.shape[1])
    return attend(*parts)


def scratch(
    kind: str, slots: int, span: int, head_dim: int, computers: int, page_size: int
) -> list[Any]:
    """Shared memory for widened keys, widened values and scales; nothing for numbers."""
    if not kind:
        return []
    wide = swizzled((computers, span, head_dim), head_dim, jnp.bfloat16)
    return [wide, wide, *block.scales_scratch(slots, span, computers, page_size)]


def interpreted_scratch(
    interpret: Any, span: int, head_dim: int, dtype: DTypeLike, computers: int
) -> list[Any]:
    """Shared memory for what the interpreter does not keep in registers; nothing on a GPU."""
    if interpret is None:
        return []
    return [
        plgpu.SMEM((computers, ROWS, head_dim), jnp.float32),
        swizzled((computers, ROWS, span), span, dtype),
    ]
