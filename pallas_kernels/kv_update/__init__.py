"""Makes pages, and writes a step's keys and values into them."""

from pallas_kernels.kv_update.api import (
    BACKENDS,
    empty_pages,
    kv_update,
    page_multiple,
    page_width,
    scales_width,
)

__all__ = ["BACKENDS", "empty_pages", "kv_update", "page_multiple", "page_width", "scales_width"]
