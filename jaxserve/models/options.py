"""How a model is computed, apart from what it computes: chosen from the configuration at start-up.

Read by every layer; nothing in here changes results beyond rounding.
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxserve.errors import ConfigError
from jaxserve.models.quantize import QUANTIZATIONS

DTYPES = ("float32", "bfloat16", "float16")
ATTENTION = ("xla", "cpu", "tpu", "gpu")
MATMUL = ("xla", "cpu", "gpu")
LAYERS = ("unrolled", "scanned")
LORA = ("xla", "cpu", "tpu", "gpu")
EXPERTS = ("xla", "gpu")
#: What the native matmul reads.
PACKED_DTYPES = ("float32", "float16")


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Dtype and backends of one loaded model.

    Attributes:
        dtype: weights are held in it: "float32", "bfloat16" or "float16". Norm scales and biases
            are float32 always.
        quantization: linear weights are held as codes, "int8", "int4" or "fp8", and tables as
            int8; "none" in `dtype`.
        matmul: "xla", dense weights; "cpu", packed weights and the native kernel; or "gpu", dense
            int4 codes and the Hopper kernel where it takes the product.
        attention: backend of `paged_attention` and `kv_update`, one of ATTENTION.
        layers: "unrolled", or "scanned" over stacked weights: one layer to compile.
        tensor_parallel: devices that share each matrix and the heads.
        lora: backend of `lora_matmul`, one of LORA.
        experts: backend of `grouped_matmul`, one of EXPERTS.

    Raises:
        ConfigError: an unknown value, or weights that the kernels do not read.
    """

    dtype: str = "float32"
    quantization: str = "none"
    matmul: str = "xla"
    attention: str = "xla"
    layers: str = "unrolled"
    tensor_parallel: int = 1
    lora: str = "xla"
    experts: str = "xla"

    def __post_init__(self) -> None:
        for name, choices in (
            ("dtype", DTYPES),
            ("quantization", QUANTIZATIONS),
            ("matmul", MATMUL),
            ("attention", ATTENTION),
            ("layers", LAYERS),
            ("lora", LORA),
            ("experts", EXPERTS),
        ):
            if getattr(self, name) not in choices:
                raise ConfigError(
                    f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}"
                )
        if self.packed and self.tensor_parallel > 1:
            raise ConfigError(
                f"kernels.matmul={self.matmul} runs on one device: set parallel.model=1, or "
                "kernels.matmul=xla"
            )
        if self.matmul == "gpu" and (self.quantization, self.dtype) != ("int4", "bfloat16"):
            raise ConfigError(
                "kernels.matmul=gpu multiplies bfloat16 by int4 codes, not "
                f"{self.dtype} by weights.quantization={self.quantization}: set "
                "kernels.matmul=xla"
            )
        if self.packed and self.quantization == "fp8":
            raise ConfigError(
                "kernels.matmul=cpu reads no fp8 weights: set weights.quantization=int8, or "
                "kernels.matmul=xla"
            )
        if self.packed and self.quantization == "none" and self.dtype not in PACKED_DTYPES:
            raise ConfigError(
                f"kernels.matmul=cpu reads {' and '.join(PACKED_DTYPES)} weights, not "
                f"{self.dtype}: set weights.dtype, or kernels.matmul=xla"
            )

    @property
    def packed(self) -> bool:
        """Whether linear weights are held in the native kernel's panels."""
        return self.matmul == "cpu"

    @property
    def activations(self) -> str:
        """Dtype of the residual stream: the weights', except that the native matmul is float32."""
        return "float32" if self.packed else self.dtype
