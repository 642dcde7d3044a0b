"""Rows sorted by group, each times its own group's matrix: the products of a mixture of experts."""

from pallas_kernels.grouped_matmul.api import BACKENDS, TPU_LANES, grouped_matmul

__all__ = ["BACKENDS", "TPU_LANES", "grouped_matmul"]
