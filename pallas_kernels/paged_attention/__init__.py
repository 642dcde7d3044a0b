"""Attention of ragged query tokens over paged keys and values."""

from pallas_kernels.paged_attention.api import (
    BACKENDS,
    paged_attention,
    unsupported,
    write_and_attend,
)
from pallas_kernels.ragged import RaggedBatch

__all__ = ["BACKENDS", "RaggedBatch", "paged_attention", "unsupported", "write_and_attend"]
