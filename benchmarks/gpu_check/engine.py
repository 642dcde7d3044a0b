"""A whole model behind the real scheduler: Llama-3-8B's shape, bfloat16, random weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.compile_check.models import LLAMA_3_8B
from benchmarks.gpu_check.limits import Limits
from benchmarks.gpu_check.report import Finding
from jaxserve.bench.engine import Case, EngineBench, measure
from jaxserve.config import CacheConfig, Config, ModelConfig, SchedulerConfig
from jaxserve.device.sharding import make_mesh
from jaxserve.engine.hopper import compute_capability
from jaxserve.engine.load import cache_dtype, parts_of
from jaxserve.engine.machine import fitting, model_options
from jaxserve.engine.parts import Parts, Progressing
from jaxserve.models.registry import model_class

_SMALL: dict[str, Any] = {
    **LLAMA_3_8B,
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def measure_engine(limits: Callable[[], Limits], rehearse: bool) -> list[Finding]:
    """Tokens a second, shares of the limits and idle time of decode and prefill."""
    best = limits()  # before the model takes the memory
    checkpoint = _SMALL if rehearse else LLAMA_3_8B
    sizes = (4, 32, 128) if rehearse else (64, 2048, 8192)
    config = dataclasses.replace(
        Config(),
        model=ModelConfig(path="random", served_name="random", max_context=sizes[2]),
        scheduler=SchedulerConfig(max_rows=sizes[0], max_step_tokens=sizes[1]),
    )
    rows, context, prompt = ((1, 4), 16, 64) if rehearse else ((1, 8, 64), 1024, 4096)
    cases = [Case(kind="decode", rows=n, context=context) for n in rows]
    cases.append(Case(kind="prefill", rows=1, context=prompt))
    record = measure(
        config,
        lambda config, progress: _random_parts(config, progress, checkpoint),
        cases,
        steps=8 if rehearse else 64,
        repeats=1 if rehearse else 2,
    )
    findings = []
    for case in record["cases"]:
        if case["kind"] == "prefill":
            share = case["mfu"] * record["matmul_flops_per_s"] / best.matmul
            findings.append(Finding(f"chunked prefill {prompt}: MFU", share, ">=", 0.55))
            continue
        number = case["rows"]
        share = case["mbu"] * record["read_bytes_per_s"] / best.copy
        target = 0.8 if number <= 8 else 0.65
        findings += [
            Finding(f"decode {number}: tokens/s", case["tokens_per_s"]),
            Finding(f"decode {number}: MBU", share, ">=", target),
            Finding(f"decode {number}: device idle", 1 - case["device_busy"], "<", 0.03),
        ]
    return findings


def compare_graphs(rehearse: bool) -> list[Finding]:
    """Greedy tokens of two layers of Llama-3-8B, as one CUDA graph a step and kernel by kernel."""
    checkpoint = _SMALL if rehearse else {**LLAMA_3_8B, "num_hidden_layers": 2}
    rows = 1 if rehearse else 4
    config = dataclasses.replace(
        Config(),
        model=ModelConfig(path="random", served_name="random", max_context=512),
        scheduler=SchedulerConfig(max_rows=rows, max_step_tokens=16 * rows),
        cache=CacheConfig(num_pages=256),
    )
    case = Case(kind="decode", rows=rows, context=100)
    prompts = np.random.default_rng(0).integers(256, 512, (case.rows, case.context)).tolist()
    outputs = []
    for cuda_graphs in (True, False):
        kernels = dataclasses.replace(config.kernels, cuda_graphs=cuda_graphs)
        bench = EngineBench(
            dataclasses.replace(config, kernels=kernels),
            lambda config, progress: _random_parts(config, progress, checkpoint),
        )
        outputs.append(bench.run(case, 16 if rehearse else 64, prompts).outputs)
    unlike = sum(one != other for one, other in zip(*outputs, strict=True))
    return [Finding("tokens with CUDA graphs unlike those without", unlike, "<", 1)]


def _random_parts(config: Config, progress: Progressing, checkpoint: dict[str, Any]) -> Parts:
    """As `engine.load.load_parts`, with weights of noise, made on the device."""
    device = jax.devices()[0]
    mesh = make_mesh([device], config.parallel)
    options = model_options(
        config.weights,
        config.kernels,
        device.platform,
        mesh,
        capability=compute_capability(device),
    )
    kind = model_class(checkpoint)
    spec = kind.spec_from_hf(checkpoint)
    if options.attention != "xla":
        dtype = cache_dtype(config.cache, options)
        options = fitting(options, config.kernels, spec.attention.head_dim, dtype)
    if options.packed:  # panels are made when weights are loaded
        options = dataclasses.replace(options, matmul="xla")
    model = nnx.eval_shape(lambda: kind(spec, options, rngs=nnx.Rngs(0)))
    for number, param in enumerate(model.params().values()):
        param.set_value(_noise(jax.random.key(number), param.shape, param.dtype))
    return parts_of(config, model, mesh, progress)


@partial(jax.jit, static_argnums=(1, 2))
def _noise(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Compiled once for all layers."""
    return jax.random.normal(key, shape, dtype) * jnp.asarray(0.02, dtype)
