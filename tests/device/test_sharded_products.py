"""Products with 4-bit codes that several devices share: nothing but sums is exchanged."""

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
    "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
}
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from pallas_kernels.quant_matmul import int4_matmul
from pallas_kernels.quant_matmul.api import GROUP

num_tokens, out, along = json.loads(sys.argv[1])
mesh, depth = Mesh(np.array(jax.devices()), ("model",)), 256
place = lambda *axes: NamedSharding(mesh, PartitionSpec(*axes))
axes = [None] * (1 + len(out))
axes[along] = "model"
rng = np.random.default_rng(len(out))
x = jax.device_put(rng.standard_normal((num_tokens, depth), np.float32), place(None, axes[0]))
codes = jax.device_put(rng.integers(0, 16, (depth, *out)).astype("uint4"), place(*axes))
scale, minimum = (
    jax.device_put(rng.standard_normal((depth // GROUP, *out), np.float32), place(*axes))
    for _ in range(2)
)
product = jax.jit(int4_matmul, out_shardings=place(None, *axes[1:]))
compiled = product.lower(x, codes, scale, minimum).compile()
one = [jax.device_put(np.asarray(array), jax.devices()[0]) for array in (x, codes, scale, minimum)]
print(json.dumps({
    "exchanged": re.findall(r" (all-\w+|collective-\w+|reduce-scatter)\(", compiled.as_text()),
    "shared": np.asarray(compiled(x, codes, scale, minimum)).tolist(),
    "alone": np.asarray(int4_matmul(*one)).tolist(),
}))
"""


@pytest.mark.parametrize("num_tokens", [8, 300])
@pytest.mark.parametrize(
    ("out", "along", "exchanged"),
    [
        ((2, 64), 2, []),  # gate and up
        ((4, 3, 16), 1, []),  # queries, keys and values of each KV head
        ((96,), 0, ["all-reduce"]),
    ],
    ids=str,
)
def test_int4(num_tokens: int, out: tuple[int, ...], along: int, exchanged: list[str]) -> None:
    words = json.dumps([num_tokens, out, along])
    done = subprocess.run([sys.executable, "-c", _SHARE, words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found["exchanged"] == exchanged
    np.testing.assert_allclose(found["shared"], found["alone"], rtol=1e-4, atol=1e-3)
