"""Which drafts of a verification step hold: those that equal what was sampled in their places.

A row brings its last known token and drafts of what follows; the sample after each of them is drawn
with the same random bits as if the tokens had come one by one. A draft that equals the sample
before it makes the next sample right too, so the row's new tokens are the samples up to and with
the first that no draft foretold. They are always the target's own samples: drafts change how many
come at once, never which.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxserve.device.step import NOT_ACCEPTED


class Accepted(NamedTuple):
    """The outcome of a verification step.

    Attributes:
        token_ids: by row, the samples that stand, in order; NOT_ACCEPTED behind them.
        places: the token of the step after which each of them was sampled.
        last: by row, the last one that stands.
    """

    token_ids: Int[Array, "steps R"]
    places: Int[Array, "steps R"]
    last: Int[Array, "R"]


def accept(
    sampled: Int[Array, "T"],
    token_ids: Int[Array, "T"],
    query_starts: Int[Array, "R+1"],
    draft_tokens: int,
) -> Accepted:
    """Compares drafts with samples.

    Args:
        sampled: the token sampled after each token of the step.
        token_ids: the step's tokens: of each row the last known one, then its drafts, if any.
        draft_tokens: static, the most that a row may bring.
    """
    starts, num_drafts = query_starts[:-1], query_starts[1:] - query_starts[:-1] - 1
    step = jnp.arange(1 + draft_tokens, dtype=jnp.int32)[:, None]
    places = jnp.minimum(starts + step, sampled.shape[0] - 1)
    samples = sampled[places]
    drafts = token_ids[jnp.minimum(places + 1, sampled.shape[0] - 1)]
    holds = (samples == drafts) & (step < num_drafts)
    held = jnp.cumprod(holds[:-1].astype(jnp.int32), axis=0)
    stands = jnp.concatenate([jnp.ones_like(step, shape=(1, starts.shape[0])), held])
    last = jnp.take_along_axis(samples, jnp.sum(stands, axis=0)[None] - 1, axis=0)[0]
    return Accepted(jnp.where(stands == 1, samples, NOT_ACCEPTED), places, last)
