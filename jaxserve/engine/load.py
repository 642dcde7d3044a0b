"""Loads and compiles what a configuration asks for: the parts that an engine is built from."""

from __future__ import annotations

import dataclasses
import logging
import sys
from dataclasses import replace
from pathlib import Path

import jax
from jax.sharding import Mesh

from jaxserve.config import CacheConfig, Config
from jaxserve.device.buckets import Buckets
from jaxserve.device.cache import (
    host_pool_sizes,
    init_cache,
    pages_per_sequence,
    pool_sizes,
)
from jaxserve.device.chips import device_info
from jaxserve.device.clock import DeviceClock
from jaxserve.device.compiles import compile_counter, use_persistent_cache
from jaxserve.device.executor import Executor
from jaxserve.device.hosts import Hosts
from jaxserve.device.layouts import param_layout
from jaxserve.device.meeting import connect
from jaxserve.device.memory import Memory, host_memory, least_memory
from jaxserve.device.sharding import make_mesh, param_sharding
from jaxserve.device.state import DeviceState, hidden_states, init_device_state
from jaxserve.engine.attribution import FLOPS_PER_BYTE, WorkRates
from jaxserve.engine.batches import Batches
from jaxserve.engine.hopper import compute_capability, with_experts_kernel
from jaxserve.engine.layout import log_layout
from jaxserve.engine.load_embedding import load_embedding
from jaxserve.engine.lora import adapter_base, make_slots, request_adapters, with_lora_kernel
from jaxserve.engine.machine import devices, fitting, model_options
from jaxserve.engine.parts import Parts, Progressing
from jaxserve.errors import ConfigError, JaxserveError
from jaxserve.models.decoder import Decoder
from jaxserve.models.options import ModelOptions
from jaxserve.models.registry import model_class
from jaxserve.models.spec import ModelSpec
from jaxserve.types import ModelInfo
from jaxserve.weights.checkpoint import open_checkpoint
from jaxserve.weights.load import load_model
from jaxserve.weights.sources import resolve, served_name
from pallas_kernels.kv_update import page_multiple

logger = logging.getLogger(__name__)


def load_parts(config: Config, progress: Progressing) -> Parts:
    """Loads the model and compiles its programs, on all hosts that share it.

    Raises:
        ConfigError: a setting that does not fit this machine or the model.
        WeightsError: the model is missing, broken or not supported.
        HostLost: the other hosts did not come. One that is lost later ends the process.
    """
    hosts = connect(config.parallel, must_agree(config))
    if hosts is None:
        return _load_parts(config, progress, None)
    try:
        return _load_parts(config, progress, hosts)
    except JaxserveError as error:
        hosts.close(error.message)
        raise
    except Exception as error:
        hosts.close(f"{type(error).__name__}: {error}")
        raise


def must_agree(config: Config) -> dict[str, object]:
    """The settings that all hosts must have alike: what programs are compiled depends on them."""
    agreed: dict[str, object] = {
        "model.max_context": config.model.max_context,
        "engine.batch_invariant": config.engine.batch_invariant,
        "jax": jax.__version__,
    }
    own = ("cache_dir", "hosts", "host", "coordinator", "connect_timeout_s", "adapters", "root")
    for name in ("weights", "cache", "scheduler", "kernels", "parallel", "lora"):
        for key, value in dataclasses.asdict(getattr(config, name)).items():
            if key not in own:
                # As it crosses the road between hosts, which knows no tuples.
                agreed[f"{name}.{key}"] = list(value) if isinstance(value, tuple) else value
    return agreed


