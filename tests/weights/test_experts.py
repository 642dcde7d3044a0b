"""Experts are put on their devices part by part: the same arrays, and each part read once.

In a process of its own, since the number of CPU devices is fixed when JAX starts.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

_PROGRAM = """
import json, sys
from collections import Counter
import jax
jax.config.update("jax_num_cpu_devices", 8)
import numpy as np
from jaxserve.config import ParallelConfig
from jaxserve.device.sharding import make_mesh, param_sharding
from jaxserve.models.options import ModelOptions
from jaxserve.weights import checkpoint
from jaxserve.weights.load import load_model
from tests.models.loading import ORACLE

case, data, expert, layers, quantization = sys.argv[1:]
options = ModelOptions(layers=layers, quantization=quantization)
alone = load_model(ORACLE / case, options=options).params()
reads, read = Counter(), checkpoint.HfCheckpoint.read
def counted(self, name):
    reads[name] += ".experts." in name
    return read(self, name)
checkpoint.HfCheckpoint.read = counted
mesh = make_mesh(jax.devices(), ParallelConfig(data=int(data), expert=int(expert)))
place = param_sharding(mesh)
params = load_model(ORACLE / case, options=options, sharding=place).params()
wrong = [str(path) for path, param in params.items() if not (
    np.array_equal(param.get_value(), alone[path].get_value())
    and param.get_value().sharding == place(param.get_metadata("axes"), param.shape)
)]
print(json.dumps({"reads": sorted(set(reads.values()) - {0}), "wrong": wrong, "all": len(params)}))
"""


@pytest.mark.parametrize(
    ("case", "data", "expert", "layers", "quantization", "reads"),
    [
        ("mixtral", 1, 8, "scanned", "none", 1),
        ("mixtral", 2, 4, "unrolled", "int8", 1),
        ("mixtral", 2, 2, "scanned", "int8", 2),  # two devices share each expert's columns
        ("qwen3_moe_mixed", 2, 4, "scanned", "none", 1),  # which do not divide the experts
    ],
)
def test_the_same_arrays(
    case: str, data: int, expert: int, layers: str, quantization: str, reads: int
) -> None:
    arguments = [case, str(data), str(expert), layers, quantization]
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert found["wrong"] == [] and found["all"] > 10
    assert found["reads"] == [reads]
