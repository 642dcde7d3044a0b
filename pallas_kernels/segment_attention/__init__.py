"""Attention of packed sequences, each over the whole of itself, without a cache."""

from pallas_kernels.segment_attention.api import BACKENDS, segment_attention, unsupported

__all__ = ["BACKENDS", "segment_attention", "unsupported"]
