"""From logical axes to the mesh: the rules, what cannot be dealt out, and shards on two devices."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from jaxserve.config import ParallelConfig
from jaxserve.device.sharding import (
    MESH_AXES,
    make_mesh,
    mesh_shape,
    pages_sharding,
    param_sharding,
    partition,
    replicated,
    undivided,
)
from jaxserve.errors import ConfigError
from jaxserve.models.options import ModelOptions
from jaxserve.models.registry import model_class
from tests.models.loading import CASES, config_of


def abstract(data: int = 1, expert: int = 1, model: int = 1) -> Any:
    """A mesh without devices."""
    return AbstractMesh((data, expert, model), MESH_AXES, axis_types=(AxisType.Auto,) * 3)


TENSOR = ("expert", "model")


def test_partition_follows_the_rules() -> None:
    mesh = abstract(2, 2, 2)
    assert partition(mesh, ("vocab", "embed"), (8, 6)) == PartitionSpec(TENSOR, None)
    assert partition(mesh, ("layers", "embed", "kv_heads", None), (3, 6, 4, 5)) == PartitionSpec(
        None, None, TENSOR, None
    )
    assert partition(mesh, ("experts", "embed", "expert_mlp"), (2, 6, 2)) == PartitionSpec(
        "expert", None, "model"
    )
    assert partition(mesh, (), ()) == PartitionSpec()
    with pytest.raises(KeyError, match="breadth"):
        partition(mesh, ("embed", "breadth"), (1, 1))


def test_an_axis_that_the_devices_do_not_divide_is_whole_on_each_and_listed() -> None:
    mesh = abstract(1, 2, 2)
    assert partition(mesh, ("vocab", "embed"), (6, 6)) == PartitionSpec(None, None)
    params = {
        ("embed", "table"): nnx.Param(np.zeros((6, 4)), axes=("vocab", "embed")),
        ("mlp", "down"): nnx.Param(np.zeros((8, 3)), axes=("mlp", "embed")),
        ("norm", "scale"): nnx.Param(np.zeros(3), axes=("embed",)),
    }
    assert undivided(mesh, params.items()) == ["embed.table (6, 4)"]
    assert undivided(abstract(4), params.items()) == []


@pytest.mark.parametrize("options", [ModelOptions(), ModelOptions(layers="scanned")], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_every_parameter_has_a_rule_and_uses_a_mesh_axis_once(
    case: str, options: ModelOptions
) -> None:
    cls = model_class(config_of(case))
    model = nnx.eval_shape(
        lambda: cls(cls.spec_from_hf(config_of(case)), options, rngs=nnx.Rngs(0))
    )
    for path, param in model.params().items():
        spec = partition(abstract(), param.get_metadata("axes"), param.shape)
        used = [
            name for axis in spec for name in ((axis,) if isinstance(axis, str) else axis or ())
        ]
        assert len(used) == len(set(used)), path
        assert set(used) <= set(MESH_AXES), path


@pytest.mark.parametrize(
    ("data", "expert", "model", "shape"),
    [(1, 1, 0, (1, 1, 8)), (2, 1, 0, (2, 1, 4)), (2, 2, 2, (2, 2, 2)), (8, 1, 1, (8, 1, 1))],
)
def test_the_mesh_takes_all_devices(
    data: int, expert: int, model: int, shape: tuple[int, ...]
) -> None:
    devices: Any = [object()] * 8
    config = ParallelConfig(data=data, expert=expert, model=model)
    assert mesh_shape(len(devices), config) == shape


@pytest.mark.parametrize(("data", "model"), [(3, 0), (1, 4), (16, 1), (2, 8)])
def test_a_mesh_of_another_size_is_refused(data: int, model: int) -> None:
    with pytest.raises(ConfigError, match=rf"parallel\.data={data} .* number of devices, 8"):
        mesh_shape(8, ParallelConfig(data=data, model=model))


def test_a_mesh_of_one_device_holds_everything() -> None:
    mesh = make_mesh(jax.devices()[:1])
    assert dict(mesh.shape) == {"data": 1, "expert": 1, "model": 1}
    table = param_sharding(mesh)(("vocab", "embed"), (5, 3))
    assert replicated(mesh).spec == PartitionSpec()
    for sharding in (table, pages_sharding(mesh)):
        assert sharding.device_set == {jax.devices()[0]}
        assert sharding.is_fully_replicated


_TWO_DEVICES = """
import json, jax
jax.config.update("jax_num_cpu_devices", 2)
from jaxserve.device.cache import init_cache
from jaxserve.device.sharding import make_mesh, param_sharding
from jaxserve.models.options import ModelOptions
from jaxserve.types import CacheGroup
from jaxserve.weights.load import load_model
from tests.models.loading import ORACLE

mesh = make_mesh(jax.devices())
options = ModelOptions(tensor_parallel=2)
model = load_model(ORACLE / "llama3", options=options, sharding=param_sharding(mesh))
shards = lambda x: [list(shard.data.shape) for shard in x.addressable_shards]
found = {"/".join(map(str, p)): shards(v.get_value()) for p, v in model.params().items()}
groups = [CacheGroup(kind="x", layers=(0,), num_kv_heads=n, head_dim=8) for n in (2, 4)]
cache = init_cache(groups, (5, 5), page_size=4, dtype="float32", mesh=mesh, backend="xla")
found["pages"] = [shards(group.kv) for group in cache.groups]
print(json.dumps(found))
"""


def test_shards_on_two_devices() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _TWO_DEVICES], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["embed/table"] == [[160, 64]] * 2
    assert found["layers/0/mlp/gate_up/weight"] == [[64, 2, 56]] * 2
    assert found["layers/0/mlp/down/weight"] == [[56, 64]] * 2
    assert found["layers/0/attention/qkv/weight"] == [[64, 1, 4, 16]] * 2
    assert found["norm/scale"] == [[64]] * 2
    assert found["pages"] == [[[1, 5, 1, 4, 16]] * 2, [[1, 5, 2, 4, 16]] * 2]
