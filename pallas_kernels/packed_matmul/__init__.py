"""Matrix products with weights packed for the native CPU kernel."""

from pallas_kernels.packed_matmul.api import (
    GROUP,
    PANEL,
    CodePanels,
    pack,
    pack_groups,
    pack_int4,
    packed_matmul,
    packed_rows,
    unsupported,
)

__all__ = [
    "GROUP",
    "PANEL",
    "CodePanels",
    "pack",
    "pack_groups",
    "pack_int4",
    "packed_matmul",
    "packed_rows",
    "unsupported",
]
