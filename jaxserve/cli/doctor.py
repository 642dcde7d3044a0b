"""`jaxserve doctor`: what this machine is, what would be compiled, and what would fit.

Each part stands by itself: one that fails is told in a sentence, the others go on, and the exit
status is 1.
"""

from __future__ import annotations

import math
import os
import platform
import sys
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from itertools import starmap
from typing import TYPE_CHECKING

from jaxserve.cli.topology import describe
from jaxserve.config import Config
from jaxserve.device.chips import Slice
from jaxserve.errors import JaxserveError

if TYPE_CHECKING:
    from jaxserve.models.options import ModelOptions

_MIB = 1 << 20


def examine(config: Config, slice: Slice | None = None) -> int:
    """Writes the findings to stdout; returns the exit status.

    Args:
        slice: chips that are not here, to look at instead of this machine's.
    """
    status = 0
    parts: dict[str, Callable[[Config], Iterator[tuple[str, str]]]] = {
        "machine": _machine,
        "device": _device,
        "kernels": _kernels,
        "programs": _programs,
        "model": _model,
    }
    if config.embeddings.model:
        parts["embeddings"] = _embeddings
    if slice is not None:
        parts = {"topology": partial(describe, slice=slice)}
    for title, part in parts.items():
        sys.stdout.write(f"{title}\n")
        try:
            for name, value in part(config):
                sys.stdout.write(f"  {name:<18} {value}\n")
        except JaxserveError as error:
            status = 1
            sys.stdout.write(f"  problem: {error.message}\n")
        sys.stdout.flush()
    return status


def _machine(config: Config) -> Iterator[tuple[str, str]]:
    yield "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    yield "processor", f"{_processor()}, {os.cpu_count()} cores"
    yield "packages", ", ".join(starmap("{} {}".format, _versions(("jax", "jaxlib", "flax"))))


def _device(config: Config) -> Iterator[tuple[str, str]]:
    from jaxserve.device.memory import memory_of
    from jaxserve.engine.machine import devices

    for device in devices():
        yield str(device), f"{device.platform}, {device.device_kind}"
    memory = memory_of(devices()[0])
    yield "memory", f"{memory.free_bytes // _MIB} of {memory.total_bytes // _MIB} MiB free"


def _kernels(config: Config) -> Iterator[tuple[str, str]]:
    from pallas_kernels import native

    found = native.load()
    yield "native (CPU)", str(found.library) if found.library else f"none: {found.reason}"
    options = _options(config)
    yield "attention", options.attention
    yield "matmul", options.matmul
    yield "layers", options.layers
    yield "weights", _weights(options)


def _programs(config: Config) -> Iterator[tuple[str, str]]:
    from jaxserve.device.buckets import MAX_PROGRAMS
    from jaxserve.engine.load import buckets_for
    from jaxserve.engine.machine import devices

    programs = buckets_for(config, _options(config), devices()[0].platform).programs
    for program in programs:
        yield (
            f"{program.num_rows} rows",
            f"{program.num_tokens} tokens, {program.decode_steps} decode step"
            f"{'s' if program.decode_steps > 1 else ''}"
            f"{', prompt log-probabilities' if program.prompt_logprobs else ''}"
            f"{', with adapters' if program.adapters else ''}",
        )
    heads = config.lora.vocabulary
    samplings = sorted({p.sampling(heads=heads) for p in programs if p.decode_steps == 1})
    names = ", ".join(sampling.name for sampling in samplings)
    yield "with grammars", f"{len(samplings)} small ones more, that sample by masks: {names}"
    axes = {
        "rows": {program.num_rows for program in programs},
        "tokens": {program.num_tokens for program in programs},
        "decode steps": {program.decode_steps for program in programs},
        "prompt_logprobs": {program.prompt_logprobs for program in programs},
    }
    if config.lora.enabled:
        axes["adapters"] = {program.adapters for program in programs}
    product = " × ".join(f"{len(values)} {name}" for name, values in axes.items())
    whole = math.prod(map(len, axes.values()))
    most = MAX_PROGRAMS * (1 + config.lora.enabled)
    yield "compiled", f"{len(programs)} of at most {most} step programs (the full product,"
    yield "", f"{product}, would be {whole})"
    yield "beside them", "those with grammars, and small ones that change what is on the device"


