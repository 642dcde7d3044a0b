"""Writes a step's keys and values into their pages."""

from pallas_kernels.kv_update.api import BACKENDS, kv_update

__all__ = ["BACKENDS", "kv_update"]
