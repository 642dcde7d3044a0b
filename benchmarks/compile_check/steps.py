"""Whole steps: every model on every slice, decode and prefill, compiled or refused as expected."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from benchmarks.compile_check import models
from jaxserve.config import (
    CacheConfig,
    Config,
    ModelConfig,
    ParallelConfig,
    SchedulerConfig,
    WeightsConfig,
)
from jaxserve.device.chips import parse_slice
from jaxserve.device.step import Program

#: Decoding rows, and tokens of a prefill step.
ROWS, TOKENS = 64, 2048
MAX_CONTEXT = 8192
_SLICES = {
    "v5e": ("v5e:1x1", "v5e:2x2", "v5e:4x4"),
    "v6e": ("v6e:1x1", "v6e:2x2", "v6e:4x4"),
    "tpu7x": ("tpu7x:1x1x1", "tpu7x:2x2x1", "tpu7x:2x2x2"),
    "h100": ("h100:1", "h100:4", "h100:2x8"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """A model and how it is served.

    Attributes:
        checkpoint: its config.json.
        quantization, cache: settings of weights, and cache.dtype.
        chips: that it is for, or slices of them.
    """

    checkpoint: dict[str, Any]
    quantization: str = "none"
    cache: str = "auto"
    chips: tuple[str, ...] = tuple(_SLICES)


_MODELS = {
    "smollm2-135m": Served(checkpoint=models.SMOLLM2),
    "llama-3-8b": Served(checkpoint=models.LLAMA_3_8B),
    "llama-3-8b-int8": Served(checkpoint=models.LLAMA_3_8B, quantization="int8"),
    "llama-3-8b-int8-fp8-cache": Served(
        checkpoint=models.LLAMA_3_8B, quantization="int8", cache="fp8"
    ),
    "llama-3-8b-int4": Served(
        checkpoint=models.LLAMA_3_8B, quantization="int4", chips=("h100:1", "h100:4", "v5e:2x2")
    ),
    "qwen3-30b-a3b": Served(checkpoint=models.QWEN3_30B_A3B),
    "llama-3-70b-int8": Served(checkpoint=models.LLAMA_3_70B, quantization="int8"),
}
#: What does not fit: model and slice, for every step.
TOO_LARGE = {
    ("llama-3-8b", "v5e:1x1"),
    ("qwen3-30b-a3b", "v5e:1x1"),
    ("qwen3-30b-a3b", "v6e:1x1"),
    ("llama-3-70b-int8", "v5e:1x1"),
    ("llama-3-70b-int8", "v5e:2x2"),
    ("llama-3-70b-int8", "v6e:1x1"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRow:
    """One step of one model on one slice.

    Attributes:
        kind: "decode" or "prefill".
        fits: what is expected.
    """

    model: str
    slice: str
    kind: str
    fits: bool

    @property
    def name(self) -> str:
        """Of the row, on the command line and in the table."""
        return f"{self.model}/{self.slice}/{self.kind}"

    @property
    def checkpoint(self) -> dict[str, Any]:
        """The model's config.json."""
        return _MODELS[self.model].checkpoint

    @property
    def is_moe(self) -> bool:
        """Whether its MLPs are mixtures of experts."""
        return "num_experts" in self.checkpoint

    @property
    def program(self) -> Program:
        """The step program."""
        return Program(num_rows=ROWS, num_tokens=ROWS if self.kind == "decode" else TOKENS)

    @property
    def config(self) -> Config:
        """What it would be served with; experts are dealt out as far as they can be."""
        where, served = parse_slice(self.slice), _MODELS[self.model]
        expert = where.num_devices if self.is_moe else 1
        return replace(
            Config(),
            model=ModelConfig(path=self.model, max_context=MAX_CONTEXT),
            weights=WeightsConfig(dtype="bfloat16", quantization=served.quantization),
            cache=CacheConfig(page_size=32, dtype=served.cache),
            parallel=ParallelConfig(expert=expert),
            scheduler=SchedulerConfig(max_rows=ROWS, max_step_tokens=TOKENS),
        )


ROWS_OF_STEPS = tuple(
    StepRow(model=model, slice=slice, kind=kind, fits=(model, slice) not in TOO_LARGE)
    for chip, slices in _SLICES.items()
    for slice in slices
    for model, served in _MODELS.items()
    if {chip, slice} & set(served.chips)
    for kind in ("decode", "prefill")
)
