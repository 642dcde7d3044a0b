"""From logical axes to the mesh: the rules, what cannot be dealt out, and shards on two devices."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import jax
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from jaxserve.device.sharding import (
    MESH_AXES,
    RULES,
    make_mesh,
    pages_sharding,
    param_sharding,
    partition,
    replicated,
)
from jaxserve.models.options import ModelOptions
from jaxserve.models.registry import model_class
from jaxserve.types import CacheGroup
from tests.models.loading import CASES, config_of


def group(num_kv_heads: int) -> CacheGroup:
    """A cache group."""
    return CacheGroup(kind="full", layers=(0,), num_kv_heads=num_kv_heads, head_dim=8)


def test_partition_follows_the_rules() -> None:
    assert partition(("vocab", "embed")) == PartitionSpec("model", None)
    assert partition(("layers", "embed", "kv_heads", None)) == PartitionSpec(
        None, None, "model", None
    )
    assert partition(("heads", "mlp")) == PartitionSpec("model", "model")
    assert partition(()) == PartitionSpec()
    with pytest.raises(KeyError, match="expert"):
        partition(("embed", "expert"))


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
        spec = partition(param.get_metadata("axes"))
        used = [axis for axis in spec if axis is not None]
        assert len(used) == len(set(used)), path
        assert set(used) <= set(MESH_AXES), path


def test_rules_name_axes_of_the_mesh() -> None:
    assert {axis for axis in RULES.values() if axis} <= set(MESH_AXES)


def test_a_mesh_of_one_device_holds_everything() -> None:
    mesh = make_mesh(jax.devices()[:1])
    assert dict(mesh.shape) == {"data": 1, "model": 1}
    assert param_sharding(mesh)(("vocab", "embed")).spec == PartitionSpec("model", None)
    assert replicated(mesh).spec == PartitionSpec()
    for sharding in (param_sharding(mesh)(("vocab", "embed")), pages_sharding(mesh, group(3))):
        assert sharding.device_set == {jax.devices()[0]}
        assert sharding.is_fully_replicated


@pytest.mark.parametrize(
    ("heads", "devices", "dealt"), [(8, 4, True), (4, 4, True), (6, 4, False), (2, 4, False)]
)
def test_pages_are_dealt_out_by_heads_where_that_is_even(
    heads: int, devices: int, dealt: bool
) -> None:
    types = (AxisType.Auto,) * 2
    mesh: Any = AbstractMesh((1, devices), MESH_AXES, axis_types=types)
    expected = PartitionSpec(None, None, "model" if dealt else None, None, None)
    assert pages_sharding(mesh, group(heads)).spec == expected


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
options = ModelOptions()
model = load_model(ORACLE / "llama3", options=options, sharding=param_sharding(mesh))
shards = lambda x: [list(shard.data.shape) for shard in x.addressable_shards]
found = {"/".join(map(str, p)): shards(v.get_value()) for p, v in model.params().items()}
groups = [CacheGroup(kind="x", layers=(0,), num_kv_heads=n, head_dim=8) for n in (2, 3)]
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
    assert found["pages"] == [[[1, 5, 1, 4, 16]] * 2, [[1, 5, 3, 4, 16]] * 2]
