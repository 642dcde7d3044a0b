"""The Hopper kernel for products with codes: against its reference, and compiled for an H100."""

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
from pallas_kernels.quant_matmul import GROUP, gpu, int4_matmul, int8_matmul, reference
from tests.kernels.test_quant_matmul import error

TOLERANCE = 1e-2


def drawn(kind: str, depth: int, out: tuple[int, ...]) -> tuple[list[Any], np.ndarray]:
    """Random codes with scales of their own size, and the weight that they stand for."""
    rng = np.random.default_rng(secrets.randbits(32))
    if kind == "int8":
        codes = rng.integers(-127, 128, (depth, *out), np.int8)
        scale = rng.uniform(0.1, 1, out).astype(np.float32)
        return [codes, scale], reference.int8_weight(codes, scale)
    codes = rng.integers(0, 16, (depth, *out)).astype(ml_dtypes.uint4)
    groups = (depth // GROUP, *out)
    scale = rng.uniform(0.1, 1, groups).astype(ml_dtypes.bfloat16)
    minimum = rng.uniform(-8, 0, groups).astype(ml_dtypes.bfloat16)
    return [codes, scale, minimum], reference.int4_weight(codes, scale, minimum)


def check(kind: str, num_tokens: int, depth: int, out: tuple[int, ...]) -> None:
    arrays, weight = drawn(kind, depth, out)
    rng = np.random.default_rng(secrets.randbits(32))
    x = jnp.asarray(rng.standard_normal((num_tokens, depth)), jnp.bfloat16)
    multiply = gpu.int8_matmul if kind == "int8" else gpu.int4_matmul
    y = multiply(x, *map(jnp.asarray, arrays), interpret=plgpu.InterpretGPUParams())
    assert y.dtype == jnp.bfloat16 and y.shape == (num_tokens, *out)
    assert error(y, reference.matmul(np.asarray(x), weight)) < TOLERANCE


@pytest.mark.parametrize(
    ("kind", "num_tokens", "depth", "out"),
    [
        ("int8", 1, 128, (128,)),
        ("int8", 13, 640, (2, 128)),
        ("int4", 1, 128, (256,)),
        ("int4", 13, 640, (2, 128)),
    ],
)
def test_matches_reference(kind: str, num_tokens: int, depth: int, out: tuple[int, ...]) -> None:
    check(kind, num_tokens, depth, out)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_many_slots_and_blocks_match_the_reference(kind: str) -> None:
    check(kind, 64, 2048, (3, 256))


def test_splits_fill_the_processors_and_no_more() -> None:
    # Llama-3-8B's gate and up have blocks enough, its output projection has not.
    assert gpu.num_splits(4096, 28672, 8, 1) <= 2
    assert 6 <= gpu.num_splits(4096, 4096, 8, 1) <= 12
    assert gpu.num_splits(4096, 4096, 64, 1) <= gpu.num_splits(4096, 4096, 8, 1)
    assert gpu.num_splits(64, 128, 8, 1) == 1


@pytest.mark.parametrize(
    ("x", "codes", "reason"),
    [
        (jnp.zeros((1, 64)), jnp.zeros((64, 128), jnp.int8), "x is float32"),
        (jnp.zeros((65, 64), "bfloat16"), jnp.zeros((64, 128), jnp.int8), "65 tokens"),
        (jnp.zeros((1, 96), "bfloat16"), jnp.zeros((96, 128), jnp.int8), "K is 96"),
        (jnp.zeros((1, 64), "bfloat16"), jnp.zeros((64, 192), jnp.int8), "192 bytes"),
    ],
)
def test_what_it_cannot_do_is_refused(x: Any, codes: Any, reason: str) -> None:
    with pytest.raises(UnsupportedKernel, match=reason):
        int8_matmul(x, codes, jnp.zeros(codes.shape[1]), backend="gpu")


def test_an_unknown_backend_is_refused() -> None:
    x, codes = jnp.zeros((1, 64)), jnp.zeros((64, 128), jnp.int8)
    with pytest.raises(ValueError, match="backend='tpu': quant_matmul has xla, gpu"):
        int8_matmul(x, codes, jnp.zeros(128), backend="tpu")
    groups = jnp.zeros((2, 128), jnp.bfloat16)
    with pytest.raises(ValueError, match="backend='tpu'"):
        int4_matmul(x, codes.astype(jnp.uint4), groups, groups, backend="tpu")


_COMPILE = """
import json, sys
from benchmarks.compile_check import targets
targets.prepare()
import jax
from functools import partial
from jax.sharding import SingleDeviceSharding
from jaxserve.device.chips import parse_slice
from pallas_kernels.quant_matmul import GROUP, int4_matmul, int8_matmul

device = targets.devices(parse_slice("h100:1"))[0]
place = SingleDeviceSharding(device)
shape = lambda dims, dtype: jax.ShapeDtypeStruct(dims, dtype, sharding=place)
found = {}
for depth, columns in ((4096, 28672), (4096, 4096), (14336, 4096)):
    for tokens in (1, 8, 64):
        x, codes = shape((tokens, depth), "bfloat16"), (depth, columns)
        groups = shape((depth // GROUP, columns), "bfloat16")
        for kind, product, arguments in (
            ("int8", int8_matmul, (shape(codes, "int8"), shape((columns,), "float32"))),
            ("int4", int4_matmul, (shape(codes, "uint4"), groups, groups)),
        ):
            traced = jax.jit(partial(product, backend="gpu")).trace(x, *arguments)
            compiled = traced.lower(lowering_platforms=("cuda",)).compile()
            temporary = compiled.memory_analysis().temp_size_in_bytes
            found[f"{kind} {depth}x{columns} {tokens}"] = temporary, tokens * columns
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
    assert len(found) == 18
    for name, (temporary, results) in found.items():
        splits = 16  # as many float32 sums as these shapes are split into, rows filled up to 8
        assert temporary < 4 * splits * max(results, 8 * 4096) + (1 << 20), name
