"""The Hopper kernel for 4-bit codes: against its reference, and compiled for an H100."""

from __future__ import annotations

import json
import secrets
import subprocess
import sys
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from benchmarks.compile_check import targets
from pallas_kernels import UnsupportedKernel
from pallas_kernels.quant_matmul import GROUP, gpu, int4_matmul, reference
from tests.kernels.test_quant_matmul import error

TOLERANCE = 1e-2


def drawn(depth: int, out: tuple[int, ...]) -> tuple[list[Any], np.ndarray]:
    """Random codes with scales of their own size, and the weight that they stand for."""
    rng = np.random.default_rng(secrets.randbits(32))
    codes = rng.integers(0, 16, (depth, *out)).astype(ml_dtypes.uint4)
    groups = (depth // GROUP, *out)
    scale = rng.uniform(0.1, 1, groups).astype(ml_dtypes.bfloat16)
    minimum = rng.uniform(-8, 0, groups).astype(ml_dtypes.bfloat16)
    return [codes, scale, minimum], reference.int4_weight(codes, scale, minimum)


def multiplied(x: Any, arrays: list[Any]) -> Any:
    return gpu.int4_matmul(x, *map(jnp.asarray, arrays), interpret=plgpu.InterpretGPUParams())


def check(num_tokens: int, depth: int, out: tuple[int, ...]) -> None:
    arrays, weight = drawn(depth, out)
    rng = np.random.default_rng(secrets.randbits(32))
    x = jnp.asarray(rng.standard_normal((num_tokens, depth)), jnp.bfloat16)
    y = multiplied(x, arrays)
    assert y.dtype == jnp.bfloat16 and y.shape == (num_tokens, *out)
    assert error(y, reference.matmul(np.asarray(x), weight)) < TOLERANCE


@pytest.mark.parametrize(
    ("num_tokens", "depth", "out"), [(1, 128, (256,)), (13, 640, (2, 128)), (8, 64, (3, 256))]
)
def test_matches_reference(num_tokens: int, depth: int, out: tuple[int, ...]) -> None:
    check(num_tokens, depth, out)


@pytest.mark.slow
def test_many_slots_and_blocks_match_the_reference() -> None:
    check(64, 2048, (3, 256))


def test_a_weight_is_rounded_by_a_thirtieth_of_what_its_code_rounds_away() -> None:
    # A matrix of ones on the diagonal gives the weights themselves.
    rng = np.random.default_rng(secrets.randbits(32))
    codes = rng.integers(0, 16, (64, 256)).astype(ml_dtypes.uint4)
    scale = rng.uniform(0.1, 1, (2, 256)).astype(ml_dtypes.bfloat16)
    middle = rng.uniform(-1, 1, (2, 256)) * scale.astype(np.float64)
    minimum = (middle - 7.5 * scale.astype(np.float64)).astype(ml_dtypes.bfloat16)
    exact = reference.int4_weight(codes, scale, minimum)
    weights = np.asarray(multiplied(jnp.eye(64, dtype=jnp.bfloat16), [codes, scale, minimum]))
    steps = np.repeat(scale.astype(np.float64), GROUP, 0)
    rounded = np.sqrt(np.mean(((weights.astype(np.float64) - exact) / steps) ** 2))
    assert 0 < rounded < 1 / np.sqrt(12) / 30


def test_splits_fill_the_processors_and_no_more() -> None:
    # Llama-3-8B's gate and up have blocks enough, its output projection has not.
    assert gpu.num_splits(4096, 28672, 8) <= 2
    assert 6 <= gpu.num_splits(4096, 4096, 8) <= 12
    assert gpu.num_splits(4096, 4096, 64) <= gpu.num_splits(4096, 4096, 8)
    assert gpu.num_splits(64, 256, 8) == 1


@pytest.mark.parametrize(
    ("x", "columns", "reason"),
    [
        (jnp.zeros((1, 64)), 256, "x is float32"),
        (jnp.zeros((65, 64), "bfloat16"), 256, "65 tokens"),
        (jnp.zeros((1, 96), "bfloat16"), 256, "K is 96"),
        (jnp.zeros((1, 64), "bfloat16"), 384, "N is 384"),
    ],
)
def test_what_it_cannot_do_is_refused(x: Any, columns: int, reason: str) -> None:
    codes = jnp.zeros((x.shape[1], columns), jnp.uint4)
    groups = jnp.zeros((x.shape[1] // GROUP, columns), jnp.bfloat16)
    with pytest.raises(UnsupportedKernel, match=reason):
        int4_matmul(x, codes, groups, groups, backend="gpu")


def test_scales_of_another_dtype_are_refused() -> None:
    codes, groups = jnp.zeros((64, 256), jnp.uint4), jnp.zeros((2, 256))
    x = jnp.zeros((1, 64), jnp.bfloat16)
    with pytest.raises(UnsupportedKernel, match="scales are float32 and minima bfloat16"):
        int4_matmul(x, codes, groups, groups.astype(jnp.bfloat16), backend="gpu")


def test_an_unknown_backend_is_refused() -> None:
    codes, groups = jnp.zeros((64, 128), jnp.uint4), jnp.zeros((2, 128), jnp.bfloat16)
    with pytest.raises(ValueError, match="backend='tpu': int4_matmul has xla, gpu"):
        int4_matmul(jnp.zeros((1, 64)), codes, groups, groups, backend="tpu")


_COMPILE = """
import json
from benchmarks.compile_check import targets
targets.prepare()
import jax
from functools import partial
from jax.sharding import SingleDeviceSharding
from jaxserve.device.chips import parse_slice
from pallas_kernels.quant_matmul import GROUP, int4_matmul

device = targets.devices(parse_slice("h100:1"))[0]
place = SingleDeviceSharding(device)
shape = lambda dims, dtype: jax.ShapeDtypeStruct(dims, dtype, sharding=place)
found = {}
for depth, columns in ((4096, 28672), (4096, 4096), (14336, 4096)):
    for tokens in (1, 8, 64):
        x, codes = shape((tokens, depth), "bfloat16"), shape((depth, columns), "uint4")
        groups = shape((depth // GROUP, columns), "bfloat16")
        traced = jax.jit(partial(int4_matmul, backend="gpu")).trace(x, codes, groups, groups)
        compiled = traced.lower(lowering_platforms=("cuda",)).compile()
        temporary = compiled.memory_analysis().temp_size_in_bytes
        found[f"{depth}x{columns} {tokens}"] = temporary, tokens * columns
print(json.dumps(found))
"""


@pytest.mark.slow
def test_compiled_for_a_hopper_gpu_it_copies_no_codes() -> None:
    reason = targets.missing("gpu")
    if reason is not None:
        pytest.skip(reason)
    done = subprocess.run([sys.executable, "-c", _COMPILE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == 9
    for name, (temporary, results) in found.items():
        splits = 16  # as many float32 sums as these shapes are split into, rows filled up to 8
        assert temporary < 4 * splits * max(results, 8 * 4096) + (1 << 20), name
