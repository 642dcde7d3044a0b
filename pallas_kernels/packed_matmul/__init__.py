"""Matrix products with weights packed for the native CPU kernel."""

from pallas_kernels.packed_matmul.api import (
    PANEL,
    pack,
    packed_matmul,
    packed_rows,
    unsupported,
)

__all__ = ["PANEL", "pack", "packed_matmul", "packed_rows", "unsupported"]
