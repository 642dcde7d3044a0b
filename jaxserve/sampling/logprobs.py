"""Log-probabilities of the model's own distribution: before penalties, masks and temperature.

Of sampled tokens, behind a flag of the step, and of prompt tokens, in slices of positions so that
no [T, V] array ever exists.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxserve.sampling.spread import ONE_DEVICE, Spread
from jaxserve.types import MAX_LOGPROBS

#: Prompt positions whose logits exist at a time.
SLICE_TOKENS = 64


class Logprobs(NamedTuple):
    """Log-probabilities beside tokens, as `device.step.LogprobArrays`.

    Attributes:
        chosen: of the token that stands there.
        rank: number of tokens with a strictly larger logit; 0 is best, equals share a rank.
        top_ids, top_values: the most likely tokens, best first, the lowest id first among equals;
            padded with id 0 and -inf where the vocabulary is smaller.
    """

    chosen: Float[Array, "*B"]
    rank: Int[Array, "*B"]
    top_ids: Int[Array, "*B 20"]
    top_values: Float[Array, "*B 20"]


def logprobs(
    logits: Float[Array, "B V"], token_ids: Int[Array, "B"], spread: Spread = ONE_DEVICE
) -> Logprobs:
    """Log-probabilities of `token_ids` and of the most likely tokens.

    Args:
        spread: how the logits lie on the devices.
    """
    return spread.over_rows(_logprobs, (logits, token_ids))


def _logprobs(logits: Float[Array, "B V"], token_ids: Int[Array, "B"], _: tuple[()]) -> Logprobs:
    logits = logits.astype(jnp.float32)
    best = jnp.max(logits, axis=1, keepdims=True)
    normalizer = best + jnp.log(jnp.sum(jnp.exp(logits - best), axis=1, keepdims=True))
    own = jnp.take_along_axis(logits, token_ids[:, None], axis=1)
    top_logits, top_ids = jax.lax.top_k(logits, min(MAX_LOGPROBS, logits.shape[1]))
    missing = ((0, 0), (0, MAX_LOGPROBS - top_ids.shape[1]))
    return Logprobs(
        chosen=(own - normalizer)[:, 0],
        rank=jnp.sum(logits > own, axis=1, dtype=jnp.int32),
        top_ids=jnp.pad(top_ids.astype(jnp.int32), missing),
        top_values=jnp.pad(top_logits - normalizer, missing, constant_values=-jnp.inf),
    )


def logprobs_if(
    wanted: Array,
    logits: Float[Array, "B V"],
    token_ids: Int[Array, "B"],
    spread: Spread = ONE_DEVICE,
) -> Logprobs:
    """`logprobs` where the scalar `wanted` is true; zeros, at no cost, where it is not.

    Args:
        wanted: the same in all copies of the model.
    """
    return jax.lax.cond(
        wanted,
        lambda: logprobs(logits, token_ids, spread),
        lambda: no_logprobs(token_ids.shape[0]),
    )


def no_logprobs(num_rows: int) -> Logprobs:
    """In place of those that nobody wants."""
    return Logprobs(
        chosen=jnp.zeros(num_rows, jnp.float32),
        rank=jnp.zeros(num_rows, jnp.int32),
        top_ids=jnp.zeros((num_rows, MAX_LOGPROBS), jnp.int32),
        top_values=jnp.zeros((num_rows, MAX_LOGPROBS), jnp.float32),
    )


def prompt_logprobs(
    logits_fn: Callable[..., Float[Array, "C V"]],
    hidden: Float[Array, "T D"],
    next_token_ids: Int[Array, "T"],
    spread: Spread = ONE_DEVICE,
    beside: tuple[Int[Array, "T"], ...] = (),
) -> Logprobs:
    """Log-probabilities of the tokens that follow each position.

    Args:
        logits_fn: the model's head, on at most SLICE_TOKENS positions, and what is `beside` them.
        next_token_ids: the token after each position; any valid id where there is none.
    """
    num_tokens = hidden.shape[0]
    size = min(SLICE_TOKENS, num_tokens)
    padding = -num_tokens % size
    hidden = jnp.pad(hidden, ((0, padding), (0, 0))).reshape(-1, size, hidden.shape[1])
    targets = jnp.pad(next_token_ids, (0, padding)).reshape(-1, size)
    others = [jnp.pad(x, (0, padding), constant_values=-1).reshape(-1, size) for x in beside]
    slices = jax.lax.map(
        lambda part: logprobs(logits_fn(part[0], *part[2:]), part[1], spread),
        (hidden, targets, *others),
    )
    return Logprobs(*(part.reshape(-1, *part.shape[2:])[:num_tokens] for part in slices))
