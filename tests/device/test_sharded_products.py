"""Products with 4-bit codes that several devices share: each takes its part, sums are exchanged."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

_SHARE = r"""
import json, os, re, sys
os.environ |= {
    "JAX_PLATFORMS": "cpu",
    # That pass fails on the CPU with sums that a shard_map asks for.
    "XLA_FLAGS": "--xla_force_host_platform_device_count=4 "
    "--xla_disable_hlo_passes=all-reduce-promotion",
}
from dataclasses import replace
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxserve.device.sharding import make_mesh, param_sharding, replicated
from jaxserve.models.linear import Linear
from jaxserve.models.options import ModelOptions
from pallas_kernels.quant_matmul import gpu, xla

num_tokens, out, axes = json.loads(sys.argv[1])
taken = []

def kernel(x, *arrays):
    taken.append([*x.shape, *arrays[0].shape[1:]])
    return xla.int4_matmul(x, *arrays, jax.lax.Precision.DEFAULT)

gpu.int4_matmul = kernel
options = ModelOptions(dtype="bfloat16", quantization="int4", matmul="gpu")
build = lambda options: Linear(256, tuple(out), options, axes=tuple(axes), rngs=nnx.Rngs(0))
alone, shared = build(replace(options, matmul="xla")), build(replace(options, tensor_parallel=4))
mesh = make_mesh(jax.devices())
place = param_sharding(mesh)
for param in jax.tree.leaves(
    nnx.state(shared, nnx.Param), is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)
):
    target = place(tuple(param.get_metadata("axes")), param.shape)
    param.set_value(jax.device_put(param.get_value(), target))
structure, params = nnx.split(shared)
x = jax.random.normal(jax.random.key(1), (num_tokens, 256), jnp.bfloat16)
with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    product = jax.jit(lambda params, x: nnx.merge(structure, params)(x))
    compiled = product.lower(params, jax.device_put(x, replicated(mesh))).compile()
print(json.dumps({
    "taken": taken,
    "exchanged": re.findall(r" (all-\w+|collective-\w+|reduce-scatter)\(", compiled.as_text()),
    "shared": np.asarray(compiled(params, jax.device_put(x, replicated(mesh))), float).tolist(),
    "alone": np.asarray(alone(x), float).tolist(),
}))
"""


@pytest.mark.parametrize("num_tokens", [8, 300])
@pytest.mark.parametrize(
    ("out", "axes", "part", "exchanged"),
    [
        ((2, 1024), ("embed", None, "mlp"), [256, 2, 256], []),
        ((4, 2, 128), ("embed", "kv_heads", None, None), [256, 1, 2, 128], []),
        ((256,), ("mlp", "embed"), [64, 256], ["all-reduce"]),
        ((2, 129), ("embed", None, "mlp"), None, []),  # four do not divide it
    ],
    ids=["gate and up", "heads", "down", "undivided"],
)
def test_int4(
    num_tokens: int,
    out: tuple[int, ...],
    axes: tuple[str | None, ...],
    part: list[int] | None,
    exchanged: list[str],
) -> None:
    words = json.dumps([num_tokens, out, axes])
    done = subprocess.run([sys.executable, "-c", _SHARE, words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    is_kernels = num_tokens == 8 and part is not None
    assert found["taken"] == ([[num_tokens, *part]] if is_kernels else [])
    assert found["exchanged"] == exchanged
    np.testing.assert_allclose(found["shared"], found["alone"], rtol=0.02, atol=0.02)
