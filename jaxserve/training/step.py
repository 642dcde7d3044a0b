"""One update: gradients of some batches, AdamW, the next adapter; one compiled program.

The adapter and the optimizer's state are passed in, donated, returned. The model is only read.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float32, Int, Int32

from jaxserve.models.decoder import Decoder
from jaxserve.training.adapter import Deltas, init
from jaxserve.training.model import Dose, loss_sum
from jaxserve.training.packing import Rows
from jaxserve.training.recipe import Recipe


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class TrainState:
    """All that an update changes.

    Attributes:
        step: updates made.
        deltas: the adapter.
        optimizer: AdamW's moments.
    """

    step: Int32[Array, ""]
    deltas: Deltas
    optimizer: optax.OptState


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class StepReport:
    """What an update saw.

    Attributes:
        loss: mean over its learned tokens, in nats.
        gradient_norm: before it was cut.
        num_learned: of those tokens.
    """

    loss: Float32[Array, ""]
    gradient_norm: Float32[Array, ""]
    num_learned: Int[Array, ""]


def learning_rate(recipe: Recipe) -> optax.Schedule:
    """The rate by step: up in a line, then down to a tenth along a cosine."""
    return optax.warmup_cosine_decay_schedule(
        init_value=recipe.learning_rate / (recipe.warmup_steps + 1),
        peak_value=recipe.learning_rate,
        warmup_steps=recipe.warmup_steps,
        decay_steps=recipe.steps,
        end_value=recipe.learning_rate / 10,
    )


def optimizer(recipe: Recipe) -> Any:
    """AdamW behind a bound of the gradient's norm: an optax transformation, of any pytree."""
    return optax.chain(
        optax.clip_by_global_norm(recipe.max_gradient_norm),
        optax.adamw(learning_rate(recipe), b2=0.99, weight_decay=recipe.weight_decay),
    )


def begin(model: Decoder, recipe: Recipe) -> TrainState:
    """The state before the first update.

    Raises:
        ConfigError: the recipe does not fit the model.
    """
    deltas = init(model.spec, model.options, recipe, jax.random.key(recipe.seed))
    return TrainState(step=jnp.int32(0), deltas=deltas, optimizer=optimizer(recipe).init(deltas))


@partial(jax.jit, static_argnames="recipe", donate_argnames="state")
def train_step(
    model: Decoder, state: TrainState, batches: Rows, *, recipe: Recipe
) -> tuple[TrainState, StepReport]:
    """One update from batches [A, B, S]; their gradients are summed over all learned tokens."""
    dropout = jax.random.fold_in(jax.random.key(recipe.seed), state.step)

    def of_batch(deltas: Deltas, rows: Rows, index: Array) -> tuple[Array, Array]:
        key = jax.random.fold_in(dropout, index) if recipe.dropout else None
        dose = Dose(scale=recipe.scale, dropout=recipe.dropout, key=key)
        return loss_sum(model, deltas, rows, dose)

    def add(sums: tuple, batch: tuple[Rows, Array]) -> tuple[tuple, None]:
        (loss, count), gradients = jax.value_and_grad(of_batch, has_aux=True)(state.deltas, *batch)
        return jax.tree.map(jnp.add, sums, (loss, count, gradients)), None

    zeros = jnp.float32(0), jnp.int32(0), jax.tree.map(jnp.zeros_like, state.deltas)
    indices = jnp.arange(batches.token_ids.shape[0])
    (loss, count, gradients), _ = jax.lax.scan(add, zeros, (batches, indices))
    share = 1 / jnp.maximum(count, 1).astype(jnp.float32)
    gradients = jax.tree.map(lambda gradient: gradient * share, gradients)
    length = jnp.sqrt(sum(jnp.sum(jnp.square(part)) for part in jax.tree.leaves(gradients)))
    updates, moments = optimizer(recipe).update(gradients, state.optimizer, state.deltas)
    deltas = jax.tree.map(jnp.add, state.deltas, updates)
    report = StepReport(loss=loss * share, gradient_norm=length, num_learned=count)
    return TrainState(step=state.step + 1, deltas=deltas, optimizer=moments), report


@partial(jax.jit, static_argnames="scale")
def eval_step(
    model: Decoder, deltas: Deltas, rows: Rows, *, scale: float
) -> tuple[Float32[Array, ""], Int[Array, ""]]:
    """Loss of a batch [B, S], summed over its learned tokens, and how many they are."""
    return loss_sum(model, deltas, rows, Dose(scale=scale))
