"""What a model's forward pass is given beside the tokens: the paged cache, and where each token is.

Built once a step by `device`, read by every layer. Frozen registered dataclasses: passed in,
donated (the cache), returned.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
from jaxtyping import Array, Int

from jaxserve.models.deltas import StepDeltas
from pallas_kernels.quantized_pages import Pages
from pallas_kernels.ragged import RaggedBatch


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class GroupPages:
    """Keys and values of one cache group: all its layers, in the order of `CacheGroup.layers`.

    Attributes:
        kv: [L, P, K, Z, W]; a row holds a position's key in its first half and its value in the
            second.
    """

    kv: Pages


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class KVCache:
    """The pages of all cache groups, in the order of `cache_groups()`."""

    groups: tuple[GroupPages, ...]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class StepContext:
    """Where the step's tokens stand.

    Attributes:
        positions: of each token in its sequence; 0 for padding.
        batches: by cache group, the ragged batch with that group's page tables.
        token_pages: by cache group, the page that each token's key and value go to; the null
            page for padding.
        token_offsets: offset in the page, the same for all groups.
        num_live: tokens that are not padding; they come first.
        deltas: of the tokens' adapters; None in programs without.
    """

    positions: Int[Array, "T"]
    batches: tuple[RaggedBatch, ...]
    token_pages: tuple[Int[Array, "T"], ...]
    token_offsets: Int[Array, "T"]
    num_live: Int[Array, ""]
    deltas: StepDeltas | None = None

    @classmethod
    def build(
        cls, batches: tuple[RaggedBatch, ...], num_tokens: int, page_size: int
    ) -> StepContext:
        """Works out every token's place from its row's.

        Args:
            batches: by cache group; they differ only in their page tables. At least one.
        """
        first = batches[0]
        places = [batch.token_places(num_tokens, page_size) for batch in batches]
        return cls(
            positions=first.token_positions(num_tokens),
            batches=batches,
            token_pages=tuple(pages for pages, _ in places),
            token_offsets=places[0][1],
            num_live=first.query_starts[-1],
        )
