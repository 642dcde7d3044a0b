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
    SHARED_BYTES,
    expand_adds_up,
    expand_bytes,
    expand_plan,
    expand_shared_bytes,
    operand_rank,
    part_bounds,
    parts_bytes,
    shrink_bytes,
    shrink_plan,
)
from pallas_kernels.lora_matmul.traffic import lora_matmul_bytes
from tests.kernels.aligned_copies import aligned_copies
from tests.kernels.batches import relative_error
from tests.kernels.late_copies import late_copies

NONE = -1
#: (rank, slots) of each class.
CLASSES = ((8, 3), (16, 2))
FEW = [2, NONE, 0, 4, 2, 2, NONE, 3, 4, 0, 2]
#: Tiles of one slot, of many, of none, and one that is not full; with tokens to spare for a class.
#: More slots than one product of `shrink` has, so that the ring is walked twice.
CROWD = [*range(12), NONE, 11, 3]
#: Llama 3 8B's: K, N, and the widths of the parts.
SITES = {
    "qkv": (4096, 6144, (512, 128, 128)),
    "out": (4096, 4096, (4096,)),
    "gate_up": (4096, 28672, (14336, 14336)),
    "down": (14336, 4096, (4096,)),
}
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
    got = run(x, y, *rest)
    assert got.dtype == dtype and got.shape == y.shape
    expected = lora_matmul(
        x, y, weights, blocks, 1, cycle=cycle, precision=exact, reduce=reduce, backend="reference"
    )
    return np.asarray(y, np.float32), np.asarray(got, np.float32), np.asarray(expected, np.float32)


def run(x: jax.Array, y: jax.Array, *rest: Any) -> jax.Array:
    """The kernels, interpreted."""
    interpret = plgpu.InterpretGPUParams(detect_races=True)
    return jax.jit(lambda x, y: gpu.lora_matmul(x, y, *rest, interpret=interpret))(x, y)


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


@pytest.mark.parametrize(
    ("slots", "rank"),
    [
        (CROWD, 16),
        pytest.param(CROWD, 24, marks=pytest.mark.slow),
        pytest.param([2, 0, 1] * 11, 64, marks=pytest.mark.slow),
        pytest.param([0, NONE, 2, 2] * 25, 8, marks=pytest.mark.slow),  # y goes row by row of four
    ],
)
def test_ranks_and_crowds(monkeypatch: pytest.MonkeyPatch, slots: list[int], rank: int) -> None:
    """With copies that a GPU takes, several parts of K, and numbers of tokens of any kind."""
    aligned_copies(monkeypatch)
    assert shrink_plan(1, 256, 3 * rank, max(slots) + 1).splits > 1
    check(slots, 256, (128, 64, 64), classes=((rank, max(slots) + 1),))


