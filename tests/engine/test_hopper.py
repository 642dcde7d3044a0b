"""Which product of experts a configuration gets."""

from __future__ import annotations

import dataclasses

import pytest

from jaxserve.config import KernelsConfig
from jaxserve.engine.hopper import no_hopper, with_experts_kernel
from jaxserve.errors import ConfigError
from jaxserve.models.options import ModelOptions
from jaxserve.models.spec import MoeSpec
from tests.models.loading import load_tiny

OPTIONS = ModelOptions(dtype="bfloat16", attention="gpu")
ASKED = KernelsConfig(experts="gpu")
MOE = MoeSpec(num_experts=8, top_k=2, feed_forward=256, norm_topk_prob=True)


ON_GPU = ("gpu", "9.0")


def test_the_kernel_is_taken_where_it_runs() -> None:
    spec = dataclasses.replace(load_tiny("llama3", ModelOptions()).spec, hidden_size=512)
    assert with_experts_kernel(OPTIONS, ASKED, spec, *ON_GPU) == OPTIONS, "a dense model has none"
    spec = dataclasses.replace(spec, moe=MOE)
    assert with_experts_kernel(OPTIONS, KernelsConfig(), spec, *ON_GPU).experts == "gpu"
    asked_off = KernelsConfig(experts="xla")
    assert with_experts_kernel(OPTIONS, asked_off, spec, *ON_GPU).experts == "xla"
    assert with_experts_kernel(OPTIONS, ASKED, spec, *ON_GPU).experts == "gpu"
    assert with_experts_kernel(OPTIONS, ASKED, spec, *ON_GPU, 2).experts == "gpu"
    codes = dataclasses.replace(OPTIONS, quantization="int8")
    for options, parts, said in (
        (codes, 1, "it reads no codes, and weights.quantization is int8"),
        (ModelOptions(), 1, "not float32"),
        (OPTIONS, 4, "512 x 64"),
    ):
        with pytest.raises(ConfigError, match=f"kernels.experts=gpu cannot run here: .*{said}"):
            with_experts_kernel(options, ASKED, spec, *ON_GPU, parts)
        assert with_experts_kernel(options, KernelsConfig(), spec, *ON_GPU, parts) == options
    with pytest.raises(ConfigError, match="the platform is tpu; kernels.experts=xla runs every"):
        with_experts_kernel(OPTIONS, ASKED, spec, "tpu", None)


def test_where_hopper_kernels_run() -> None:
    assert no_hopper("gpu", "9.0") is None
    assert no_hopper("cpu", None) == "the platform is cpu"
    reason = no_hopper("gpu", "10.0")
    assert reason is not None and "not 10.0" in reason
