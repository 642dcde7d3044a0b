"""A layer's experts on a mesh: the same as on one device, for one all-reduce and no gathering.

In a process of its own, since the number of CPU devices is fixed when JAX starts.
"""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

_PROGRAM = """
import json, re, sys
import jax
jax.config.update("jax_num_cpu_devices", 8)
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec
from jaxserve.config import ParallelConfig
from jaxserve.device.sharding import make_mesh, param_sharding, per_data_shard, replicated
from jaxserve.models.moe import MixtureMLP
from jaxserve.models.options import ModelOptions
from jaxserve.models.spec import MoeSpec
from tests.models.test_moe import run, spec_of

data, expert, model, num_experts, quantization = sys.argv[1:]
mesh = make_mesh(jax.devices(), ParallelConfig(data=int(data), expert=int(expert)))
moe = MoeSpec(num_experts=int(num_experts), top_k=2, feed_forward=16, norm_topk_prob=True)
make = lambda devices: MixtureMLP(
    spec_of(moe), ModelOptions(tensor_parallel=devices, quantization=quantization), nnx.Rngs(0)
)
x = np.random.default_rng(0).standard_normal((24, 8)).astype(np.float32)
alone = run(make(1), x, 21)

mlp, place = make(8 // int(data)), param_sharding(mesh)
params = [p for _, p in nnx.iter_graph(mlp) if isinstance(p, nnx.Param)]
for param in params:
    param.set_value(jax.device_put(param[...], place(param.get_metadata("axes"), param.shape)))
structure, leaves = jax.tree.structure(mlp), jax.tree.leaves(mlp)

class Inputs:
    stack_index = None

def step(leaves, x, num_live):
    inputs = Inputs()
    inputs.num_live = num_live
    return jax.tree.unflatten(structure, leaves)(x, inputs)

whole = PartitionSpec()
mapped = jax.jit(per_data_shard(mesh, step, (whole, whole, whole), whole))
arguments = leaves, jax.device_put(x, replicated(mesh)), jnp.int32(21)
compiled = mapped.lower(*arguments).compile()
text = compiled.as_text()
kinds = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter")
count = lambda kind: len(re.findall(rf" {kind}(?:-start)?\\(", text))
print(json.dumps({
    "alone": alone.tolist(),
    "mesh": np.asarray(compiled(*arguments)).tolist(),
    "held": [list(p.get_value().addressable_shards[0].data.shape) for p in params],
    "collectives": {kind: count(kind) for kind in kinds if count(kind)},
}))
"""


@pytest.mark.parametrize(
    ("mesh", "num_experts", "held"),
    [
        ((1, 4, 2), 8, [2, 8, 8]),
        ((2, 4, 1), 8, [2, 8, 16]),
        ((1, 8, 1), 16, [2, 8, 16]),
        ((1, 1, 8), 8, [8, 8, 2]),
        ((1, 4, 2), 6, [6, 8, 8]),  # four devices do not share six experts
    ],
    ids=str,
)
@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_own_experts_and_one_sum(
    mesh: tuple[int, int, int], num_experts: int, held: list[int], quantization: str
) -> None:
    arguments = [*map(str, mesh), str(num_experts), quantization]
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    np.testing.assert_allclose(found["mesh"], found["alone"], atol=1e-5, rtol=0)
    assert np.abs(found["alone"]).max() > 0.1 and not np.any(found["alone"][21:])
    assert held in found["held"]
    assert found["collectives"] == {"all-reduce": 1}
