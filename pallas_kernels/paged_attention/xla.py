"""Paged attention in plain JAX: right on every platform, its cost follows the live pages.

Math: online softmax. For each tile of KV positions, with running maximum m, sum l and
    accumulator a: m' = max(m, max s), a = a e^(m-m') + e^(s-m') v, l = l e^(m-m') + Σ e^(s-m').
    With sinks m and l begin at the head's sink and 1.

Shapes: q [T, N, H], pages [L, P, K, Z, W]; tiles of C pages, C Z ≈ KV_TILE positions.

Grid: rows with one token (decode) run together, a dynamic-trip-count loop over tiles; each row
    starts at its own first visible tile. Rows with more run as query blocks of QUERY_BLOCK tokens,
    found on the device by cumsum and searchsorted, in a loop over the live blocks:

        tokens  |a|b|c c c c c c c|d d d|pad      a, b: decode, one vectorised loop
        blocks        [0      |1  ][2   ]         each: loop over tiles up to its last position

Traffic: decode reads R × max live tiles; a block reads its own visible tiles. See `traffic.py`.

Numerics: scores and accumulators float32 whatever the pages' dtype; codes are scaled as they are
    gathered. Positions that nobody sees are
    replaced, not multiplied, by zero, so that unused pages may hold anything, NaN included.

Limits: rows of one call share the trip count of the longest one in decode.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.paged_attention.score import LOWEST, Score
from pallas_kernels.quantized_pages import Pages, QuantizedPages, halves, values
from pallas_kernels.ragged import RaggedBatch

KV_TILE = 128
QUERY_BLOCK = 64


class _Pages(NamedTuple):
    """The cache of all layers, and which layer is read."""

    kv: Pages
    layer: int | Int[Array, ""]
    head_dim: int

    @property
    def page_size(self) -> int:
        return self.kv.shape[3]

    @property
    def num_kv_heads(self) -> int:
        return self.kv.shape[2]

    def tile(self, max_pages: int) -> int:
        """Pages a tile."""
        return max(1, min(max_pages, KV_TILE // self.page_size))

    def gather(self, pages: Int[Array, "*B C"]) -> tuple[Array, Array]:
        """Keys and values of these pages, [*B, K, C Z, H], in float32."""
        *lead, count = pages.shape
        heads = jnp.arange(self.num_kv_heads, dtype=jnp.int32)[:, None]
        place = self.layer, pages[..., None, :], heads
        positions = (*lead, self.num_kv_heads, count * self.page_size)
        if not isinstance(self.kv, QuantizedPages):
            kv = self.kv.at[place].get(mode="clip").reshape(*positions, -1).astype(jnp.float32)
            return self._halves(kv)
        codes = self.kv.codes.at[place].get(mode="clip").reshape(*positions, -1)
        k, v = self._halves(values(codes, self.kv.kind))
        scales = halves(self.kv.scales.at[place].get(mode="clip"), self.page_size)
        k_scale, v_scale = (scale.reshape(*positions, 1) for scale in scales)
        return k * k_scale, v * v_scale

    def _halves(self, kv: Float[Array, "*B W"]) -> tuple[Array, Array]:
        half = kv.shape[-1] // 2
        return kv[..., : self.head_dim], kv[..., half : half + self.head_dim]


def unsupported(*, head_dim: int, dtype: DTypeLike) -> str | None:
    """Runs everywhere."""
    return None


def paged_attention(
    q: Float[Array, "T N H"],
    pages: Pages,
    layer: int | Int[Array, ""],
    batch: RaggedBatch,
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: Float[Array, "N"] | None = None,
) -> Float[Array, "T N H"]:
    """See `api.paged_attention`."""
    num_tokens = q.shape[0]
    cache = _Pages(pages, layer, q.shape[-1])
    score = Score(scale, window, soft_cap)
    if sinks is not None:
        sinks = sinks.astype(jnp.float32).reshape(cache.num_kv_heads, -1)
    with jax.named_scope("paged_attention"):
        single = batch.query_lens == 1
        rows = batch.token_rows(num_tokens)
        first_tokens = jnp.minimum(batch.query_starts[:-1], num_tokens - 1)
        decoded = _decode(q[first_tokens], cache, batch, single, score, sinks)[rows]
        live = batch.live_tokens(num_tokens)[:, None, None]
        if batch.max_query_len == 1:
            return jnp.where(live, decoded, 0).astype(q.dtype)
        chunked = _chunks(q, cache, batch, score, sinks)
        out = jnp.where(single[rows][:, None, None], decoded, chunked)
        return jnp.where(live, out, 0).astype(q.dtype)


def _decode(
    q_RNH: Array,
    pages: _Pages,
    batch: RaggedBatch,
    single: Bool[Array, "R"],
    score: Score,
    sinks: Float[Array, "K G"] | None,
) -> Float[Array, "R N H"]:
    """One query a row; rows that are not `single` give zeros."""
    num_rows, _, head_dim = q_RNH.shape
    num_kv_heads = pages.num_kv_heads
    max_pages = batch.page_table.shape[1]
    tile_pages = pages.tile(max_pages)
    tile = tile_pages * pages.page_size
    ends = jnp.where(single, batch.context_lens, 0)
    starts = jnp.zeros_like(ends)
    if score.window is not None:
        starts = jnp.maximum(ends - score.window, 0)
    first_tile = starts // tile
    q_RKGH = q_RNH.astype(jnp.float32).reshape(num_rows, num_kv_heads, -1, head_dim)

    def step(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        index = (first_tile + i)[:, None] * tile_pages + jnp.arange(tile_pages, dtype=jnp.int32)
        page_ids = jnp.take_along_axis(
            batch.page_table, jnp.minimum(index, max_pages - 1), axis=1, mode="clip"
        )
        position = (first_tile + i)[:, None] * tile + jnp.arange(tile, dtype=jnp.int32)
        visible = (position >= starts[:, None]) & (position < ends[:, None])
        k, v = pages.gather(page_ids)
        s = _capped(jnp.einsum("rkgh,rksh->rkgs", q_RKGH, k), score)
        v = jnp.where(visible[:, None, :, None], v, 0.0)
        return _accumulate(carry, s, visible[:, None, None, :], v)

    num_tiles = jnp.max((ends + tile - 1) // tile - first_tile)
    carry = _first(q_RKGH.shape, sinks)
    return _normalised(jax.lax.fori_loop(0, num_tiles, step, carry)).reshape(q_RNH.shape)


def _chunks(
    q: Float[Array, "T N H"],
    pages: _Pages,
    batch: RaggedBatch,
    score: Score,
    sinks: Float[Array, "K G"] | None,
) -> Float[Array, "T N H"]:
    """Rows of more than one query, a block of queries at a time; other tokens are undefined."""
    num_tokens, num_heads, head_dim = q.shape
    size = min(QUERY_BLOCK, batch.max_query_len)
    lens = jnp.where(batch.query_lens > 1, batch.query_lens, 0)
    num_blocks = (lens + size - 1) // size
    block_ends = jnp.cumsum(num_blocks)
    q_padded = jnp.pad(q.astype(jnp.float32), ((0, size), (0, 0), (0, 0)))

    def block(i: Array, out: Array) -> Array:
        row = jnp.searchsorted(block_ends, i, side="right").astype(jnp.int32)
        offset = (i - (block_ends[row] - num_blocks[row])) * size
        token = batch.query_starts[row] + offset
        q_QNH = jax.lax.dynamic_slice_in_dim(q_padded, token, size)
        position = batch.context_lens[row] - lens[row] + offset
        end = jnp.minimum(position + size, batch.context_lens[row])
        o_QNH = _attend_block(q_QNH, pages, batch.page_table[row], position, end, score, sinks)
        # A block's tail may lie over the next row's tokens: blocks go upwards, and overwrite it.
        return jax.lax.dynamic_update_slice_in_dim(out, o_QNH, token, axis=0)

    out = jnp.zeros((num_tokens + size, num_heads, head_dim), jnp.float32)
    return jax.lax.fori_loop(0, block_ends[-1], block, out)[:num_tokens]


def _attend_block(
    q_QNH: Array,
    pages: _Pages,
    page_table_M: Int[Array, "M"],
    position: Int[Array, ""],
    end: Int[Array, ""],
    score: Score,
    sinks: Float[Array, "K G"] | None,
) -> Float[Array, "Q N H"]:
    """Queries at position, position + 1, … of one row, whose visible positions are below `end`."""
    size, num_heads, head_dim = q_QNH.shape
    num_kv_heads = pages.num_kv_heads
    groups = num_heads // num_kv_heads
    tile_pages = pages.tile(page_table_M.shape[0])
    tile = tile_pages * pages.page_size
    start = jnp.int32(0)
    if score.window is not None:
        start = jnp.maximum(position - score.window + 1, 0)
    q_KXH = q_QNH.reshape(size, num_kv_heads, groups, head_dim).transpose(1, 2, 0, 3)
    q_KXH = q_KXH.reshape(num_kv_heads, groups * size, head_dim)
    q_pos = jnp.tile(position + jnp.arange(size, dtype=jnp.int32), groups)[:, None]

    def step(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        index = i * tile_pages + jnp.arange(tile_pages, dtype=jnp.int32)
        k, v = pages.gather(page_table_M[jnp.minimum(index, page_table_M.shape[0] - 1)])
        kv_pos = i * tile + jnp.arange(tile, dtype=jnp.int32)
        visible = kv_pos <= q_pos
        if score.window is not None:
            visible &= kv_pos > q_pos - score.window
        s = _capped(jnp.einsum("kxh,ksh->kxs", q_KXH, k), score)
        v = jnp.where(((kv_pos >= start) & (kv_pos < end))[:, None], v, 0.0)
        # Queries past the row's end would see positions past it.
        return _accumulate(carry, s, (visible & (kv_pos < end))[None], v)

    first = _first(q_KXH.shape, None if sinks is None else jnp.repeat(sinks, size, axis=1))
    carry = jax.lax.fori_loop(start // tile, (end + tile - 1) // tile, step, first)
    o = _normalised(carry).reshape(num_kv_heads, groups, size, head_dim)
    return o.transpose(2, 0, 1, 3).reshape(q_QNH.shape)


def _capped(s: Array, score: Score) -> Array:
    s = s * score.scale
    return s if score.soft_cap is None else score.soft_cap * jnp.tanh(s / score.soft_cap)


def _first(shape: tuple[int, ...], sinks: Float[Array, "K X"] | None) -> tuple[Array, Array, Array]:
    """Running maximum and sum [..., X, 1] and accumulator [..., X, H], before the first tile."""
    m = jnp.full((*shape[:-1], 1), LOWEST, jnp.float32)
    if sinks is None:
        return m, jnp.zeros_like(m), jnp.zeros(shape, jnp.float32)
    return jnp.broadcast_to(sinks[..., None], m.shape), jnp.ones_like(m), jnp.zeros(shape, m.dtype)


def _accumulate(
    carry: tuple[Array, Array, Array], s: Array, visible: Array, v: Array
) -> tuple[Array, Array, Array]:
    """One tile more: scores [..., X, S], values [..., S, H]."""
    m, total, acc = carry
    s = jnp.where(visible, s, LOWEST)
    m_new = jnp.maximum(m, jnp.max(s, axis=-1, keepdims=True))
    p = jnp.where(visible, jnp.exp(s - m_new), 0.0)
    fade = jnp.exp(m - m_new)
    total = total * fade + jnp.sum(p, axis=-1, keepdims=True)
    return m_new, total, acc * fade + jnp.einsum("...xs,...sh->...xh", p, v)


def _normalised(carry: tuple[Array, Array, Array]) -> Array:
    _, total, acc = carry
    return acc / jnp.where(total > 0.0, total, 1.0)
