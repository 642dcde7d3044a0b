"""Training's forward pass is the served model's, with deltas the merged model's, and has gradients.

The served model was compared with transformers (tests/models); here its own logits over the paged
cache are what counts.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.models.decoder import Decoder
from jaxserve.models.hf_tensors import Rules
from jaxserve.models.options import ModelOptions
from jaxserve.training.adapter import Deltas, init, to_peft
from jaxserve.training.examples import Example
from jaxserve.training.model import Dose, hidden_states, loss_sum
from jaxserve.training.packing import Rows, stack
from jaxserve.training.recipe import ATTENTION_TARGETS, TARGETS, Recipe
from jaxserve.weights.checkpoint import open_checkpoint
from tests.models.driver import Driver
from tests.models.loading import CASES, DENSE, ORACLE, load_tiny

TOLERANCE = 1e-4
SCANNED = ModelOptions(layers="scanned")
PLAIN = Dose(scale=2.0)
RECIPE = Recipe(rank=4, alpha=8.0, targets=TARGETS)


def examples(*sizes: int) -> list[Example]:
    rng = np.random.default_rng(7)
    return [
        Example(
            token_ids=rng.integers(0, 320, size, np.int32), is_learned=np.arange(size) > size // 3
        )
        for size in sizes
    ]


def random_deltas(model: Decoder, recipe: Recipe) -> Deltas:
    """Deltas that matter: B is not zero."""
    deltas = init(model.spec, model.options, recipe, jax.random.key(1))
    keys = iter(jax.random.split(jax.random.key(2), 1000))
    return jax.tree.map(lambda x: x + 0.05 * jax.random.normal(next(keys), x.shape), deltas)


@jax.jit
def logits_of(model: Decoder, deltas: Deltas, rows: Rows, dose: Dose) -> jax.Array:
    hidden = hidden_states(model, deltas, rows, dose)
    return model.logits(hidden.reshape(-1, hidden.shape[-1])).reshape(*hidden.shape[:2], -1)


def check(model: Decoder, deltas: Deltas, served: Decoder) -> None:
    """Two rows with three examples, against each example alone over the served model's pages."""
    found = examples(31, 22, 40)
    rows = stack([found[:2], found[2:]], 64, 2)
    logits = np.asarray(logits_of(model, deltas, rows, PLAIN))
    for row, start, example in ((0, 0, found[0]), (0, 31, found[1]), (1, 0, found[2])):
        driver, ids = Driver(served, 1, 64), example.token_ids
        _, hidden = driver.step({0: ids.tolist()}, num_rows=1, num_tokens=40)
        ours, theirs = logits[row, start : start + len(ids)], driver.all_logits(hidden)
        np.testing.assert_allclose(ours, theirs, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.in_turn
def test_without_deltas_it_is_the_served_model(case: str) -> None:
    model = load_tiny(case, SCANNED)
    check(model, tuple({} for _ in model.layers), load_tiny(case, ModelOptions()))


def merged(case: str, deltas: Deltas, model: Decoder, recipe: Recipe) -> Decoder:
    """The served model with the adapter, as peft's files hold it, added to its HF tensors."""
    dtype = np.dtype(np.float32)
    adapter = to_peft(deltas, model.spec, model.options, recipe, base_model="tiny", dtype=dtype)
    checkpoint = open_checkpoint(ORACLE / case)

    def read(name: str) -> np.ndarray:
        tensor = checkpoint.read(name).astype(np.float32)
        module = adapter.modules.get(name.removesuffix(".weight"))
        return tensor if module is None else tensor + module.delta()

    served = load_tiny(case, ModelOptions())
    rules: Rules = type(served).hf_tensors(served.spec, served.options)
    assert adapter.modules.keys() <= {
        name.removesuffix(".weight") for rule in rules.values() for name in rule.names
    }
    for path, rule in rules.items():
        dense = rule.build([read(name) for name in rule.names])
        for part, held in served.encode(path, dense).items():
            served.params()[part].set_value(jnp.asarray(held))
    return served


@pytest.mark.parametrize("case", DENSE)
@pytest.mark.parametrize("layers", ["scanned", "unrolled"])
@pytest.mark.in_turn("merged")
def test_with_deltas_it_is_the_merged_model(case: str, layers: str) -> None:
    model = load_tiny(case, ModelOptions(layers=layers))
    deltas = random_deltas(model, RECIPE)
    check(model, deltas, merged(case, deltas, model, RECIPE))


@pytest.mark.parametrize("targets", [("v_proj",), ("o_proj", "up_proj"), ("q_proj", "down_proj")])
def test_targets_that_are_left_out_are_the_bases(targets: tuple[str, ...]) -> None:
    model, recipe = load_tiny("llama3", SCANNED), replace(RECIPE, targets=targets)
    deltas = random_deltas(model, recipe)
    check(model, deltas, merged("llama3", deltas, model, recipe))


def test_a_mixture_takes_deltas_on_its_attention() -> None:
    recipe = replace(RECIPE, targets=ATTENTION_TARGETS)
    model = load_tiny("mixtral", SCANNED)
    deltas = random_deltas(model, recipe)
    check(model, deltas, merged("mixtral", deltas, model, recipe))


def test_the_loss_is_that_of_the_logits() -> None:
    model = load_tiny("llama3", SCANNED)
    deltas = random_deltas(model, RECIPE)
    rows = stack([examples(31, 22), examples(60)], 64, 3)  # the last row is empty
    logits = logits_of(model, deltas, rows, PLAIN)
    at_target = jnp.take_along_axis(jax.nn.log_softmax(logits), rows.targets[..., None], axis=2)
    expected = -np.asarray(at_target)[..., 0][rows.is_learned].sum()
    loss, count = jax.jit(loss_sum)(model, deltas, rows, PLAIN)
    assert count == rows.is_learned.sum()
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_gradients_are_those_of_small_differences() -> None:
    model = load_tiny("gemma2", SCANNED)
    deltas = random_deltas(model, RECIPE)
    rows = stack([examples(31, 22)], 64, 1)
    loss = jax.jit(lambda deltas: loss_sum(model, deltas, rows, PLAIN)[0])
    gradients = jax.grad(loss)(deltas)
    for seed, path in enumerate(
        jax.tree.leaves(
            jax.tree_util.tree_map_with_path(lambda path, _: jax.tree_util.keystr(path), deltas)
        )
    ):
        direction = _along(deltas, path, seed)
        step = 0.02
        up, down = (
            float(loss(jax.tree.map(lambda x, d, by=by: x + by * d, deltas, direction)))
            for by in (step, -step)
        )
        slope = sum(
            float(jnp.vdot(g, d))
            for g, d in zip(jax.tree.leaves(gradients), jax.tree.leaves(direction), strict=True)
        )
        assert slope == pytest.approx((up - down) / (2 * step), rel=0.03, abs=0.02), path


def _along(deltas: Deltas, wanted: str, seed: int) -> Any:
    """A random direction of length 1 in one leaf."""

    def direction(path: Any, x: jax.Array) -> jax.Array:
        if jax.tree_util.keystr(path) != wanted:
            return jnp.zeros_like(x)
        d = jax.random.normal(jax.random.key(seed), x.shape)
        return d / jnp.linalg.norm(d)

    return jax.tree_util.tree_map_with_path(direction, deltas)


def test_dropout_is_keyed_and_even() -> None:
    x = jnp.ones((200, 50))
    dose = Dose(scale=1.0, dropout=0.25, key=jax.random.key(3))
    dropped = dose.of_layer(1).drop(x, "q_proj")
    assert set(np.unique(dropped).tolist()) == {0.0, np.float32(1 / 0.75)}
    assert float(dropped.mean()) == pytest.approx(1, abs=0.02)
    assert (dropped == dose.of_layer(1).drop(x, "q_proj")).all()
    assert (dropped != dose.of_layer(2).drop(x, "q_proj")).any()
    assert (dropped != dose.of_layer(1).drop(x, "o_proj")).any()
    assert PLAIN.drop(x, "q_proj") is x and PLAIN.of_layer(1) is PLAIN


def test_dropout_reaches_the_deltas_only() -> None:
    model = load_tiny("llama3", SCANNED)
    rows = stack([examples(31)], 64, 1)
    dose = Dose(scale=2.0, dropout=0.5, key=jax.random.key(3))
    zeros = init(model.spec, model.options, RECIPE, jax.random.key(0))  # B is zero
    plain = logits_of(model, zeros, rows, PLAIN)
    np.testing.assert_array_equal(logits_of(model, zeros, rows, dose), plain)
    deltas = random_deltas(model, RECIPE)
    with_delta = logits_of(model, deltas, rows, PLAIN)
    assert jnp.abs(logits_of(model, deltas, rows, dose) - with_delta).max() > 0.01
