"""The Hopper kernels of lora_matmul against the reference, interpreted on the host."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.errors import UnsupportedKernel
from pallas_kernels.lora_matmul import LoraWeights, block_tokens, gpu, lora_matmul
from pallas_kernels.lora_matmul.blocks import TILE
from pallas_kernels.lora_matmul.gpu_plan import (
    expand_bytes,
    expand_plan,
    operand_rank,
    part_bounds,
    shrink_bytes,
    shrink_plan,
)
from pallas_kernels.lora_matmul.traffic import lora_matmul_bytes
from tests.kernels.batches import relative_error
from tests.kernels.late_copies import late_copies

NONE = -1
#: (rank, slots) of each class.
CLASSES = ((8, 3), (16, 2))
FEW = [2, NONE, 0, 4, 2, 2, NONE, 3, 4, 0, 2]
#: Tiles of one slot, of many, of none, and one that is not full; with tokens to spare for a class.
MANY = [1] * 70 + [NONE, 4, 0, 2, 3] * 8 + [NONE] * 90 + [3] * 9 + [0]


def call(
    slots: list[int],
    depth: int,
    cycle: tuple[int, ...],
    repeats: int = 1,
    classes: tuple[tuple[int, int], ...] = CLASSES,
    dtype: str = "bfloat16",
    reduce: Callable[[Any], Any] | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """y, the kernel's result and the reference's, in float32; slots count over all classes."""
    rng = np.random.default_rng()
    columns = sum(cycle) * repeats

    def draw(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), dtype)

    x, y = draw(len(slots), depth), draw(len(slots), columns)
    weights, blocks, first = [], [], 0
    for rank, count in classes:
        a = draw(2, count, rank * len(cycle), depth) / depth**0.5
        weights.append(LoraWeights(a=a, b=draw(2, count, rank, columns)))
        blocks.append(block_tokens(jnp.asarray(slots) - first, count))
        first += count
    exact, layer = jax.lax.Precision.HIGHEST, jnp.asarray(1, jnp.int32)
    rest = tuple(weights), tuple(blocks), layer, cycle, exact, reduce
    interpret = plgpu.InterpretGPUParams(detect_races=True)
    got = jax.jit(lambda x, y: gpu.lora_matmul(x, y, *rest, interpret=interpret))(x, y)
    assert got.dtype == dtype and got.shape == y.shape
    expected = lora_matmul(
        x, y, weights, blocks, 1, cycle=cycle, precision=exact, reduce=reduce, backend="reference"
    )
    return np.asarray(y, np.float32), np.asarray(got, np.float32), np.asarray(expected, np.float32)


def check(slots: list[int], *args: Any, **options: Any) -> None:
    y, got, expected = call(slots, *args, **options)
    added, wanted = got - y, expected - y
    assert relative_error(added, wanted) < 2e-2  # the sum is rounded to 8 bits
    base = [t for t, slot in enumerate(slots) if slot == NONE]
    np.testing.assert_array_equal(got[base], y[base])


def test_a_few_tokens() -> None:
    """Both classes, one of a rank that a product's depth is no multiple of, and three parts."""
    check(FEW, 128, (128, 64, 64), repeats=2)


def test_several_tiles() -> None:
    """The last one is not full, and one has no adapter."""
    check(MANY, 64, (128,))


@pytest.mark.slow
def test_float16_with_what_devices_add_up() -> None:
    check(FEW, 192, (64, 64), dtype="float16", reduce=lambda z: 2 * z)


@pytest.mark.slow
def test_a_high_rank_in_chunks() -> None:
    check(FEW, 64, (64, 64, 64), classes=((128, 3), (24, 2)))


def test_nobody_has_an_adapter() -> None:
    """To the bit."""
    y, got, _ = call([NONE] * 9, 64, (64,))
    np.testing.assert_array_equal(got, y)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # products of what is not there
