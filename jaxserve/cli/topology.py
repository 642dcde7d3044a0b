"""`jaxserve doctor --topology v5e:4x4`: a model on chips that are not here.

Computed from shapes and the makers' figures: nothing is compiled, loaded or measured.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxserve.config import Config
from jaxserve.device.chips import Slice
from jaxserve.errors import WeightsError

if TYPE_CHECKING:
    from jaxserve.engine.ahead import Ahead

_MIB, _GIB = 1 << 20, 1 << 30
_CONTEXTS = (2048, 8192, 32_768, 131_072)
_ROWS = (1, 8, 64)
_NAMED = 3


def describe(config: Config, slice: Slice) -> Iterator[tuple[str, str]]:
    """(name, value) of each finding.

    Raises:
        ConfigError: settings that fit neither the chips nor the model, or too little memory.
        WeightsError: the model cannot be read.
    """
    from jaxserve.device.cache import USABLE
    from jaxserve.device.sharding import undivided
    from jaxserve.engine.ahead import ahead_of_time
    from jaxserve.engine.layout import describe_heads

    chip = slice.chip
    yield (
        "chips",
        f"{slice.name}: {slice.num_devices} devices of {chip.memory_bytes / _GIB:.1f} GiB, "
        f"{chip.bandwidth / 1e12:.2f} TB/s and {chip.flops / 1e12:.0f} TFLOP/s each (the maker's)",
    )
    ahead = ahead_of_time(config, _checkpoint(config), slice)
    options = ahead.model.options
    yield "mesh", ", ".join(f"{size} {axis}" for axis, size in ahead.mesh.shape.items())
    yield "attention", options.attention
    if ahead.model.spec.moe is not None:
        yield "experts", options.experts
    yield "layers", f"{ahead.model.spec.num_layers}, {options.layers}"
    heads = describe_heads(ahead.model.spec.attention)
    if heads:
        yield "heads", heads
    whole = undivided(ahead.mesh, ahead.model.params().items())
    if whole:
        more = f" and {len(whole) - _NAMED} more" if len(whole) > _NAMED else ""
        yield "on every device", ", ".join(whole[:_NAMED]) + more
    programs = ahead.buckets.programs
    yield "programs", f"{len(programs)}: {', '.join(program.name for program in programs)}"
    quantization = options.quantization if options.quantization != "none" else options.dtype
    yield "weights", f"{ahead.weights_bytes / _MIB:.0f} MiB a device as {quantization}"
    if config.lora.enabled:
        sizes = (f"{size / _MIB:.0f} MiB of {part}" for part, size in ahead.adapter_bytes.items())
        yield "adapters", f"{','.join(config.lora.classes)}: {', '.join(sizes)} a device"
    num_pages = ahead.num_pages()
    each = f", in each of {_copies(ahead)} copies," if _copies(ahead) > 1 else ""
    page_size, info = config.cache.page_size, ahead.info
    yield (
        "cache",
        f"{num_pages[0] * ahead.page_bytes() / _MIB:.0f} MiB a device as {ahead.cache_dtype} "
        f"as configured; as much as is left{each} would hold:",
    )
    tokens = int(ahead.memory.free_bytes * USABLE) // ahead.page_bytes() * page_size
    contexts = [c for c in _CONTEXTS if c < info.max_context] + [info.max_context]
    largest = {context: tokens // context for context in contexts}
    for context, rows in largest.items():
        yield "", f"{rows} rows of {context} positions"
    context = min(2048, info.max_context)
    yield "at best", f"tokens/s, from bytes and operations alone, at {context} positions:"
    for rows in sorted({*_ROWS, largest[contexts[0]]} - {0}):
        if rows <= largest[contexts[0]]:
            seconds = ahead.step_seconds(rows, context)
            yield "", f"{rows * _copies(ahead) / seconds:.0f} with {rows} rows{each.rstrip(',')}"


def _copies(ahead: Ahead) -> int:
    return ahead.mesh.shape["data"]


def _checkpoint(config: Config) -> Mapping[str, Any]:
    """The model's config.json, which `model.path` may also name by itself."""
    from jaxserve.weights.checkpoint import open_checkpoint
    from jaxserve.weights.sources import resolve

    given = Path(config.model.path)
    if given.suffix != ".json" or not given.is_file():
        return open_checkpoint(resolve(config.model, config.weights), config.model.format).config
    try:
        found = json.loads(given.read_text())
    except ValueError as error:
        raise WeightsError(f"{given} is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise WeightsError(f"{given} holds no JSON object")
    return found
