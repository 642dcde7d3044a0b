"""Matrix products with weights of 8 or 4 bits, dense."""

from pallas_kernels.quant_matmul.api import (
    GROUP,
    fp8_matmul,
    int4_matmul,
    int4_unsupported,
    int8_matmul,
)

__all__ = ["GROUP", "fp8_matmul", "int4_matmul", "int4_unsupported", "int8_matmul"]