def test_a_missing_wait_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The simulation is worth something: without the waits for matrices the result is wrong."""
    late_copies(monkeypatch)
    y, got, expected = call(FEW, 64, (64,), classes=((16, 5),))
    assert not relative_error(got - y, expected - y) < 0.1


def test_tiles_list_the_slots_of_their_tokens() -> None:
    """And no others, ascending."""
    tiles = block_tokens(jnp.asarray(MANY), 5).tiles
    assert tiles.slots.shape == (-(-len(MANY) // TILE) * TILE,)
    assert (np.asarray(tiles.slots)[len(MANY) :] == 5).all()
    for index in range(tiles.num_present.shape[0]):
        own = sorted({slot for slot in MANY[index * TILE : (index + 1) * TILE] if slot != NONE})
        assert int(tiles.num_present[index]) == len(own)
        assert np.asarray(tiles.present)[index, : len(own)].tolist() == own
    many = block_tokens(jnp.asarray(MANY), 100).tiles
    assert many.present.shape == (4, TILE), "a tile has no more slots than tokens"


@pytest.mark.parametrize("num_tiles", [1, 32])
@pytest.mark.parametrize("depth", [64, 576, 4096, 14336])
@pytest.mark.parametrize("wide", [8, 24, 48, 128, 256, 384])
def test_shrink_plans_cover_the_product_and_fit(num_tiles: int, depth: int, wide: int) -> None:
    plan = shrink_plan(num_tiles, depth, wide)
    assert plan.splits * plan.steps * plan.step == depth and plan.step % 64 == 0
    assert plan.chunks * plan.columns == wide and plan.columns % 8 == 0 and plan.columns <= 128
    held = TILE * plan.steps * plan.step * 2 + plan.slots * plan.columns * plan.step * 2
    assert held + TILE * plan.columns * 4 + TILE * 4 < 200 << 10
    assert plan.slots >= 2


def test_few_tokens_use_the_whole_device() -> None:
    """Of Llama 3 8B's sites at rank 16."""
    for depth, parts in ((4096, 3), (4096, 1), (4096, 2), (14336, 1)):
        plan = shrink_plan(1, depth, 16 * parts)
        assert plan.splits * plan.chunks >= 64
    assert expand_plan(1, 6144, 16, (512, 128, 128)).columns == 64
    assert expand_plan(1, 28672, 16, (14336, 14336)).columns == 128
    assert expand_plan(32, 4096, 16, (4096,)).columns == 128
    assert expand_plan(32, 576, 16, (192, 64, 64)).columns == 64, "parts are not straddled"


@pytest.mark.parametrize("rank", [8, 16, 24, 64, 128])
def test_expand_plans_fit(rank: int) -> None:
    plan = expand_plan(32, 4096, rank, (4096,))
    deep = operand_rank(rank)
    assert rank <= deep < rank + 16 and deep % 16 == 0
    assert plan.slots >= 2
    held = TILE * deep * 2 + plan.slots * deep * plan.columns * 2 + TILE * plan.columns * 2
    assert held + TILE * 4 < 200 << 10


def test_parts_begin_where_the_cycle_says() -> None:
    assert part_bounds((192, 64, 64)) == [192, 256]
    assert part_bounds((64,)) == []


def test_bytes_are_near_the_least_for_few_tokens() -> None:
    """Of 8 adapters of rank 16 in a batch of 64, for q, k and v of Llama 3 8B."""
    depth, columns, parts = 4096, 6144, 3
    least = lora_matmul_bytes(8, 64, 16, parts, depth, columns, weight_bytes=2, activation_bytes=2)
    first = shrink_plan(1, depth, 16 * parts)
    second = expand_plan(1, columns, 16, (512, 128, 128))
    moved = shrink_bytes(first, 1, 8, depth) + expand_bytes(second, 1, 8, columns, 16)
    assert least < moved < 1.2 * least


def test_what_does_not_fit_is_refused() -> None:
    fits = {"depths": (64,), "widths": (128, 64), "ranks": (8, 128), "dtype": "bfloat16"}
    assert gpu.unsupported(**fits) is None
    for change, said in (
        ({"dtype": "float32"}, "not float32"),
        ({"depths": (96,)}, "sizes of 96"),
        ({"widths": (64, 32)}, "sizes of 32"),
        ({"ranks": (4, 8, 136)}, "ranks of 4, 136"),
    ):
        reason = gpu.unsupported(**{**fits, **change})
        assert reason is not None and said in reason
    weights = LoraWeights(a=jnp.zeros((1, 2, 8, 64)), b=jnp.zeros((1, 2, 8, 64)))
    blocks = block_tokens(jnp.zeros(4, jnp.int32), 2)
    x, y = jnp.zeros((4, 64), jnp.bfloat16), jnp.zeros((4, 64), jnp.bfloat16)
    with pytest.raises(UnsupportedKernel, match="bfloat16, float32, which must be alike"):
        lora_matmul(x, y, [weights], [blocks], 0, backend="gpu")
