"""lora_matmul: each backend against a loop over tokens, and what it must not cost."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.errors import UnsupportedKernel
from pallas_kernels.lora_matmul import LoraWeights, block_tokens, expand_rows, lora_matmul
from pallas_kernels.lora_matmul.blocks import block_size, most_blocks
from pallas_kernels.lora_matmul.traffic import lora_matmul_bytes, lora_matmul_flops

BACKENDS = ("reference", "xla", "cpu")
#: (rank, slots) of each class.
CLASSES = ((4, 3), (8, 2))
NONE = -1
blocks_of = jax.jit(block_tokens, static_argnums=1)


def arrays(
    num_tokens: int, depth: int, cycle: tuple[int, ...], repeats: int, layers: int = 2
) -> tuple[np.ndarray, np.ndarray, list[LoraWeights]]:
    """x, y and weights of both classes."""
    rng = np.random.default_rng(num_tokens + depth)
    columns = sum(cycle) * repeats

    def draw(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    weights = [
        LoraWeights(
            a=jnp.asarray(draw(layers, slots, rank * len(cycle), depth)),
            b=jnp.asarray(draw(layers, slots, rank, columns)),
        )
        for rank, slots in CLASSES
    ]
    return draw(num_tokens, depth), draw(num_tokens, columns), weights


def by_token(
    x: np.ndarray,
    y: np.ndarray,
    weights: list[LoraWeights],
    slots: list[int],
    layer: int,
    cycle: tuple[int, ...],
) -> np.ndarray:
    """The sum as the module says it, token by token; slots are counted over all classes."""
    out = y.astype(np.float64)
    part_of = np.tile(np.repeat(np.arange(len(cycle)), cycle), y.shape[1] // sum(cycle))
    for t, slot in enumerate(slots):
        for own, (rank, num_slots) in zip(weights, CLASSES, strict=True):
            if 0 <= slot < num_slots:
                a = np.asarray(own.a, np.float64)[layer, slot]
                b = np.asarray(own.b, np.float64)[layer, slot]
                z = (a @ x[t]).reshape(len(cycle), rank)
                out[t] += np.einsum("nr,rn->n", z[part_of], b)
            slot -= num_slots
    return out


def grouped(slots: list[int]) -> list:
    """Blocks of each class."""
    blocks, first = [], 0
    for _, num_slots in CLASSES:
        blocks.append(block_tokens(jnp.asarray(slots, jnp.int32) - first, num_slots))
        first += num_slots
    return blocks


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("cycle", "repeats", "depth"), [((16,), 1, 24), ((8, 4, 4), 3, 17), ((12, 12), 1, 40)]
)
def test_against_a_loop_over_tokens(
    backend: str, cycle: tuple[int, ...], repeats: int, depth: int
) -> None:
    """Tokens of both classes, of one slot and of none, in any order."""
    slots = [2, NONE, 0, 4, 2, 2, NONE, 3, 4, 0, 2, 2, 2, 1, NONE, 4]
    x, y, weights = arrays(len(slots), depth, cycle, repeats)
    for layer in (0, 1):
        got = lora_matmul(
            jnp.asarray(x),
            jnp.asarray(y),
            weights,
            grouped(slots),
            layer,
            cycle=cycle,
            precision=jax.lax.Precision.HIGHEST,
            backend=backend,
        )
        expected = by_token(x, y, weights, slots, layer, cycle)
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_adapters_nothing_changes(backend: str) -> None:
    """To the bit."""
    slots = [NONE] * 9
    x, y, weights = arrays(9, 24, (16,), 1)
    got = lora_matmul(jnp.asarray(x), jnp.asarray(y), weights, grouped(slots), 0, backend=backend)
    np.testing.assert_array_equal(got, y)


@pytest.mark.parametrize("num_tokens", [1, 7, 300])
def test_native_rows_do_not_depend_on_their_company(num_tokens: int) -> None:
    """A token's bits are the same alone and among others of its adapter."""
    x, y, weights = arrays(num_tokens, 24, (16,), 1)
    together = lora_matmul(
        jnp.asarray(x), jnp.asarray(y), weights, grouped([1] * num_tokens), 0, backend="cpu"
    )
    alone = lora_matmul(
        jnp.asarray(x[:1]), jnp.asarray(y[:1]), weights, grouped([1]), 0, backend="cpu"
    )
    np.testing.assert_array_equal(together[0], alone[0])