def _load_parts(config: Config, progress: Progressing, hosts: Hosts | None) -> Parts:
    use_persistent_cache(config.engine.compile_cache_dir)
    compile_counter()
    mesh = make_mesh(devices(), config.parallel)
    device = mesh.devices.flat[0]
    platform, capability = device.platform, compute_capability(device)
    path = resolve(config.model, config.weights, progress)
    spec = _spec(path, config.model.format)
    options = model_options(
        config.weights,
        config.kernels,
        platform,
        mesh,
        capability,
        mixture=spec.moe is not None,
    )
    if options.attention != "xla":
        dtype, head_dim = cache_dtype(config.cache, options), spec.attention.head_dim
        options = fitting(options, config.kernels, head_dim, dtype)
    options = with_experts_kernel(
        options, config.kernels, spec, platform, capability, mesh.shape["model"]
    )
    options = with_lora_kernel(options, config, spec, mesh)
    model = load_model(
        path,
        format=config.model.format,
        options=options,
        sharding=param_sharding(mesh),
        layout=lambda axes: param_layout(axes, platform),
        progress=progress,
    )
    return parts_of(config, model, mesh, progress, hosts)


def parts_of(
    config: Config,
    model: Decoder,
    mesh: Mesh,
    progress: Progressing,
    hosts: Hosts | None = None,
) -> Parts:
    """An engine's parts around a model that is on its devices: compiles its programs.

    Raises:
        ConfigError: the cache does not fit beside it.
    """
    log_layout(model, mesh)
    info, clock = model_info(config, model), DeviceClock()
    # These come first: the cache gets what is left.
    embedding = load_embedding(config, model, mesh, clock, progress)
    slots = make_slots(config.lora, model, mesh, lambda: _memory(config.cache, mesh))
    num_pages = size_cache(config, model.options, info, _memory(config.cache, mesh))
    if hosts is not None:  # as many as the host with the least memory has
        pools = zip(*hosts.gather("pages", num_pages), strict=True)
        num_pages = tuple(min(pages) for pages in pools)
    buckets = buckets_for(config, model.options, mesh.devices.flat[0].platform)
    host_pages = _host_pages(config, model, info, num_pages, mesh.shape["data"])
    state = _state(config, model, info, num_pages, mesh, buckets)
    page_size, adapters = config.cache.page_size, request_adapters(config.lora, slots)
    executor = Executor(
        *(model, state, buckets.programs, page_size, mesh, hosts, host_pages),
        clock=clock,
        adapters=slots,
        cuda_graphs=config.kernels.cuda_graphs,
    )
    if embedding is not None:  # first: what is compiled after the executor's warm-up is counted
        embedding.embedder.warm_up(progress, config.engine.compile_threads)
    executor.warm_up(progress, config.engine.compile_threads)
    return Parts(
        model=info,
        copies=mesh.shape["data"],
        batch=Batches(buckets, config.scheduler.max_rows, mesh.shape["data"], adapters.arrays),
        executor=executor,
        page_size=page_size,
        adapter_slots=tuple(own.num_slots for own in slots.classes) if slots else (),
        adapters=adapters,
        num_pages=num_pages,
        host_pages=host_pages,
        hosts=hosts,
        follow=executor.follow if config.parallel.host else None,
        embedding=embedding,
        work=_work_rates(model, mesh.devices.flat[0].platform),
        device=device_info(mesh.devices.flat[0].device_kind, mesh.devices.size),
    )


def _work_rates(model: Decoder, platform: str) -> WorkRates:
    windows = [kind.window for kind in model.spec.layers]
    return WorkRates.measured(model.count_work, FLOPS_PER_BYTE[platform], windows)


def _spec(path: Path, format: str) -> ModelSpec:
    checkpoint = open_checkpoint(path, format)
    return model_class(checkpoint.config).spec_from_hf(checkpoint.config)


def _memory(cache: CacheConfig, mesh: Mesh) -> Memory:
    """A device's; without bounds where it does not tell but the pool's size is set."""
    try:
        return least_memory(mesh.local_devices)
    except ConfigError as error:
        if not (cache.num_pages or cache.memory_bytes):
            raise
        logger.warning("whether the pool fits is not known: %s", error.message)
        return Memory(total_bytes=sys.maxsize, free_bytes=sys.maxsize)


