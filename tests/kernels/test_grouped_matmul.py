"""Grouped matmul against its reference, and what compilers make of it."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.compile_check import targets
from pallas_kernels.grouped_matmul import grouped_matmul, reference, traffic, xla
from tests.kernels.batches import relative_error

HIGHEST = jax.lax.Precision.HIGHEST
#: Rows of each group, and rows of no group behind them.
SIZES = {
    "one row": ([0, 0, 1, 0], 0),
    "all in one": ([0, 17, 0], 0),
    "all in the last": ([0, 0, 9], 0),
    "uneven": ([3, 0, 1, 40, 2, 0, 7, 11], 0),
    "padded": ([5, 0, 2, 4], 6),
    "nobody": ([0, 0, 0], 4),
    "more groups than rows": ([0] * 20 + [2] + [0] * 10 + [1], 1),
    "large": ([100, 37, 0, 190], 3),
}


def drawn(case: str, dtype: Any, depth: int = 24, columns: int = 40) -> tuple[Any, Any, Any]:
    """Random rows, matrices and the group sizes; rows of no group are not a number."""
    sizes, padding = SIZES[case]
    rng = np.random.default_rng()
    x = rng.standard_normal((sum(sizes) + padding, depth))
    x[sum(sizes) :] = np.nan
    w = rng.standard_normal((len(sizes), depth, columns))
    return jnp.asarray(x, dtype), jnp.asarray(w, dtype), jnp.asarray(sizes, jnp.int32)


@pytest.mark.parametrize(("dtype", "bound"), [(jnp.float32, 1e-5), (jnp.bfloat16, 1e-2)])
@pytest.mark.parametrize("run", [xla.by_blocks, xla.by_ragged_dot], ids=["blocks", "ragged_dot"])
@pytest.mark.parametrize("case", SIZES)
def test_both_lowerings_match_the_reference(
    case: str, run: Any, dtype: Any, bound: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, w, sizes = drawn(case, dtype)
    if run is xla.by_ragged_dot:  # off a TPU it is a product with zeros, which NaN spoils
        x = jnp.nan_to_num(x)
    monkeypatch.setattr(xla, "by_blocks", run)
    out = grouped_matmul(x, w, sizes, precision=HIGHEST)
    expected = reference.grouped_matmul(x, w, sizes)
    assert out.dtype == dtype
    assert not np.asarray(out)[int(sizes.sum()) :].any(), "rows of no group are not zero"
    if sizes.sum():
        assert np.abs(np.asarray(expected, np.float32)).max() > 0.1
        assert relative_error(out, expected) < bound


@pytest.mark.parametrize("run", [xla.by_blocks, xla.by_ragged_dot], ids=["blocks", "ragged_dot"])
def test_a_layer_of_a_stack(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xla, "by_blocks", run)
    x, w, sizes = drawn("uneven", jnp.float32)
    stack = jnp.concatenate([jnp.full_like(w, 3), w, jnp.full_like(w, 5)])
    call = jax.jit(lambda first: grouped_matmul(x, stack, sizes, first_group=first))
    expected = reference.grouped_matmul(x, w, sizes)
    assert relative_error(call(len(sizes)), expected) < 1e-5
    assert relative_error(call(0), expected) > 0.5


@pytest.mark.parametrize("case", ["uneven", "padded"])
def test_codes(case: str) -> None:
    x, w, sizes = drawn(case, jnp.float32)
    rng = np.random.default_rng()
    codes = jnp.asarray(rng.integers(-127, 128, w.shape, np.int8))
    scale = jnp.asarray(rng.random((w.shape[0], w.shape[2]), np.float32))
    out = grouped_matmul(x, codes, sizes, scale=scale, precision=HIGHEST)
    expected = reference.grouped_matmul(x, codes * scale[:, None], sizes)
    assert relative_error(out, expected) < 1e-5
    expected = reference.grouped_matmul(x, codes, sizes, scale=scale)
    assert relative_error(out, expected) < 1e-5


@pytest.mark.parametrize(("num_rows", "num_groups"), [(1, 8), (64, 8), (70, 8), (4096, 8)])
def test_blocks_are_few(num_rows: int, num_groups: int) -> None:
    block = xla.block_rows(num_rows, num_groups)
    assert block & (block - 1) == 0
    assert block <= max(1, num_rows // num_groups) < 2 * block or block == 64


def test_nothing_as_large_as_the_matrices_is_made() -> None:
    x, w = jnp.zeros((64, 256)), jnp.zeros((32, 256, 512))
    compiled = jax.jit(grouped_matmul).lower(x, w, jnp.zeros(32, jnp.int32)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < w.nbytes / 10


_COMPILE = """
import json
from benchmarks.compile_check import targets
targets.prepare()
import jax, jax.numpy as jnp
from jax.experimental import topologies
from pallas_kernels.grouped_matmul import grouped_matmul

topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:1x1")
place = jax.sharding.SingleDeviceSharding(topology.devices[0])
shape = lambda dims, dtype: jax.ShapeDtypeStruct(dims, dtype, sharding=place)

def step(x, gate, down, scale, sizes):
    def layer(x, i):
        scales = scale if gate.dtype == jnp.int8 else None
        rest = dict(first_group=i * experts, scale=scales)
        h = grouped_matmul(x, gate, sizes, **rest)
        return grouped_matmul(h, down, sizes, **rest), None
    return jax.lax.scan(layer, x, jnp.arange(layers))[0]

layers, experts, size, found = 4, 128, 1024, {}
for dtype in ("bfloat16", "float32", "int8"):
    for rows in (8, 512):
        x = shape((rows, size), "bfloat16" if dtype == "int8" else dtype)
        w = shape((layers * experts, size, size), dtype)
        scale = shape((experts, size), "float32")
        arguments = x, w, w, scale, shape((experts,), "int32")
        memory = jax.jit(step).trace(*arguments).lower().compile().memory_analysis()
        one_layer = experts * size * size * w.dtype.itemsize
        found[f"{dtype} {rows}"] = memory.temp_size_in_bytes, one_layer
x, w = shape((64, size), "bfloat16"), shape((layers * experts, size, 192), "bfloat16")
call = jax.jit(grouped_matmul).trace(x, w, shape((layers * experts,), "int32"))
memory = call.lower().compile().memory_analysis()
found["odd columns"] = memory.temp_size_in_bytes, layers * experts * size * 192 * 2
print(json.dumps(found))
"""


@pytest.mark.slow
def test_compiled_for_tpu_it_copies_no_matrices() -> None:
    reason = targets.missing("tpu")
    if reason is not None:
        pytest.skip(f"no TPU compiler: it {reason}")
    done = subprocess.run(
        [sys.executable, "-c", _COMPILE], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    temporary, matrices = found.pop("odd columns")
    assert temporary > matrices, "XLA copies no more: TPU_LANES is no limit"
    assert len(found) == 6
    for name, (temporary, one_layer) in found.items():
        assert temporary < one_layer / 20, name


def test_contradictions_are_refused() -> None:
    x, w, sizes = jnp.zeros((4, 3)), jnp.zeros((2, 3, 5)), jnp.zeros(2, jnp.int32)
    with pytest.raises(ValueError, match="backend='cpu'"):
        grouped_matmul(x, w, sizes, backend="cpu")
    for wrong in (w[:, :2], w[:1], w[0]):
        with pytest.raises(ValueError, match=r"x \(4, 3\)"):
            grouped_matmul(x, wrong, sizes)
    with pytest.raises(ValueError, match="codes need a scale"):
        grouped_matmul(x, w.astype(jnp.int8), sizes)
    with pytest.raises(ValueError, match="codes need a scale"):
        grouped_matmul(x, w, sizes, scale=jnp.ones((2, 5)))
    with pytest.raises(ValueError, match=r"scale \(2, 3\)"):
        grouped_matmul(x, w.astype(jnp.int8), sizes, scale=jnp.ones((2, 3)))


def test_counted_work() -> None:
    assert traffic.touched_groups(8, 1, 2) == 2
    assert traffic.touched_groups(8, 2, 2) == pytest.approx(2 + 2 * 6 / 8)
    assert traffic.touched_groups(8, 1000, 2) == pytest.approx(8)
    assert traffic.grouped_matmul_flops(6, 3, 5) == 2 * 6 * 3 * 5
    counted = traffic.grouped_matmul_bytes(3, 6, 4, 5, weight_bytes=2, activation_bytes=2)
    assert counted == 3 * 4 * 5 * 2 + 6 * 9 * 2


def test_touched_groups_are_what_random_picks_touch() -> None:
    rng = np.random.default_rng(0)
    touched = [
        len({g for _ in range(5) for g in rng.choice(16, 3, replace=False)}) for _ in range(4000)
    ]
    assert np.mean(touched) == pytest.approx(traffic.touched_groups(16, 5, 3), rel=0.01)