def some_slots(num_tokens: int) -> st.SearchStrategy[list[int]]:
    """Of so many tokens."""
    return st.lists(st.integers(-1, 5), min_size=num_tokens, max_size=num_tokens)


@settings(max_examples=60)
@given(st.sampled_from((1, 13, 80)).flatmap(some_slots), st.sampled_from((1, 4, 300)))
def test_blocks(slots: list[int], num_slots: int) -> None:
    """Each token with a slot of the class is in one block of that slot; places say where."""
    blocks = blocks_of(jnp.asarray(slots, jnp.int32), num_slots)
    tokens, places = np.asarray(blocks.tokens), np.asarray(blocks.places)
    num_live = int(blocks.num_blocks)
    assert tokens.shape == (most_blocks(len(slots), num_slots), block_size(len(slots), num_slots))
    assert num_live <= len(tokens)
    assert (tokens[num_live:] == len(slots)).all()
    seen = []
    for block, slot in zip(tokens[:num_live], np.asarray(blocks.slots), strict=False):
        own = block[block < len(slots)]
        assert len(own) > 0
        assert (block[: len(own)] == own).all()  # padding stands behind
        assert all(slots[t] == slot for t in own)
        seen += own.tolist()
    assert sorted(seen) == [t for t, slot in enumerate(slots) if 0 <= slot < num_slots]
    for token, place in enumerate(places):
        here = place < tokens.size
        assert here == (token in seen)
        assert not here or tokens.flat[place] == token
    # Slots with tokens have at most one block that is not full.
    counts = [slots.count(slot) for slot in range(num_slots)]
    assert num_live == sum(-(-count // tokens.shape[1]) for count in counts)


def test_expand_rows() -> None:
    """The second half alone."""
    slots = [1, NONE, 0, 1, 2]
    x, y, weights = arrays(5, 8, (16,), 1)
    z, own = x[:, :4], weights[0]
    got = expand_rows(jnp.asarray(z), jnp.asarray(y), own.b[1], block_tokens(jnp.asarray(slots), 3))
    b = np.asarray(own.b)[1]
    expected = [y[t] + (0 if s < 0 else z[t] @ b[s]) for t, s in enumerate(slots)]
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_bfloat16() -> None:
    """Rounded once between the products, and at the end."""
    slots = [0, 2, 2, NONE]
    x, y, weights = arrays(4, 24, (16,), 1)
    narrow = [jax.tree.map(lambda w: w.astype(jnp.bfloat16), own) for own in weights]
    xb, yb = jnp.asarray(x, jnp.bfloat16), jnp.asarray(y, jnp.bfloat16)
    got = lora_matmul(xb, yb, narrow, grouped(slots), 0)
    oracle = lora_matmul(xb, yb, narrow, grouped(slots), 0, backend="reference")
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        got.astype(jnp.float32), oracle.astype(jnp.float32), rtol=2e-2, atol=0.25
    )


def test_refusals() -> None:
    """Shapes that contradict each other, an unknown backend, and what the native one lacks."""
    x, y, weights = arrays(4, 24, (16,), 1)
    blocks = grouped([0] * 4)
    with pytest.raises(ValueError, match="cycle"):
        lora_matmul(jnp.asarray(x), jnp.asarray(y), weights, blocks, 0, cycle=(8, 8))
    with pytest.raises(ValueError, match="lora_matmul has"):
        lora_matmul(jnp.asarray(x), jnp.asarray(y), weights, blocks, 0, backend="cuda")
    narrow = jnp.asarray(x, jnp.bfloat16)
    with pytest.raises(UnsupportedKernel, match="float32"):
        lora_matmul(narrow, jnp.asarray(y), weights, blocks, 0, backend="cpu")


def test_traffic_by_hand() -> None:
    """2 adapters of rank 4 on 3 parts of depth 10 and 20 columns, 5 tokens."""
    assert lora_matmul_flops(5, 4, 3, 10, 20) == 2 * 5 * 4 * (30 + 20)
    assert lora_matmul_bytes(2, 5, 4, 3, 10, 20) == 2 * 4 * 50 * 4 + 5 * (10 + 40) * 4
