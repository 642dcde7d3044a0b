"""The Hopper kernel of grouped_matmul against the reference, interpreted on the host."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper
from pallas_kernels.errors import UnsupportedKernel
from pallas_kernels.grouped_matmul import gpu, gpu_plan, grouped_matmul, reference, traffic
from pallas_kernels.grouped_matmul.gpu_plan import make_plan, make_tiles, most_tiles, tile_rows
from tests.kernels.batches import relative_error
from tests.kernels.late_copies import late_copies

TOLERANCE = 1e-2
#: Rows of each group, and rows of no group behind them.
SIZES = {
    "one row": ([0, 0, 1, 0], 0),
    "uneven": ([3, 0, 1, 40, 2, 0, 7, 11], 0),
    "padded": ([5, 0, 2, 4], 6),
    "large": ([100, 37, 0, 150], 3),
    "nobody": ([0, 0, 0], 4),
    "all in the last": ([0, 0, 300], 0),
}


@pytest.fixture(autouse=True)
def few_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    """So few that each has several turns."""
    monkeypatch.setattr(hopper, "PROCESSORS", 2)


def multiply(
    case: str, dtype: Any = jnp.bfloat16, depth: int = 128, columns: int = 256, stack: int = 0
) -> tuple[np.ndarray, np.ndarray, int]:
    """The kernel's result, the reference's, and how many rows groups have.

    Args:
        stack: groups in front of those that take part.
    """
    sizes, padding = SIZES[case]
    rng = np.random.default_rng()
    x = rng.standard_normal((sum(sizes) + padding, depth))
    x[sum(sizes) :] = np.nan
    w = rng.standard_normal((stack + len(sizes), depth, columns))
    w[:stack] = np.nan
    given = jnp.asarray(x, dtype), jnp.asarray(w, dtype), jnp.asarray(sizes, jnp.int32)
    exact = jax.lax.Precision.HIGHEST
    out = gpu.grouped_matmul(
        *given,
        jnp.asarray(stack),
        None,
        exact,
        interpret=plgpu.InterpretGPUParams(detect_races=True),
    )
    expected = reference.grouped_matmul(*given, stack)
    assert out.dtype == dtype and out.shape == expected.shape
    return np.asarray(out, np.float32), np.asarray(expected, np.float32), sum(sizes)


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=[pytest.mark.slow] * (c != "uneven")) for c in SIZES]
)
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # rows that are not numbers
def test_against_the_reference(case: str) -> None:
    out, expected, live = multiply(case)
    assert not out[live:].any(), "rows of no group are not zero"
    if live:
        assert relative_error(out[:live], expected[:live]) < TOLERANCE


def test_a_layer_of_a_stack_in_float16() -> None:
    """The other layers' matrices are not a number."""
    out, expected, _ = multiply("uneven", jnp.float16, columns=128, stack=8)
    assert relative_error(out, expected) < TOLERANCE


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # products of what is not there
def test_a_missing_wait_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The simulation is worth something: without the waits for operands the result is wrong."""
    late_copies(monkeypatch)
    out, expected, _ = multiply("uneven", columns=128)
    assert not relative_error(out, expected) < 0.1


@pytest.mark.parametrize("rows", [64, 128])
@pytest.mark.parametrize("case", SIZES)
def test_every_row_is_in_one_tile(case: str, rows: int) -> None:
    sizes, padding = SIZES[case]
    num_rows = sum(sizes) + padding
    tiles, count = make_tiles(jnp.asarray(sizes, jnp.int32), num_rows, rows)
    assert tiles.row.shape == (most_tiles(num_rows, len(sizes), rows),)
    assert 0 < int(count[0]) <= tiles.row.shape[0]
    groups = np.repeat(np.arange(len(sizes) + 1), [*sizes, padding])
    holders = np.zeros(num_rows, int)
    found = [np.asarray(field)[: int(count[0])] for field in tiles]
    for row, group, begin, end in zip(*found, strict=True):
        assert row % gpu_plan.ALIGNED == 0 and 0 <= begin < end <= rows
        assert (groups[row + begin : row + end] == group).all()
        holders[row + begin : row + end] += 1
    assert (holders == 1).all()


@pytest.mark.parametrize(
    ("num_rows", "num_groups", "rows"), [(1, 3, 64), (70, 2, 64), (300, 11, 64), (300, 3, 128)]
)
def test_no_sizes_have_more_tiles(num_rows: int, num_groups: int, rows: int) -> None:
    rng = np.random.default_rng(0)
    count_tiles = jax.jit(lambda sizes: make_tiles(sizes, num_rows, rows)[1][0])
    counts = []
    for _ in range(50):
        cuts = np.sort(rng.integers(0, num_rows + 1, num_groups))
        counts.append(int(count_tiles(jnp.asarray(np.diff(cuts, prepend=0), jnp.int32))))
    most = most_tiles(num_rows, num_groups, rows)
    assert most - 4 <= max(counts) <= most


@pytest.mark.parametrize(
    ("num_rows", "num_groups", "rows"), [(512, 128, 64), (16384, 128, 128), (16, 8, 64)]
)
def test_tiles_are_as_high_as_groups(num_rows: int, num_groups: int, rows: int) -> None:
    assert tile_rows(num_rows, num_groups) == rows


@pytest.mark.parametrize("columns", [128, 768, 2048, 14336])
@pytest.mark.parametrize("num_rows", [8, 512, 16384])
def test_plans_fit(num_rows: int, columns: int) -> None:
    plan = make_plan(num_rows, 128, columns)
    assert columns % plan.columns == 0 and plan.columns % 128 == 0
    staged = 2 * 64 * gpu_plan.STAGED * 2
    assert plan.slots >= 3
    assert plan.slots * (plan.rows + plan.columns) * gpu_plan.STEP * 2 + staged < 224 << 10


def test_bytes_are_near_the_least_where_groups_have_few_rows() -> None:
    """A decode step of 64 tokens through Qwen3-30B-A3B's gate: each matrix is read once."""
    plan = make_plan(512, 128, 768)
    least = traffic.grouped_matmul_bytes(128, 512, 2048, 768, weight_bytes=2, activation_bytes=2)
    assert least < gpu_plan.grouped_bytes(plan, 128, 2048, 768) < 1.6 * least


def test_what_does_not_fit_is_refused() -> None:
    assert gpu.unsupported(depth=64, num_columns=128, dtype="bfloat16") is None
    reason = gpu.unsupported(depth=64, num_columns=128, dtype="int8")
    assert reason is not None and reason.endswith("not int8: it reads no codes yet")
    reason = gpu.unsupported(depth=96, num_columns=128, dtype="bfloat16")
    assert reason is not None and "96 x 128" in reason
    x, w = jnp.zeros((4, 64), jnp.float32), jnp.zeros((2, 64, 128), jnp.bfloat16)
    with pytest.raises(UnsupportedKernel, match="must be alike; backend='xla' takes any"):
        grouped_matmul(x, w, jnp.asarray([2, 2]), backend="gpu")
