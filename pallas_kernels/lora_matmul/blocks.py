"""Tokens grouped by adapter, in blocks of one adapter each: what every backend works through.

    slot of token   2 . 0 2 2 . 0 2 2            (. is no adapter)
    blocks          [0: 2 6] [2: 0 3] [2: 4 7] [2: 8 +]      2 tokens each; + is padding

Worked out once a step, on the device, for each class of slots; the layers share it. There are as
many blocks as the shapes allow at worst, of which `num_blocks` hold tokens: the others cost
nothing, so the work grows with the tokens that use adapters and not with the slots there are.

A GPU, whose products have TILE rows whatever is in them, leaves the tokens where they are, and asks
which slots each TILE of them holds (`TokenTiles`).
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

#: A block's least and most tokens.
_LEAST, _MOST = 4, 64
#: Tokens of a tile: rows of one product on a GPU.
TILE = 64


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class TokenTiles:
    """The same tokens in their own order, I tiles of TILE.

    Attributes:
        slots: of each token; S for none, and for what fills up the last tile.
        present: in each tile, ascending, then others; X = min(S, TILE).
        num_present: of each tile.
    """

    slots: Int[Array, "I*64"]
    present: Int[Array, "I X"]
    num_present: Int[Array, "I"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class TokenBlocks:
    """The blocks of one class of slots.

    Attributes:
        tokens: of each block; T where it holds fewer.
        slots: of each block, counted within the class; of those without tokens, the last one's.
        num_blocks: that hold tokens; they come first.
        places: of each token, where it stands in `tokens`, flattened; U·B where nowhere.
        tiles: of the same tokens.
    """

    tokens: Int[Array, "U B"]
    slots: Int[Array, "U"]
    num_blocks: Int[Array, ""]
    places: Int[Array, "T"]
    tiles: TokenTiles


def block_tokens(slot_T: Int[Array, "T"], num_slots: int) -> TokenBlocks:
    """Groups tokens by slot.

    Args:
        slot_T: of each token; anything outside of 0 … num_slots - 1 for none.
    """
    num_tokens = slot_T.shape[0]
    size = block_size(num_tokens, num_slots)
    slot_T = jnp.where((slot_T >= 0) & (slot_T < num_slots), slot_T, num_slots).astype(jnp.int32)
    order_T = jnp.argsort(slot_T, stable=True).astype(jnp.int32)
    counts_S = jnp.sum(slot_T[:, None] == jnp.arange(num_slots), axis=0, dtype=jnp.int32)
    starts_S = jnp.cumsum(counts_S) - counts_S
    blocks_S = -(-counts_S // size)
    ends_S = jnp.cumsum(blocks_S)
    first_S = ends_S - blocks_S
    num_blocks = ends_S[-1]
    u = jnp.arange(most_blocks(num_tokens, num_slots), dtype=jnp.int32)
    live_u = jnp.minimum(u, jnp.maximum(num_blocks - 1, 0))
    slot_U = jnp.sum(ends_S[None, :] <= live_u[:, None], axis=1, dtype=jnp.int32)
    slot_U = jnp.minimum(slot_U, num_slots - 1)
    within_UB = ((u - first_S[slot_U]) * size)[:, None] + jnp.arange(size, dtype=jnp.int32)
    held_UB = (within_UB < counts_S[slot_U][:, None]) & (u < num_blocks)[:, None]
    sorted_UB = jnp.minimum(starts_S[slot_U][:, None] + within_UB, num_tokens - 1)
    tokens_UB = jnp.where(held_UB, order_T[sorted_UB], num_tokens)
    # Where each token stands: in its slot's blocks, at its place among the slot's tokens.
    rank_T = jnp.argsort(order_T, stable=True).astype(jnp.int32)
    own_T = jnp.minimum(slot_T, num_slots - 1)
    among_T = rank_T - starts_S[own_T]
    places_T = first_S[own_T] * size + among_T
    nowhere = tokens_UB.size
    return TokenBlocks(
        tokens=tokens_UB,
        slots=slot_U,
        num_blocks=num_blocks,
        places=jnp.where(slot_T < num_slots, places_T, nowhere),
        tiles=_tiles(slot_T, num_slots),
    )


def _tiles(slot_T: Int[Array, "T"], num_slots: int) -> TokenTiles:
    """Of tokens without an adapter, `num_slots` is the slot."""
    slot_T = jnp.pad(slot_T, (0, -slot_T.shape[0] % TILE), constant_values=num_slots)
    slot_IT = slot_T.reshape(-1, TILE)
    has_IS = jnp.any(slot_IT[:, :, None] == jnp.arange(num_slots), axis=1)
    present_IS = jnp.argsort(~has_IS, axis=1, stable=True).astype(jnp.int32)
    return TokenTiles(
        slots=slot_T,
        present=present_IS[:, :TILE],
        num_present=jnp.sum(has_IS, axis=1, dtype=jnp.int32),
    )


def block_size(num_tokens: int, num_slots: int) -> int:
    """B: tokens of a block, by the tokens of a step; small where they may go to very many slots."""
    size, share = _LEAST, max(8, num_slots)
    while size < _MOST and share * size < num_tokens:
        size *= 2
    return size


def most_blocks(num_tokens: int, num_slots: int) -> int:
    """U: no grouping of the tokens has more blocks."""
    return min(num_tokens, num_slots + num_tokens // block_size(num_tokens, num_slots))
