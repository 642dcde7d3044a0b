"""Products with dense codes for NVIDIA Hopper, in Pallas (Mosaic GPU), for few tokens.

Math: int8, y[t, n] = scale[n] * sum over k of x[t, k] code[k, n]. int4, y = x w with
    w[k, n] = code[k, n] * scale[k / GROUP, n] + minimum[k / GROUP, n].

Shapes: x [T, K]; int8 codes [K, N] as they lie; of int4 codes the bytes [K, N / 2], column 2j in
    the low half of a byte and 2j + 1 in the high one, and as 32-bit words [K / GROUP, N / 2] the
    pairs of scales, and of minima, of two columns. All are views of the arrays, not copies.

Grid: (split of K, block of columns). One warpgroup copies, two compute, half of the columns each:

    codes ──TMA──▶ │ slot 0 │ slot 1 │ … │  a ring in shared memory, DEPTH of K a slot
    x     ──TMA──▶ │        │        │   │
                       │ registers: code → bfloat16, int4's scaled
                       ▼
                   a tile [DEPTH, columns] in shared memory, as wgmma takes it
                       │ wgmma: x [64, DEPTH] × tile, while the next tile is widened
                       ▼
                   sums in registers, float32, at the end to memory: one result a split

    K is split until the blocks of threads fill the 132 processors; XLA adds up the splits' sums.

Traffic: the codes, and what belongs to them, once; x once for each block of columns, from the L2
    cache; the splits' sums in float32 twice. See traffic.py.

Numerics: sums in float32. int8 codes are exact in bfloat16 and are scaled in float32 behind the
    sum; an int4 weight is computed in bfloat16 and so rounded at most twice, a thirtieth of what
    its code rounds away.

Limits: bfloat16, T up to MAX_TOKENS, K in whole DEPTHs, N in whole blocks of columns. Beyond, the
    matmul is bound by arithmetic, and XLA's is as good.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int, Int8, UInt4

from pallas_kernels.errors import UnsupportedKernel
from pallas_kernels.hopper import PROCESSORS, ahead, estimated, swizzled
from pallas_kernels.quant_matmul.api import GROUP

#: Rows of a wgmma, some of which may be padding.
MAX_TOKENS = 64
#: Of K, what a slot of the ring holds.
DEPTH = 64
COMPUTERS = 2
#: Bytes along N that one warpgroup computes at once: the more, the less often x is read.
_WIDE, _NARROW = 128, 64
#: Bytes of the ring: as much as a processor must ask for in advance, and more.
_RING_BYTES = 112 * 1024
#: Rows of a tile of shared memory.
_TILE = 8
#: What starting and ending a block of threads costs, in slots.
_START = 4


class _Codes(NamedTuple):
    """What the kernel multiplies by.

    Attributes:
        codes: bytes [K, B].
        groups: of int4, the words of scales and of minima [K / GROUP, B]; empty of int8.
    """

    codes: Array
    groups: tuple[Array, ...]

    @property
    def parts(self) -> int:
        """Codes in a byte."""
        return 2 if self.groups else 1


def int8_matmul(
    x: Float[Array, "T K"],
    codes: Int8[Array, "K *out"],
    scale: Float[Array, "*out"],
    interpret: Any = None,
) -> Float[Array, "T *out"]:
    """See `api.int8_matmul`.

    Args:
        interpret: `plgpu.InterpretGPUParams()` where there is no GPU.

    Raises:
        UnsupportedKernel: sizes or dtypes beyond the limits.
    """
    columns = math.prod(codes.shape[1:])
    y_TN = _multiply(x, _Codes(codes.reshape(-1, columns), ()), interpret)
    y_TN = y_TN * scale.reshape(columns)
    return y_TN.astype(x.dtype).reshape(-1, *codes.shape[1:])


def int4_matmul(
    x: Float[Array, "T K"],
    codes: UInt4[Array, "K *out"],
    scale: Float[Array, "G *out"],
    minimum: Float[Array, "G *out"],
    interpret: Any = None,
) -> Float[Array, "T *out"]:
    """See `api.int4_matmul`.

    Args:
        interpret: as for `int8_matmul`.

    Raises:
        UnsupportedKernel: sizes or dtypes beyond the limits.
    """
    if scale.dtype != jnp.bfloat16 or minimum.dtype != jnp.bfloat16:
        raise UnsupportedKernel(
            f"int4_matmul backend='gpu': scales are {scale.dtype} and minima {minimum.dtype}, the "
            "kernel takes bfloat16"
        )
    if math.prod(codes.shape[1:]) % 2:
        raise UnsupportedKernel(f"int4_matmul backend='gpu': codes {codes.shape} come in pairs")
    groups = tuple(_paired(values, jnp.int32) for values in (scale, minimum))
    y_TN = _multiply(x, _Codes(_paired(codes, jnp.int8), groups), interpret)
    return y_TN.astype(x.dtype).reshape(-1, *codes.shape[1:])


def _paired(values: Array, dtype: Any) -> Array:
    """[R, *out] as [R, N / 2], every two columns one element."""
    return lax.bitcast_convert_type(values.reshape(values.shape[0], -1, 2), dtype)


def unsupported(num_tokens: int, depth: int, num_bytes: int, dtype: Any) -> str | None:
    """Why it cannot multiply so; None where it can.

    Args:
        num_bytes: of codes along N.
    """
    if jnp.dtype(dtype) != jnp.bfloat16:
        return f"x is {jnp.dtype(dtype).name}, the kernel takes bfloat16"
    if not 0 < num_tokens <= MAX_TOKENS:
        return f"{num_tokens} tokens, the kernel takes 1 to {MAX_TOKENS}"
    if depth % DEPTH:
        return f"K is {depth}, no multiple of {DEPTH}"
    if num_bytes % (COMPUTERS * _NARROW):
        return f"a row of codes has {num_bytes} bytes, no multiple of {COMPUTERS * _NARROW}"
    return None


def bytes_wide(num_bytes: int, parts: int) -> int:
    """Bytes along N that one warpgroup computes at once.

    Args:
        num_bytes: of codes along N, in all.
        parts: codes in a byte.
    """
    return _NARROW if parts > 1 or num_bytes % (COMPUTERS * _WIDE) else _WIDE


def num_splits(depth: int, num_bytes: int, num_tokens: int, parts: int) -> int:
    """Splits of K that keep the processors busy and the splits' sums few.

    Args:
        num_bytes, parts: as of `bytes_wide`.
    """
    both = COMPUTERS * bytes_wide(num_bytes, parts)
    slots, blocks = depth // DEPTH, num_bytes // both

    def moved(splits: int) -> float:
        """Bytes that could be moved meanwhile, with those of the sums, written and read."""
        rounds = -(-blocks * splits // PROCESSORS)
        busy = rounds * (-(-slots // splits) + _START) * PROCESSORS * DEPTH * both
        return busy + splits * 2 * 4 * num_tokens * parts * num_bytes

    return min(range(1, slots + 1), key=moved)


def _multiply(x: Float[Array, "T K"], weight: _Codes, interpret: Any) -> Float[Array, "T N"]:
    """x times the codes, or the weights that int4 codes stand for, in float32."""
    num_tokens, (depth, num_bytes) = x.shape[0], weight.codes.shape
    reason = unsupported(num_tokens, depth, num_bytes, x.dtype)
    if reason is not None:
        raise UnsupportedKernel(f"quant_matmul backend='gpu': {reason}")
    parts, rows = weight.parts, -(-num_tokens // _TILE) * _TILE
    splits = num_splits(depth, num_bytes, rows, parts)
    x = jnp.pad(x, ((0, rows - num_tokens), (0, 0)))
    wide = bytes_wide(num_bytes, parts)
    both = COMPUTERS * wide
    slot_bytes = DEPTH * (both + 2 * MAX_TOKENS) + len(weight.groups) * DEPTH // GROUP * both * 4
    slots = _RING_BYTES // slot_bytes
    groups = [plgpu.SMEM((slots, DEPTH // GROUP, both), jnp.int32) for _ in weight.groups]
    cost = pl.CostEstimate(
        flops=2 * rows * depth * num_bytes * parts,
        transcendentals=0,
        bytes_accessed=depth * num_bytes + sum(4 * words.size for words in weight.groups),
    )
    sums = plgpu.kernel(
        functools.partial(_kernel, parts=parts, share=-(-(depth // DEPTH) // splits)),
        out_type=jax.ShapeDtypeStruct((splits, parts, rows, num_bytes), jnp.float32),
        scratch_types=(
            swizzled((slots, MAX_TOKENS, DEPTH), DEPTH, x.dtype),
            swizzled((slots, DEPTH, both), wide, jnp.int8),
            swizzled((COMPUTERS, parts, DEPTH, wide), wide, x.dtype),
            swizzled((COMPUTERS, MAX_TOKENS, wide), wide, jnp.float32),
            plgpu.Barrier(num_arrivals=2 + len(groups), num_barriers=slots),
            plgpu.Barrier(num_arrivals=COMPUTERS, num_barriers=slots),
            *groups,
        ),
        grid=(splits, num_bytes // both),
        grid_names=("split", "block"),
        num_threads=COMPUTERS + 1,
        thread_name="warpgroup",
        interpret=interpret,
        **estimated(cost),
    )(x, weight.codes, *weight.groups)
    y_PTB = sums.sum(0)
    return jnp.moveaxis(y_PTB, 0, 2).reshape(rows, parts * num_bytes)[:num_tokens]


def _kernel(x, codes, *refs, parts: int, share: int) -> None:
    num_groups = 2 if parts == 2 else 0
    groups, refs = refs[:num_groups], refs[num_groups:]
    out, x_ring, ring, staging, out_smem, ready, free, *group_rings = refs
    (slots, _, both), rows, wide = ring.shape, x.shape[0], ring.shape[2] // COMPUTERS
    split, column = lax.axis_index("split"), lax.axis_index("block") * both
    warpgroup = lax.axis_index("warpgroup")
    first = split * share
    count = jnp.clip(codes.shape[0] // DEPTH - first, 0, share)

    @pl.when(warpgroup == COMPUTERS)
    def _() -> None:
        columns = pl.ds(column, both)

        def load(i: Any, slot: Any) -> None:
            place, ready_now = first + i, ready.at[slot]
            depth = pl.ds(place * DEPTH, DEPTH)
            plgpu.copy_gmem_to_smem(codes.at[depth, columns], ring.at[slot], ready_now)
            plgpu.copy_gmem_to_smem(x.at[:, depth], x_ring.at[slot, pl.ds(0, rows)], ready_now)
            some = pl.ds(place * (DEPTH // GROUP), DEPTH // GROUP)
            for words, words_ring in zip(groups, group_rings, strict=True):
                plgpu.copy_gmem_to_smem(words.at[some, columns], words_ring.at[slot], ready_now)

        ahead(count, slots, free, load)

    own = pl.ds(warpgroup * wide, wide)

    def multiply(*sums: Any) -> None:
        def step(i: Any, _: None) -> None:
            slot = lax.rem(i, jnp.int32(slots))
            plgpu.barrier_wait(ready.at[slot])
            held = [words.at[slot] for words in group_rings]
            tiles = _widened(ring.at[slot, :, own], held, own)
            plgpu.wgmma_wait(0)
            plgpu.commit_smem()  # no warp reads the tile before any more, nor x beside it

            @pl.when(i > 0)
            def _() -> None:
                plgpu.barrier_arrive(free.at[lax.rem(i + slots - 1, jnp.int32(slots))])

            for part, tile in enumerate(tiles):
                staging[warpgroup, part] = tile
            plgpu.commit_smem()
            for part, total in enumerate(sums):
                plgpu.wgmma(total, x_ring.at[slot], staging.at[warpgroup, part])

        lax.fori_loop(0, count, step, None)
        plgpu.wgmma_wait(0)

        @pl.when(count > 0)
        def _() -> None:
            plgpu.barrier_arrive(free.at[lax.rem(count - 1, jnp.int32(slots))])

        for part, total in enumerate(sums):
            plgpu.wait_smem_to_gmem(0)
            out_smem[warpgroup] = total[...]
            plgpu.commit_smem()
            place = pl.ds(column + warpgroup * wide, wide)
            plgpu.copy_smem_to_gmem(
                out_smem.at[warpgroup, pl.ds(0, rows)], out.at[split, part, :, place]
            )
        plgpu.wait_smem_to_gmem(0)

    @pl.when(warpgroup < COMPUTERS)
    def _() -> None:
        accumulator = plgpu.ACC((MAX_TOKENS, wide), jnp.float32)  # pyright: ignore[reportPrivateImportUsage]
        pl.run_scoped(multiply, *[accumulator] * parts)


def _widened(codes: Any, groups: list[Any], own: Any) -> list[Float[Array, "64 W"]]:
    """Codes in bfloat16; int4's as the weights that they stand for, even columns and odd ones.

    Args:
        codes: shared memory [DEPTH, W].
        groups: shared memory [DEPTH / GROUP, 2 W], words of scales and of minima.
        own: this warpgroup's columns of them.
    """
    held = plgpu.load(codes, layout=plgpu.Layout.WGMMA_UPCAST_2X)
    if not groups:
        return [_as_operand(held)]
    row = plgpu.broadcasted_iota(jnp.int32, codes.shape, 0, layout=plgpu.Layout.WGMMA)
    words = [[_row(of, g, own) for g in range(DEPTH // GROUP)] for of in groups]
    tiles = []
    for part in range(2):
        scales, minima = ([_half(word, part) for word in of] for of in words)
        code = held & 15
        if part == 1:
            # Bytes know no shift: as a signed byte this is 16 (code - 8).
            code = (held & -16) ^ -128
            minima = [low + 8 * scale for low, scale in zip(minima, scales, strict=True)]
            scales = [scale / 16 for scale in scales]
        scale, minimum = _by_group(row, scales), _by_group(row, minima)
        tiles.append(_as_operand(code) * scale + minimum)
    return tiles


def _as_operand(codes: Int[Array, "64 W"]) -> Float[Array, "64 W"]:
    return plgpu.layout_cast(codes.astype(jnp.bfloat16), plgpu.Layout.WGMMA)


def _row(words: Any, group: int, own: Any) -> Int[Array, "W"]:
    layout = plgpu.Layout.WGMMA.reduce(0)
    return plgpu.load(words.at[group, own], layout=layout, optimized=False)


def _half(words: Int[Array, "W"], part: int) -> Float[Array, "W"]:
    """The bfloat16 in the low or the high half of each word, in float32."""
    bits = words << 16 if part == 0 else words & ~0xFFFF
    return lax.bitcast_convert_type(bits, jnp.float32)


def _by_group(row: Int[Array, "64 W"], values: list[Float[Array, "W"]]) -> Float[Array, "64 W"]:
    """Each row's group's, in bfloat16."""
    narrow = (value.astype(jnp.bfloat16) for value in values)
    first, second = (lax.broadcast_in_dim(value, row.shape, [1]) for value in narrow)
    return jnp.where(row < GROUP, first, second)