def _model(config: Config) -> Iterator[tuple[str, str]]:
    import jax
    from flax import nnx
    from jax.sharding import AbstractMesh

    from jaxserve.device.cache import bytes_of_page
    from jaxserve.device.memory import memory_of
    from jaxserve.device.sharding import MESH_AXES
    from jaxserve.engine.hopper import compute_capability, with_experts_kernel
    from jaxserve.engine.load import cache_dtype, model_info, size_cache
    from jaxserve.engine.lora import check_slots, slot_bytes
    from jaxserve.engine.machine import devices, fitting
    from jaxserve.models.registry import model_class
    from jaxserve.text.template import load_chat_template
    from jaxserve.text.tokenizer import load_tokenizer
    from jaxserve.weights.checkpoint import open_checkpoint
    from jaxserve.weights.sources import resolve
    from pallas_kernels.paged_attention.api import unsupported

    path = resolve(config.model, config.weights)
    yield "path", str(path)
    checkpoint = open_checkpoint(path, config.model.format)
    kind = model_class(checkpoint.config)
    spec = kind.spec_from_hf(checkpoint.config)
    device = devices()[0]
    options = _options(config, mixture=spec.moe is not None)
    dtype = cache_dtype(config.cache, options)
    if options.attention != "xla":
        asked = options.attention
        options = fitting(options, config.kernels, spec.attention.head_dim, dtype)
        if options.attention != asked:
            reason = unsupported(asked, head_dim=spec.attention.head_dim, dtype=dtype)
            yield "attention", f"{options.attention} ({asked}: {reason})"
    if spec.moe is not None:
        capability = compute_capability(device)
        options = with_experts_kernel(options, config.kernels, spec, device.platform, capability)
        yield "experts", options.experts
    model = nnx.eval_shape(lambda: kind(spec, options, rngs=nnx.Rngs(0)))
    leaves = jax.tree.leaves(nnx.state(model))
    num_bytes = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)
    yield "architecture", f"{spec.architecture}, {spec.num_layers} layers"
    yield "weights", f"{num_bytes // _MIB} MiB as {_weights(options)}"
    info = model_info(config, model)
    memory = memory_of(device).less(num_bytes)
    slots = slot_bytes(config.lora, model, AbstractMesh((1,) * len(MESH_AXES), MESH_AXES))
    if slots:
        sizes = (f"{size // _MIB} MiB of {part}" for part, size in slots.items())
        yield "adapters", f"{','.join(config.lora.classes)}: {', '.join(sizes)}"
        check_slots(config.lora, slots, memory)
    pools = size_cache(config, options, info, memory.less(sum(slots.values())))
    page_size = config.cache.page_size
    for group, pages in zip(info.cache_groups, pools, strict=True):
        size = pages * bytes_of_page(group, page_size, dtype, options.attention)
        window = f" (window {group.window})" if group.window else ""
        yield (
            f"cache, {group.kind}{window}",
            f"{pages} pages of {page_size} tokens, {size // _MIB} MiB as {dtype}: "
            f"{(pages - 1) * page_size / info.max_context:.1f} sequences of {info.max_context} "
            "tokens",
        )
    tokenizer = load_tokenizer(path, config.model.tokenizer)
    template = load_chat_template(path, config.model.chat_template)
    yield "tokenizer", f"{tokenizer.vocab_size} tokens, ends at {list(tokenizer.eos_token_ids)}"
    yield "chat template", "yes" if template else "none"


def _embeddings(config: Config) -> Iterator[tuple[str, str]]:
    from pathlib import Path

    from jaxserve.engine.load_embedding import buckets_of, encoder_options
    from jaxserve.engine.machine import devices
    from jaxserve.models.bert import encoder_spec
    from jaxserve.weights.checkpoint import open_checkpoint
    from jaxserve.weights.sources import SERVED, resolve_encoder

    settings = resolve_encoder(config)
    yield "model", settings.model
    if settings.model == SERVED:
        return
    checkpoint = open_checkpoint(Path(settings.model))
    spec = encoder_spec(checkpoint.config, checkpoint.names())
    options = encoder_options(config, devices()[0].platform, spec.head_dim)
    yield "architecture", f"{spec.architecture}, {spec.num_layers} layers"
    yield "kernels", f"matmul {options.matmul}, attention {options.attention}"
    programs = buckets_of(config, spec, options).programs
    yield "compiled", f"{len(programs)}: {', '.join(program.name for program in programs)}"


def _options(config: Config, *, mixture: bool = False) -> ModelOptions:
    """What "auto" means on this machine's first device.

    Args:
        mixture: whether the model is one of experts.
    """
    from jaxserve.engine.hopper import compute_capability
    from jaxserve.engine.machine import devices, model_options

    device = devices()[0]
    capability = compute_capability(device)
    return model_options(
        config.weights,
        config.kernels,
        device.platform,
        capability=capability,
        mixture=mixture,
    )


def _weights(options: ModelOptions) -> str:
    return options.dtype if options.quantization == "none" else options.quantization


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            names = (line.partition(":")[2].strip() for line in lines if "model name" in line)
            return next(names, platform.machine())
    except OSError:
        return platform.processor() or platform.machine()


def _versions(names: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    for name in names:
        try:
            yield name, version(name)
        except PackageNotFoundError:
            yield name, "missing"
