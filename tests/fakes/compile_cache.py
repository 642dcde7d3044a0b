"""JAX's settings of the persistent compilation cache, put back after a test that changes them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import jax
from jax.experimental.compilation_cache import compilation_cache

_NAMES = (
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_min_entry_size_bytes",
)


@contextlib.contextmanager
def kept_cache_settings() -> Iterator[None]:
    """No cache may decide what the next test sees."""
    values = {name: getattr(jax.config, name) for name in _NAMES}
    try:
        yield
    finally:
        for name, value in values.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