def test_bits_depend_on_neither_company_nor_place() -> None:
    """A token among others of its adapter and of others, and alone at another place."""
    rng = np.random.default_rng()

    def draw(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    x, y = draw(9, 256), draw(9, 64)
    a, b = draw(1, 10, 8, 256), draw(1, 10, 8, 64)
    weights = (LoraWeights(a=jnp.asarray(a, jnp.bfloat16), b=jnp.asarray(b, jnp.bfloat16)),)

    def added(slots: list[int], x: np.ndarray, y: np.ndarray) -> np.ndarray:
        blocks = (block_tokens(jnp.asarray(slots), 10),)
        rest = blocks, jnp.asarray(0, jnp.int32), (64,), jax.lax.Precision.HIGHEST, None
        return np.asarray(
            run(jnp.asarray(x, "bfloat16"), jnp.asarray(y, "bfloat16"), weights, *rest)
        )

    together = added([0, 1, 2, 3, 4, 9, 6, 7, 9], x, y)
    x[[0, 5]], y[[0, 5]] = x[[5, 0]], y[[5, 0]]
    alone = added([9] + [NONE] * 8, x, y)
    np.testing.assert_array_equal(alone[0], together[5])
    assert (alone[0] != np.asarray(jnp.asarray(y[0], jnp.bfloat16))).any()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("broken", ["x", "a", "b"])
def test_what_is_not_a_number_stays_in_its_own_row(broken: str) -> None:
    """A token's, and what a slot's matrices do to its tokens; of a rank that is filled up."""
    slots, rng = [0, 1, NONE, 0, 2, 1, 3], np.random.default_rng()
    arrays = {
        "x": rng.normal(size=(7, 64)),
        "y": rng.normal(size=(7, 64)),
        "a": rng.normal(size=(1, 4, 8, 64)),
        "b": rng.normal(size=(1, 4, 8, 64)),
    }
    whole = {name: jnp.asarray(array, jnp.bfloat16) for name, array in arrays.items()}
    arrays[broken][1 if broken == "x" else (0, 1)] = np.nan
    ours = [1] if broken == "x" else [1, 5]

    def result(arrays: dict[str, jax.Array]) -> np.ndarray:
        weights = (LoraWeights(a=arrays["a"], b=arrays["b"]),)
        rest = (block_tokens(jnp.asarray(slots), 4),), jnp.asarray(0, jnp.int32), (64,)
        exact = jax.lax.Precision.HIGHEST, None
        return np.asarray(run(arrays["x"], arrays["y"], weights, *rest, *exact), np.float32)

    given = {name: jnp.asarray(array, jnp.bfloat16) for name, array in arrays.items()}
    got, expected = result(given), result(whole)
    others = [t for t in range(7) if t not in ours]
    assert np.isnan(got[ours]).all()
    np.testing.assert_array_equal(got[others], expected[others])


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


@pytest.mark.parametrize("num_tiles", [1, 4, 32])
@pytest.mark.parametrize("depth", [64, 576, 4096, 14336])
@pytest.mark.parametrize("wide", [8, 24, 48, 128, 256, 384])
@pytest.mark.parametrize("most", [1, 8, 64])
def test_shrink_plans_cover_the_product_and_fit(
    num_tiles: int, depth: int, wide: int, most: int
) -> None:
    plan = shrink_plan(num_tiles, depth, wide, most)
    assert plan.splits * plan.steps * plan.step == depth and plan.step % 64 == 0
    assert plan.chunks * plan.columns == wide and plan.columns % 8 == 0 and plan.columns <= 128
    assert 1 <= plan.together <= most and plan.together * plan.columns <= 128
    ring = plan.slots * plan.together * plan.columns * plan.step * 2
    held = TILE * plan.steps * plan.step * 2 + ring + TILE * plan.columns * 4 + TILE * 4
    assert held <= SHARED_BYTES
    assert plan.slots >= 2
    assert plan.splits <= 16, "each block of expand reads them all"


def test_few_tokens_use_the_device_with_few_parts_of_k() -> None:
    """At rank 16."""
    blocks = {}
    for site, (depth, columns, cycle) in SITES.items():
        first = shrink_plan(1, depth, 16 * len(cycle), 8)
        second = expand_plan(1, columns, 16, cycle)
        blocks[site] = first.splits, first.splits * first.chunks, columns // second.width
    assert blocks == {
        "qkv": (8, 48, 96),
        "out": (16, 32, 64),
        "gate_up": (8, 32, 112),
        "down": (14, 28, 64),
    }
    assert expand_plan(32, 4096, 16, (4096,)).width == 256
    assert expand_plan(32, 576, 16, (192, 64, 64)).width == 64, "parts are not straddled"


@pytest.mark.parametrize("num_tiles", [1, 32])
@pytest.mark.parametrize("rank", [8, 16, 24, 64, 120, 128])
def test_expand_plans_fit(num_tiles: int, rank: int) -> None:
    deep = operand_rank(rank)
    assert rank <= deep < rank + 16 and deep % 16 == 0
    for depth, columns, cycle in SITES.values():
        first = shrink_plan(num_tiles, depth, rank * len(cycle), 8)
        plan = expand_plan(num_tiles, columns, rank, cycle)
        assert plan.slots >= 2 and all(width % plan.width == 0 for width in cycle)
        adds_up = expand_adds_up(first, plan, num_tiles, columns, rank)
        assert adds_up or first.splits > 1
        # The sum is in float32 where the rank is filled up.
        parts = first.splits if adds_up else int(deep > rank)
        assert expand_shared_bytes(plan, parts, rank) <= SHARED_BYTES


def test_a_decode_step_adds_up_where_it_is_multiplied() -> None:
    """Of the ranks that are served by default; long steps by a kernel of XLA's."""

    def adds_up(num_tiles: int, rank: int, most: int) -> dict[str, bool]:
        found = {}
        for site, (depth, columns, cycle) in SITES.items():
            first = shrink_plan(num_tiles, depth, rank * len(cycle), most)
            second = expand_plan(num_tiles, columns, rank, cycle)
            found[site] = expand_adds_up(first, second, num_tiles, columns, rank)
        return found

    assert adds_up(1, 16, 8) == adds_up(1, 8, 4) == dict.fromkeys(SITES, True)
    assert adds_up(1, 64, 2) == dict.fromkeys(SITES, True) | {"down": False}
    assert adds_up(32, 16, 8) == dict.fromkeys(SITES, False)


def test_parts_begin_where_the_cycle_says() -> None:
    assert part_bounds((192, 64, 64)) == [192, 256]
    assert part_bounds((64,)) == []


def test_bytes_by_hand() -> None:
    """Of 8 adapters of rank 16 in a batch of 64, for q, k and v of Llama 3 8B."""
    depth, columns, cycle = SITES["qkv"]
    first, second = shrink_plan(1, depth, 48, 8), expand_plan(1, columns, 16, cycle)
    assert parts_bytes(first, 1) == 8 * 64 * 48 * 4
    matrices = 8 * 48 * depth * 2
    assert shrink_bytes(first, 1, 8, depth) == 6 * 64 * depth * 2 + matrices + 8 * 64 * 48 * 4
    z, b, y = 96 * 64 * 16, 8 * 16 * columns * 2, 2 * 64 * columns * 2
    assert expand_bytes(second, first.splits, 1, 8, columns, 16) == z * 8 * 4 + b + y
    assert expand_bytes(second, 0, 1, 8, columns, 16) == z * 2 + b + y
    least = lora_matmul_bytes(8, 64, 16, 3, depth, columns, weight_bytes=2, activation_bytes=2)
    # What is beyond comes from the L2 cache: x once a chunk, z once a block.
    assert least == matrices + b + y + 64 * depth * 2


def test_long_steps_read_x_once() -> None:
    """At ranks up to 32: a chunk of z has all its columns."""
    for depth, _, cycle in SITES.values():
        assert shrink_plan(32, depth, 32 * len(cycle), 8).chunks == 1


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
