"""What an engine with LoRA adapters is built from: its slots, and how an adapter gets ready."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import jax
from jax.sharding import AbstractMesh, Mesh

from jaxserve.config import Config, LoraConfig
from jaxserve.device.adapters import AdapterSlots, RankClass, bytes_by_part
from jaxserve.device.memory import Memory
from jaxserve.engine.adapters import RequestAdapters
from jaxserve.engine.hopper import compute_capability, no_hopper
from jaxserve.errors import ConfigError, InvalidAdapter
from jaxserve.formats.peft import adapter_digest, read_adapter, read_ranks
from jaxserve.lora.host import HostAdapters, Ready
from jaxserve.models.adapters import AdapterLayout
from jaxserve.models.decoder import Decoder
from jaxserve.models.options import ModelOptions
from jaxserve.models.spec import ModelSpec
from jaxserve.types import AdapterBase
from jaxserve.weights.huge_pages import use_huge_pages
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
    reasons = {
        "cpu": _no_native(options, platform, mesh),
        "tpu": _no_mosaic(options, config, spec, mesh),
    }
    reasons["gpu"] = no_hopper(platform, compute_capability(mesh.devices.flat[0]))
    reasons["gpu"] = reasons["gpu"] or _no_hopper(options, config, spec, mesh)
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


def _no_mosaic(options: ModelOptions, config: Config, spec: ModelSpec, mesh: Mesh) -> str | None:
    parts, sizes = options.tensor_parallel, spec.spread(options.tensor_parallel).attention
    heads = sizes.held_heads * sizes.head_dim // parts
    keys = 2 * sizes.held_kv_heads * sizes.head_dim // parts
    found = [spec.hidden_size, heads, heads + keys, *_mlp_widths(config, spec, parts, mesh)]
    if config.lora.vocabulary:
        found.append(_part(spec.vocab_size, parts))
    odd = [str(size) for size in found if size % LANES]
    return f"a device has sizes of {', '.join(odd)}, no multiples of {LANES}" if odd else None


def _no_hopper(options: ModelOptions, config: Config, spec: ModelSpec, mesh: Mesh) -> str | None:
    from pallas_kernels.lora_matmul.gpu import unsupported  # Pallas takes a quarter of a second

    parts, sizes = options.tensor_parallel, spec.spread(options.tensor_parallel).attention
    heads = sizes.held_heads * sizes.head_dim // parts
    wide = _mlp_widths(config, spec, parts, mesh)
    vocabulary = [_part(spec.vocab_size, parts)] if config.lora.vocabulary else []
    return unsupported(
        depths=(spec.hidden_size, heads, *wide),
        widths=(sizes.head_dim, spec.hidden_size, *wide, *vocabulary),
        ranks=[own.rank for own in rank_classes(config.lora)],
        dtype=options.activations,
    )


def _mlp_widths(config: Config, spec: ModelSpec, parts: int, mesh: Mesh) -> list[int]:
    """F on one device, of layers without experts and of experts that take deltas."""
    dense = not all(kind.sparse for kind in spec.layers)
    widths = [_part(spec.feed_forward, parts)] if dense else []
    if spec.moe is not None and config.lora.experts:
        widths.append(_part(spec.moe.feed_forward, mesh.shape["model"]))
    return widths


def _part(size: int, parts: int) -> int:
    """Of an axis on one device, which is whole where the devices do not divide it."""
    return size if size % parts else size // parts


def adapter_layout(config: LoraConfig, model: Decoder) -> AdapterLayout:
    """The sites of a model that take deltas.

    Raises:
        ConfigError: its experts are to take some, and it has none.
    """
    if config.experts and model.spec.moe is None:
        raise ConfigError(
            f"lora.experts=true: {model.spec.architecture} has no experts; leave it out"
        )
    return AdapterLayout(model, vocabulary=config.vocabulary, experts=config.experts)


def slot_bytes(config: LoraConfig, model: Decoder, mesh: Mesh | AbstractMesh) -> dict[str, int]:
    """What slots take of a device, by their parts; empty where adapters are off.

    Args:
        model: may be abstract.
    """
    classes = rank_classes(config)
    return bytes_by_part(adapter_layout(config, model), classes, mesh) if classes else {}


def check_slots(config: LoraConfig, by_part: Mapping[str, int], memory: Memory) -> None:
    """Refuses slots for which there is no room.

    Args:
        by_part: bytes of a device, as `slot_bytes` has them.
        memory: of a device, with the weights in it.

    Raises:
        ConfigError: there is none.
    """
    need = sum(by_part.values())
    if need > memory.free_bytes:
        experts = by_part.get("experts", 0)
        raise ConfigError(
            f"the slots of lora.classes={','.join(config.classes)} need {need >> 20} MiB of a "
            + (f"device, {experts >> 20} of them for experts, " if experts else "device, ")
            + f"and {memory.free_bytes >> 20} are free: set fewer slots or smaller ranks"
        )


def make_slots(
    config: LoraConfig, model: Decoder, mesh: Mesh, memory: Callable[[], Memory]
) -> AdapterSlots | None:
    """Empty slots on the devices; None where adapters are off.

    Args:
        memory: of a device, with the weights in it.

    Raises:
        ConfigError: there is no room for them.
    """
    classes = rank_classes(config)
    if not classes:
        return None
    by_part = slot_bytes(config, model, mesh)
    check_slots(config, by_part, memory())
    sizes = ", ".join(f"{size >> 20} MiB of {part}" for part, size in by_part.items())
    logger.info("slots of adapters, %s: %s a device", ",".join(config.classes), sizes)
    slots = AdapterSlots(adapter_layout(config, model), classes, mesh)
    if mesh.devices.flat[0].platform == "cpu":
        use_huge_pages(jax.block_until_ready(jax.tree.leaves(slots.arrays)))
    return slots


def adapter_base(config: LoraConfig, model: Decoder) -> AdapterBase | None:
    """What the front end holds an adapter against; None where adapters are off."""
    classes = rank_classes(config)
    if not classes:
        return None
    layout, moe = adapter_layout(config, model), model.spec.moe
    return AdapterBase(
        modules=_starred(layout.targets, model.spec.num_layers),
        num_layers=model.spec.num_layers,
        num_experts=moe.num_experts if moe is not None else 0,
        table=layout.embedding,
        max_rank=classes[-1].rank,
        settings=layout.settings,
    )


def _starred(targets: Mapping[str, tuple[int, int]], num_layers: int) -> dict[str, tuple[int, int]]:
    """Modules as `AdapterBase` has them: one for all layers, where every layer has it."""
    of_layers: dict[str, dict[str, tuple[int, int]]] = {}
    for name, sizes in targets.items():
        own = re.sub(r"\.experts\.\d+\.", ".experts.*.", name)
        of_layers.setdefault(re.sub(r"\.layers\.\d+\.", ".layers.*.", own), {})[own] = sizes
    found = {}
    for starred, own in of_layers.items():
        found |= {starred: next(iter(own.values()))} if len(own) == num_layers else own
    return found


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

    def measure(path: Path) -> int:
        ranks = read_ranks(path)
        rank = next((own.rank for own in classes if own.rank >= max(ranks.values())), 0)
        return layout.num_bytes(rank, layout.parts_of(ranks))

    largest = layout.num_bytes(classes[-1].rank)
    host = HostAdapters(load, measure, largest_bytes=largest, max_bytes=config.host_bytes)
    return RequestAdapters(host)
