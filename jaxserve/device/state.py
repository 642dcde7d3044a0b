"""What lives on the device between steps, as one frozen registered pytree.

Passed to every program, donated, returned: there is exactly one, and the executor holds it.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
from jaxtyping import Array, Int

from jaxserve.models.context import KVCache
from jaxserve.sampling.state import SamplingState


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class DeviceState:
    """State of S = max_rows slots and the scratch slot S, where padding rows point.

    Attributes:
        cache: the pages.
        sampling: settings and history by slot.
        page_tables: by cache group, the page of each run of page_size positions of a slot; 0, the
            null page, where there is none. Entries of a slot's earlier owner may be left over:
            they lie past the new owner's context and are not read.
        last_tokens: the token sampled last in each slot: the next decode step's input.
    """

    cache: KVCache
    sampling: SamplingState
    page_tables: tuple[Int[Array, "S+1 M"], ...]
    last_tokens: Int[Array, "S+1"]
