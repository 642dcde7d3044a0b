"""A layer's experts on a mesh: the same as on one device, for one all-reduce and no gathering.

With adapters likewise: each device adds the deltas of its own experts, or of its own columns.

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
from jax.sharding import NamedSharding, PartitionSpec
from jaxserve.config import ParallelConfig
from jaxserve.device.adapters import CLASS_SPEC
from jaxserve.device.sharding import (
    make_mesh, param_sharding, partition, per_data_shard, replicated,
)
from jaxserve.models.deltas import SlotClass, StepDeltas
from jaxserve.models.moe import MixtureMLP
from jaxserve.models.options import ModelOptions
from jaxserve.models.spec import MoeSpec
from pallas_kernels.lora_matmul import LoraWeights
from tests.models.test_moe import run, spec_of

data, expert, model, num_experts, quantization, adapters = sys.argv[1:]
mesh = make_mesh(jax.devices(), ParallelConfig(data=int(data), expert=int(expert)))
moe = MoeSpec(num_experts=int(num_experts), top_k=2, feed_forward=16, norm_topk_prob=True)
make = lambda devices: MixtureMLP(
    spec_of(moe), ModelOptions(tensor_parallel=devices, quantization=quantization), nnx.Rngs(0)
)
x = np.random.default_rng(0).standard_normal((24, 8)).astype(np.float32)
rng = np.random.default_rng(1)
into = ("layers", "experts", None, "embed"), ("layers", "experts", None, "expert_mlp")
sites = {  # as models.adapters has them, of one layer: K, N, axes of a and b
    "router": (8, moe.num_experts, ("layers", None, "embed"), ("layers", None, None)),
    "expert_gate": (8, 16, *into),
    "expert_up": (8, 16, *into),
    "expert_down": (16, 8, *reversed(into)),
}

def slots_of(rank, num_slots, copies=0):
    def draw(axes, *shape):
        lead = (1, moe.num_experts) if "experts" in axes else (1,)
        rng = np.random.default_rng([rank, *shape])
        array = rng.normal(size=(1, num_slots, *lead[1:], *shape)).astype(np.float32) / 3
        if not copies:
            return jnp.asarray(array)
        spec = partition(mesh, axes, (*lead, *shape))
        place = NamedSharding(mesh, PartitionSpec(spec[0], "data", *spec[1:]))
        return jax.device_put(np.concatenate([array] * copies, axis=1), place)

    has = jnp.tile(jnp.arange(num_slots) != 1, max(copies, 1))[None]  # slot 1 has none of experts
    return SlotClass(
        sites={
            name: LoraWeights(a=draw(of_a, rank, depth), b=draw(of_b, rank, wide))
            for name, (depth, wide, of_a, of_b) in sites.items()
        },
        has_embed=has, has_head=has, has_experts=has,
    )

CLASSES = ((4, 3), (8, 2)) if adapters == "adapters" else ()
slots = jnp.asarray(rng.integers(-1, 5, 24), jnp.int32)
used = StepDeltas.of([slots_of(*own) for own in CLASSES], slots) if CLASSES else None
alone, plain = run(make(1), x, 21, used), run(make(1), x, 21)

mlp, place = make(8 // int(data)), param_sharding(mesh)
params = [p for _, p in nnx.iter_graph(mlp) if isinstance(p, nnx.Param)]
for param in params:
    param.set_value(jax.device_put(param[...], place(param.get_metadata("axes"), param.shape)))
structure, leaves = jax.tree.structure(mlp), jax.tree.leaves(mlp)

class Inputs:
    stack_index = deltas = None

def step(leaves, x, num_live, classes):
    inputs = Inputs()
    inputs.num_live = num_live
    if classes:
        inputs.deltas = StepDeltas.of(classes, slots)
    return jax.tree.unflatten(structure, leaves)(x, inputs)

whole = PartitionSpec()
mapped = jax.jit(per_data_shard(mesh, step, (whole, whole, whole, CLASS_SPEC), whole))
classes = [slots_of(*own, int(data)) for own in CLASSES]
arguments = leaves, jax.device_put(x, replicated(mesh)), jnp.int32(21), classes
compiled = mapped.lower(*arguments).compile()
text = compiled.as_text()
kinds = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter")
count = lambda kind: len(re.findall(rf" {kind}(?:-start)?\\(", text))
print(json.dumps({
    "alone": alone.tolist(),
    "added": float(np.abs(alone - plain).max()),
    "mesh": np.asarray(compiled(*arguments)).tolist(),
    "held": [list(p.get_value().addressable_shards[0].data.shape) for p in params],
    "collectives": {kind: count(kind) for kind in kinds if count(kind)},
}))
"""


#: Mesh, experts, and what a device holds of gate and up.
MESHES = [
    ((1, 4, 2), 8, [2, 8, 8]),
    ((2, 4, 1), 8, [2, 8, 16]),
    ((1, 8, 1), 16, [2, 8, 16]),
    ((1, 1, 8), 8, [8, 8, 2]),
    ((1, 4, 2), 6, [6, 8, 8]),  # four devices do not share six experts
]
on_meshes = pytest.mark.parametrize(("mesh", "num_experts", "held"), MESHES, ids=str)


@on_meshes
@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_own_experts_and_one_sum(
    mesh: tuple[int, int, int], num_experts: int, held: list[int], quantization: str
) -> None:
    assert check(mesh, num_experts, held, quantization) == 0


@pytest.mark.in_turn
@on_meshes
def test_deltas_of_own_experts_and_the_same_sum(
    mesh: tuple[int, int, int], num_experts: int, held: list[int]
) -> None:
    assert check(mesh, num_experts, held, adapters=True) > 0.1


def check(
    mesh: tuple[int, int, int],
    num_experts: int,
    held: list[int],
    quantization: str = "none",
    adapters: bool = False,
) -> float:
    """The same on a mesh and on one device; returns what adapters changed there at most."""
    kind = "adapters" if adapters else "plain"
    arguments = [*map(str, mesh), str(num_experts), quantization, kind]
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    np.testing.assert_allclose(found["mesh"], found["alone"], atol=1e-5, rtol=0)
    assert np.abs(found["alone"]).max() > 0.1 and not np.any(found["alone"][21:])
    assert held in found["held"]
    assert found["collectives"] == {"all-reduce": 1}
    return found["added"]
