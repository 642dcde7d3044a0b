"""Rows of different lengths packed into one token axis: what attention and cache writes share.

Positions and token counts are int32 throughout, so contexts up to 2**31 - 1 tokens are addressed.
Page 0 is the null page: never handed out, read by nobody (always masked), target of the writes of
padding tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

NULL_PAGE = 0


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class RaggedBatch:
    """Which tokens belong to which sequence, and where its KV pages are.

    Row r owns tokens query_starts[r] : query_starts[r + 1]; they are the last ones of its
    context. Rows may be empty; tokens from query_starts[-1] on are padding.

    Attributes:
        page_table: page of each run of page_size positions. Entries past the context, or wholly
            behind a sliding window, are not read and may be 0.
        query_starts: ascending, first entry 0, last entry the number of live tokens.
        context_lens: KV length of each row, this step's tokens included.
        max_query_len: static upper bound of a row's number of tokens; 1 in decode programs.
        aligned: static: there are as many tokens as rows, and token t is row t's, if it has one:
            so in decode programs, whose empty rows are the last.
    """

    page_table: Int[Array, "R M"]
    query_starts: Int[Array, "R+1"]
    context_lens: Int[Array, "R"]
    max_query_len: int = field(metadata={"static": True})
    aligned: bool = field(default=False, metadata={"static": True})

    @property
    def query_lens(self) -> Int[Array, "R"]:
        """Tokens of each row in this step."""
        return self.query_starts[1:] - self.query_starts[:-1]

    def token_rows(self, num_tokens: int) -> Int[Array, "T"]:
        """Row of each token; some row, for padding (see `live_tokens`)."""
        tokens = jnp.arange(num_tokens, dtype=jnp.int32)
        if self.aligned:
            return tokens
        # All with all, in one pass: a binary search is a loop, and on a GPU many small kernels.
        rows = jnp.searchsorted(
            self.query_starts[1:], tokens, side="right", method="compare_all"
        ).astype(jnp.int32)
        return jnp.minimum(rows, self.context_lens.shape[0] - 1)

    def live_tokens(self, num_tokens: int) -> Bool[Array, "T"]:
        """Which tokens are not padding."""
        return jnp.arange(num_tokens, dtype=jnp.int32) < self.query_starts[-1]

    def token_positions(self, num_tokens: int) -> Int[Array, "T"]:
        """Position of each token in its own sequence; 0 for padding."""
        rows = self.token_rows(num_tokens)
        tokens = jnp.arange(num_tokens, dtype=jnp.int32)
        positions = self.context_lens[rows] - (self.query_starts[rows + 1] - tokens)
        return jnp.where(self.live_tokens(num_tokens), positions, 0)

    def token_places(
        self, num_tokens: int, page_size: int
    ) -> tuple[Int[Array, "T"], Int[Array, "T"]]:
        """Page and offset in it of each token's KV; the null page for padding."""
        rows = self.token_rows(num_tokens)
        positions = self.token_positions(num_tokens)
        index = jnp.minimum(positions // page_size, self.page_table.shape[1] - 1)
        pages = self.page_table[rows, index]
        return jnp.where(self.live_tokens(num_tokens), pages, NULL_PAGE), positions % page_size
