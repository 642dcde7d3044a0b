"""Where kernels for NVIDIA Hopper run, and whether a model has those for int4 and for experts.

Kernels are imported only where they may be taken: Pallas takes a quarter of a second.
"""

from __future__ import annotations

import logging
from dataclasses import replace

import jax

from jaxserve.config import KernelsConfig
from jaxserve.errors import ConfigError
from jaxserve.models.options import ModelOptions
from jaxserve.models.spec import ModelSpec

logger = logging.getLogger(__name__)

#: Compute capability of H100, H200 and their kin.
_HOPPER = "9.0"


def compute_capability(device: jax.Device) -> str | None:  # pyright: ignore[reportInvalidTypeForm]
    """An NVIDIA GPU's, such as "9.0"; None for anything else."""
    return getattr(device, "compute_capability", None)


def no_hopper(platform: str, capability: str | None) -> str | None:
    """Why no Hopper kernel runs on a device; None where they do."""
    if platform != "gpu":
        return f"the platform is {platform}"
    if capability != _HOPPER:
        return f"it is made for NVIDIA Hopper, compute capability {_HOPPER}, not {capability}"
    return None


def no_matmul_kernel(
    platform: str, capability: str | None, quantization: str, dtype: str
) -> str | None:
    """Why the kernel for int4 codes does not take a model's weights; None where it does.

    Args:
        platform, capability: as of `engine.machine.model_options`.
        dtype: of what the weights are multiplied by.
    """
    reason = no_hopper(platform, capability)
    if reason is None and quantization != "int4":
        reason = f"it reads int4 codes, and weights.quantization is {quantization}"
    if reason is None and dtype != "bfloat16":
        reason = f"it multiplies bfloat16, not {dtype}"
    return reason


def with_experts_kernel(
    options: ModelOptions,
    kernels: KernelsConfig,
    spec: ModelSpec,
    platform: str,
    capability: str | None,
    parts: int = 1,
) -> ModelOptions:
    """The options with the product of experts that was asked for, or the best that runs, logged.

    Args:
        platform, capability: as of `engine.machine.model_options`.
        parts: that the experts' columns are dealt to: size of the mesh's axis "model".

    Raises:
        ConfigError: the kernel was asked for and cannot run.
    """
    if spec.moe is None:
        return options
    reason = None
    if kernels.experts != "xla":
        reason = no_hopper(platform, capability)
        reason = reason or no_experts_kernel(options, spec, parts)
    if kernels.experts == "gpu" and reason is not None:
        raise ConfigError(
            f"kernels.experts=gpu cannot run here: {reason}; kernels.experts=xla runs everywhere"
        )
    if kernels.experts == "xla" or reason is not None:
        logger.info("kernels.experts: xla%s", f" (gpu: {reason})" if reason else "")
        return options
    logger.info("kernels.experts: gpu")
    return replace(options, experts="gpu")


def no_experts_kernel(options: ModelOptions, spec: ModelSpec, parts: int) -> str | None:
    """Why the kernel does not take a model's experts; None where it does.

    Args:
        parts: that their columns are dealt to; they are whole where it does not divide them.
    """
    from pallas_kernels.grouped_matmul.gpu import unsupported

    assert spec.moe is not None
    if options.quantization != "none":
        return f"it reads no codes, and weights.quantization is {options.quantization}"
    wide = spec.moe.feed_forward
    wide = wide if wide % parts else wide // parts
    into = unsupported(depth=spec.hidden_size, num_columns=wide, dtype=options.dtype)
    return into or unsupported(depth=wide, num_columns=spec.hidden_size, dtype=options.dtype)
