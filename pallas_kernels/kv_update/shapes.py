"""Shapes that kv_update is compiled for: pages and tokens of paged attention's, all of them.

None is refused, not even pages that the attention kernels do not read.
"""

from pallas_kernels.paged_attention.shapes import SHAPES, Shape

__all__ = ["SHAPES", "Shape"]
