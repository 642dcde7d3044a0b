"""What an engine with LoRA adapters is built from: its slots, and how an adapter gets ready."""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from pathlib import Path

from jax.sharding import Mesh

from jaxserve.config import Config, LoraConfig
from jaxserve.device.adapters import AdapterSlots, RankClass
from jaxserve.engine.adapters import RequestAdapters
from jaxserve.engine.hopper import compute_capability, no_hopper
from jaxserve.errors import ConfigError, InvalidAdapter
from jaxserve.formats.peft import adapter_digest, read_adapter
from jaxserve.lora.host import HostAdapters, Ready
from jaxserve.models.adapters import AdapterLayout
from jaxserve.models.decoder import Decoder
from jaxserve.models.options import ModelOptions
from jaxserve.models.spec import ModelSpec
from jaxserve.types import AdapterBase
from pallas_kernels import native

logger = logging.getLogger(__name__)

#: Sizes that the TPU kernel takes are multiples of this.
LANES = 128
#: Ranks of classes are multiples of this, for the kernels.
RANK_MULTIPLE = 4
MAX_SLOTS = 1024

_CLASS = re.compile(r"([0-9]{1,5})x([0-9]{1,5})")


def rank_classes(config: LoraConfig) -> tuple[RankClass, ...]:
    """The classes of slots, ranks ascending; none where adapters are off.

    Raises:
        ConfigError: `lora.classes` is malformed.
    """
    if not config.enabled:
        return ()
    classes = []
    for text in config.classes:
        found = _CLASS.fullmatch(text.strip())
        if found is None:
            raise ConfigError(f"lora.classes takes RANKxSLOTS, such as 16x8, got {text!r}")
        rank, num_slots = int(found[1]), int(found[2])
        if rank % RANK_MULTIPLE or not rank or not 1 <= num_slots <= MAX_SLOTS:
            raise ConfigError(
                f"lora.classes: {text!r} must have a rank that is a multiple of {RANK_MULTIPLE}, "
                f"and 1 to {MAX_SLOTS} slots"
            )
        classes.append(RankClass(rank=rank, num_slots=num_slots))
    if not classes or len({own.rank for own in classes}) != len(classes):
        raise ConfigError("lora.classes must have at least one class, each of another rank")
    return tuple(sorted(classes, key=lambda own: own.rank))


def with_lora_kernel(
    options: ModelOptions, config: Config, spec: ModelSpec, mesh: Mesh
) -> ModelOptions:
    """The options with the kernel for adapters that runs here, logged; as they are without any.

    Args:
        spec: as the checkpoint has it.

    Raises:
        ConfigError: one was asked for that cannot run.
    """
    if not config.lora.enabled:
        return options
    asked, platform = config.kernels.lora, mesh.devices.flat[0].platform
    reasons = {"cpu": _no_native(options, platform, mesh), "tpu": _no_mosaic(options, config, spec)}
    # No figure says yet that this one wins: it is taken where it is asked for.
    reasons["gpu"] = "it is not asked for"
    if asked == "gpu":
        capability = compute_capability(mesh.devices.flat[0])
        reasons["gpu"] = no_hopper(platform, capability) or _no_hopper(options, config, spec)
    for kernel in ("cpu", "tpu"):
        if platform != kernel:
            reasons[kernel] = f"the platform is {platform}"
    if reasons.get(asked) is not None:
        raise ConfigError(f"kernels.lora={asked} cannot run here: {reasons[asked]}")
    runs = [kernel for kernel, reason in reasons.items() if reason is None]
    chosen = asked if asked != "auto" else (runs or ["xla"])[0]
    told = "; ".join(f"{kernel}: {reason}" for kernel, reason in reasons.items() if reason)
    logger.info("kernels.lora: %s%s", chosen, f" ({told})" if chosen == "xla" else "")
    return replace(options, lora=chosen)


def _no_native(options: ModelOptions, platform: str, mesh: Mesh) -> str | None:
    if mesh.size > 1:
        return "it runs on one device"
    if options.activations != "float32":
        return f"it takes float32 activations, not {options.activations}"
    return native.load().reason if platform == "cpu" else None


def _no_mosaic(options: ModelOptions, config: Config, spec: ModelSpec) -> str | None:
    parts, sizes = options.tensor_parallel, spec.spread(options.tensor_parallel).attention
    heads = sizes.held_heads * sizes.head_dim // parts
    keys = 2 * sizes.held_kv_heads * sizes.head_dim // parts
    found = [spec.hidden_size, heads, heads + keys, _part(spec.feed_forward, parts)]
    if config.lora.vocabulary:
        found.append(_part(spec.vocab_size, parts))
    odd = [str(size) for size in found if size % LANES]
    return f"a device has sizes of {', '.join(odd)}, no multiples of {LANES}" if odd else None


def _no_hopper(options: ModelOptions, config: Config, spec: ModelSpec) -> str | None:
    from pallas_kernels.lora_matmul.gpu import unsupported  # Pallas takes a quarter of a second

    parts, sizes = options.tensor_parallel, spec.spread(options.tensor_parallel).attention
    heads = sizes.held_heads * sizes.head_dim // parts
    wide = _part(spec.feed_forward, parts)
    vocabulary = [_part(spec.vocab_size, parts)] if config.lora.vocabulary else []
    return unsupported(
        depths=(spec.hidden_size, heads, wide),
        widths=(sizes.head_dim, spec.hidden_size, wide, *vocabulary),
        ranks=[own.rank for own in rank_classes(config.lora)],
        dtype=options.activations,
    )


def _part(size: int, parts: int) -> int:
    """Of an axis on one device, which is whole where the devices do not divide it."""
    return size if size % parts else size // parts


def make_slots(config: LoraConfig, model: Decoder, mesh: Mesh) -> AdapterSlots | None:
    """Empty slots on the devices; None where adapters are off."""
    classes = rank_classes(config)
    if not classes:
        return None
    return AdapterSlots(AdapterLayout(model, vocabulary=config.vocabulary), classes, mesh)


def adapter_base(config: LoraConfig, model: Decoder) -> AdapterBase | None:
    """What the front end holds an adapter against; None where adapters are off."""
    classes = rank_classes(config)
    if not classes:
        return None
    layout = AdapterLayout(model, vocabulary=config.vocabulary)
    modules = {
        re.sub(r"\.layers\.\d+\.", ".layers.*.", name): sizes
        for name, sizes in layout.targets.items()
    }
    return AdapterBase(
        modules=modules,
        num_layers=model.spec.num_layers,
        table=layout.embedding,
        max_rank=classes[-1].rank,
    )


def request_adapters(config: LoraConfig, slots: AdapterSlots | None) -> RequestAdapters:
    """Those of live requests, and the host's memory behind them."""
    if slots is None:
        return RequestAdapters()
    layout, classes = slots.layout, slots.classes

    def load(key: str, path: Path) -> Ready:
        adapter = read_adapter(path, max_rank=classes[-1].rank)
        if adapter_digest(path) != key:
            raise InvalidAdapter(f"{path} does not hold the adapter {key}: load it again")
        index = next(i for i, own in enumerate(classes) if own.rank >= adapter.rank)
        arrays = layout.arrays(adapter, classes[index].rank)
        num_bytes = sum(array.nbytes for pair in arrays.values() for array in pair)
        return Ready(rank_class=index, arrays=arrays, num_bytes=num_bytes)

    largest = layout.num_bytes(classes[-1].rank)
    return RequestAdapters(HostAdapters(load, largest_bytes=largest, max_bytes=config.host_bytes))
