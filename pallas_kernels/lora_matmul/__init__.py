"""What LoRA adapters add to a matrix product, each token with its own adapter or none."""

from pallas_kernels.lora_matmul.api import (
    BACKENDS,
    LoraWeights,
    expand_rows,
    lora_matmul,
    unsupported,
)
from pallas_kernels.lora_matmul.blocks import TokenBlocks, block_tokens

__all__ = [
    "BACKENDS",
    "LoraWeights",
    "TokenBlocks",
    "block_tokens",
    "expand_rows",
    "lora_matmul",
    "unsupported",
]