def model_info(config: Config, model: Decoder) -> ModelInfo:
    """What the front end and the scheduler need to know.

    Raises:
        ConfigError: model.max_context is more than the model was made for.
    """
    limit = model.spec.max_context
    max_context = config.model.max_context or limit
    if max_context > limit:
        raise ConfigError(
            f"model.max_context is {max_context}, but the model was made for {limit} positions"
        )
    return ModelInfo(
        name=served_name(config.model),
        max_context=max_context,
        vocab_size=model.spec.vocab_size,
        eos_token_ids=model.spec.eos_token_ids,
        cache_groups=model.cache_groups(),
        adapters=adapter_base(config.lora, model),
    )


def size_cache(
    config: Config, options: ModelOptions, info: ModelInfo, memory: Memory
) -> tuple[int, ...]:
    """Pages of each cache group's pool.

    Args:
        memory: of one device, with the weights in it.

    Raises:
        ConfigError: they do not fit, or the kernel does not take pages of such a size.
    """
    dtype, page_size = cache_dtype(config.cache, options), config.cache.page_size
    multiple = page_multiple(dtype, options.attention)
    if page_size % multiple:
        raise ConfigError(
            f"cache.page_size={page_size}: kernels.attention={options.attention} takes pages of "
            f"{dtype} whose positions are a multiple of {multiple}: set cache.page_size={multiple}"
        )
    parts = options.tensor_parallel
    return pool_sizes(
        [replace(group, num_kv_heads=group.num_kv_heads // parts) for group in info.cache_groups],
        config.cache,
        config.scheduler,
        max_context=info.max_context,
        dtype=dtype,
        memory=memory,
        backend=options.attention,
    )


def _host_pages(
    config: Config, model: Decoder, info: ModelInfo, num_pages: tuple[int, ...], copies: int
) -> tuple[int, ...]:
    """Pages of each cache group in the host's memory, for each copy of the model."""
    try:
        free_bytes = host_memory().free_bytes
    except ConfigError as error:
        logger.warning("how much memory the host has is not known: %s", error.message)
        free_bytes = None
    sizes = host_pool_sizes(
        info.cache_groups,
        config.cache,
        num_pages,
        dtype=cache_dtype(config.cache, model.options),
        copies=copies,
        free_bytes=free_bytes,
        several_hosts=config.parallel.hosts > 1,
        backend=model.options.attention,
    )
    logger.info("pages in the host's memory: %s", sizes if any(sizes) else "none")
    return sizes


def cache_dtype(cache: CacheConfig, options: ModelOptions) -> str:
    """Dtype of the pages."""
    return {"auto": options.activations, "fp8": "float8_e4m3fn"}.get(cache.dtype, cache.dtype)


def buckets_for(config: Config, options: ModelOptions, platform: str) -> Buckets:
    """The step programs: fewer where a padding row costs next to nothing.

    The native matmul skips dead rows, and an accelerator reads the weights for one row as for
    many; XLA's matmuls on the CPU compute every row. For a GPU XLA drops an axis of one row, and
    makes three kernels of a norm, not one, and two of a write to the cache.
    """
    row_growth = 2 if platform == "cpu" and not options.packed else 4
    return Buckets(
        config.scheduler,
        row_growth,
        2 if platform == "gpu" else 1,
        batch_invariant=config.engine.batch_invariant,
        adapters=config.lora.enabled,
    )


def _state(
    config: Config,
    model: Decoder,
    info: ModelInfo,
    num_pages: tuple[int, ...],
    mesh: Mesh,
    buckets: Buckets,
) -> DeviceState:
    dtype, page_size = cache_dtype(config.cache, model.options), config.cache.page_size
    logger.info("KV cache: %s pages of %d tokens, %s", num_pages, page_size, dtype)
    cache = init_cache(
        info.cache_groups,
        num_pages,
        page_size=page_size,
        dtype=dtype,
        mesh=mesh,
        backend=model.options.attention,
    )
    return init_device_state(
        cache,
        max_rows=config.scheduler.max_rows,
        vocab_size=info.vocab_size,
        pages_per_sequence=pages_per_sequence(info.max_context, page_size),
        hidden=hidden_states(buckets.programs, model.spec.hidden_size, model.options.activations),
        mesh=mesh,
    )
