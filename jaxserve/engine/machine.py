"""What this machine runs: its devices, and what "auto" means on them."""

from __future__ import annotations

import glob
import logging
from dataclasses import replace

import jax
from jax.sharding import AbstractMesh, Mesh

from jaxserve.config import KernelsConfig, WeightsConfig
from jaxserve.device.sharding import tensor_parallel
from jaxserve.engine.hopper import no_hopper, no_matmul_kernel
from jaxserve.errors import ConfigError
from jaxserve.models.moe import NO_PACKED_EXPERTS
from jaxserve.models.options import PACKED_DTYPES, ModelOptions
from pallas_kernels import native
from pallas_kernels.paged_attention import unsupported

logger = logging.getLogger(__name__)

_ACCELERATORS = ("/dev/accel*", "/dev/vfio/[0-9]*", "/dev/nvidia[0-9]*")


def devices() -> list[jax.Device]:  # pyright: ignore[reportInvalidTypeForm]
    """JAX's devices.

    Raises:
        ConfigError: JAX cannot use the platform it was told to use; or an accelerator is in this
            machine, but JAX does not use it and nobody asked for the CPU.
    """
    try:
        found = jax.devices()
    except RuntimeError as error:
        raise ConfigError(f"JAX finds no device: {error}; see JAX_PLATFORMS") from error
    present = [path for pattern in _ACCELERATORS for path in glob.glob(pattern)]
    if found[0].platform == "cpu" and present and not jax.config.jax_platforms:
        raise ConfigError(
            f"this machine has an accelerator ({present[0]}), but JAX runs on the CPU: install "
            "the matching extra (scripts/setup does), or set JAX_PLATFORMS=cpu to use the CPU"
        )
    return found


def model_options(
    weights: WeightsConfig,
    kernels: KernelsConfig,
    platform: str,
    mesh: Mesh | AbstractMesh | None = None,
    capability: str | None = None,
    *,
    mixture: bool = False,
) -> ModelOptions:
    """What "auto" means on this platform, logged.

    Args:
        mesh: that the model will be on; one device where None.
        capability: of a GPU, see `engine.hopper.compute_capability`.
        mixture: whether the model is a mixture of experts.

    Raises:
        ConfigError: kernels were asked for that cannot run here.
    """
    dtype = weights.dtype
    if dtype == "auto":
        dtype = "float32" if platform == "cpu" else "bfloat16"
    elsewhere = f"the platform is {platform}"
    no_native = native.load().reason if platform == "cpu" else elsewhere
    num_devices = 1 if mesh is None else mesh.size
    if num_devices > 1:
        no_native = no_native or "it runs on one device"
    readable = weights.quantization != "none" or dtype in PACKED_DTYPES
    no_packing = None if readable else f"it does not read {dtype} weights"
    if weights.quantization == "fp8":
        no_packing = "it does not read fp8 weights"
    no_packing = NO_PACKED_EXPERTS if mixture else no_packing

    no_mosaic = None if platform == "tpu" else elsewhere
    kinds = {"cpu": no_native, "tpu": no_mosaic, "gpu": no_hopper(platform, capability)}
    attention = _choose("attention", kernels.attention, kinds)
    no_codes = no_matmul_kernel(platform, capability, weights.quantization, dtype)
    kinds = {"cpu": no_native or no_packing, "gpu": no_codes}
    matmul = _choose("matmul", kernels.matmul, kinds)
    layers = kernels.layers
    if layers == "auto":  # but for a TPU XLA copies each layer's weights out of the stack
        layers = "scanned" if platform == "tpu" or matmul == "cpu" else "unrolled"
    return ModelOptions(
        dtype=dtype,
        quantization=weights.quantization,
        attention=attention,
        matmul=matmul,
        layers=layers,
        tensor_parallel=1 if mesh is None else tensor_parallel(mesh),
    )


def _choose(name: str, asked: str, own: dict[str, str | None]) -> str:
    """One of `own`, the implementations beside XLA with the reason why each cannot run."""
    reason = own.get(asked)
    if reason is not None:
        raise ConfigError(f"kernels.{name}={asked} cannot run here: {reason}")
    runs = [kernel for kernel, reason in own.items() if reason is None]
    chosen = asked if asked != "auto" else (runs or ["xla"])[0]
    reasons = "; ".join(f"{kernel}: {reason}" for kernel, reason in own.items() if reason)
    logger.info("kernels.%s: %s%s", name, chosen, f" ({reasons})" if chosen == "xla" else "")
    return chosen


def fitting(
    options: ModelOptions, kernels: KernelsConfig, head_dim: int, dtype: str
) -> ModelOptions:
    """The options, with XLA's attention where the kernel does not take such heads or pages.

    Raises:
        ConfigError: just that was asked for.
    """
    reason = unsupported(options.attention, head_dim=head_dim, dtype=dtype)
    if reason is None:
        return options
    if kernels.attention == options.attention:
        raise ConfigError(f"kernels.attention={options.attention} cannot run this model: {reason}")
    logger.info("kernels.attention: xla (%s)", reason)
    return replace(options, attention="xla")
