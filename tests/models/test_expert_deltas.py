"""Rows of a mixture by slot and expert: each pair of them once, and none that nobody uses."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.models.adapters import EXPERT_SITES
from jaxserve.models.deltas import SlotClass, StepDeltas
from jaxserve.models.expert_deltas import ExpertDeltas
from jaxserve.models.options import ModelOptions
from pallas_kernels.lora_matmul import LoraWeights

NUM_EXPERTS, DEPTH, WIDE = 4, 6, 10
#: (rank, slots) of each class.
CLASSES = ((4, 2), (8, 3))
#: Of slot 3 the adapter has no deltas of experts.
HAS = ((True, True), (True, False, True))
OPTIONS = ModelOptions()
group = jax.jit(lambda deltas, *rows: deltas.group(*rows))


def classes(seed: int = 0) -> list[SlotClass]:
    """With random matrices of two layers."""
    rng = np.random.default_rng(seed)

    def draw(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    found = []
    for (rank, num_slots), flags in zip(CLASSES, HAS, strict=True):
        lead = 2, num_slots, NUM_EXPERTS, rank
        sites = {
            name: LoraWeights(a=draw(*lead, DEPTH), b=draw(*lead, WIDE)) for name in EXPERT_SITES
        }
        has = jnp.asarray([flags])
        found.append(SlotClass(sites=sites, has_embed=has, has_head=has, has_experts=has))
    return found


def of_tokens(slots: list[int], layer: int = 0) -> ExpertDeltas:
    """Of a step with these slots."""
    step = StepDeltas.of(classes(), jnp.asarray(slots, jnp.int32))
    deltas = ExpertDeltas.of(step.at(jnp.int32(layer)))
    assert deltas is not None
    return deltas


@pytest.mark.parametrize("layer", [0, 1])
def test_each_row_has_the_matrices_of_its_slot_and_expert(layer: int) -> None:
    """Against a loop over rows; the last expert number is none of these."""
    slots = [1, -1, 3, 4, 0, 2]
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, len(slots), 40)
    experts = np.sort(rng.integers(0, NUM_EXPERTS + 1, 40))
    x = rng.normal(size=(40, DEPTH)).astype(np.float32)
    y = rng.normal(size=(40, WIDE)).astype(np.float32)
    deltas = of_tokens(slots, layer)
    blocks = group(deltas, jnp.asarray(tokens), jnp.asarray(experts))
    got = deltas.add("expert_up", jnp.asarray(x), jnp.asarray(y), blocks, OPTIONS)
    expected = y.copy()
    for row, (token, expert) in enumerate(zip(tokens, experts, strict=True)):
        slot = slots[token]
        for own, (_, num_slots), has in zip(classes(), CLASSES, HAS, strict=True):
            if 0 <= slot < num_slots and has[slot] and expert < NUM_EXPERTS:
                site = own.sites["expert_up"]
                a, b = np.asarray(site.a)[layer, slot, expert], site.b[layer, slot, expert]
                expected[row] += (a @ x[row]) @ np.asarray(b)
            slot -= num_slots
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("slots", "counts"),
    [
        ([-1] * 8, (0, 0)),  # no adapters
        ([3] * 8, (0, 0)),  # one without deltas of experts
        ([-1, -1, -1, 1, -1, -1, 3, -1], (1, 0)),  # one token, one of whose rows is here
        ([0, 0, 1, 1, 4, 4, 4, 4], (4, 2)),
    ],
)
def test_the_work_is_that_of_rows_with_adapters(slots: list[int], counts: tuple[int, int]) -> None:
    """Blocks, of at least four rows each, whatever slots and experts there are."""
    tokens = jnp.asarray([0, 2, 4, 6, 1, 3, 5, 7])
    experts = jnp.asarray([0, 0, 0, 0, 2, 2, 2, NUM_EXPERTS])
    blocks = group(of_tokens(slots), tokens, experts)
    assert tuple(int(own.num_blocks) for own in blocks) == counts


def test_none_where_experts_take_none() -> None:
    """Nothing of it is traced then."""
    plain = [SlotClass(sites={}, has_embed=c.has_embed, has_head=c.has_head,
                       has_experts=c.has_experts) for c in classes()]  # fmt: skip
    assert ExpertDeltas.of(None) is None
    assert ExpertDeltas.of(StepDeltas.of(plain, jnp.asarray([0, 1], jnp.int32))) is None
