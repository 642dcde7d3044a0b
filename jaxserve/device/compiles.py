"""Compilation: the persistent cache, a count of what XLA compiles, and what it is told of a device.

JAX reports each compilation to its monitoring listeners, from whichever thread; a listener can not
be taken off, so one for the process counts for all.
"""

from __future__ import annotations

import functools
import logging
import tempfile
import threading
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

from jaxserve.errors import ConfigError

#: As `jax.stages.Lowered.compile` takes them.
type CompilerOptions = dict[str, str | bool | int | float]

logger = logging.getLogger(__name__)

_EVENT = "/jax/core/compile/backend_compile_duration"
#: By the first word of JAX's name of the device. A TPU7x could lay 16-bit arrays out in tiles of 16
#: rows; XLA prefers that inside of a program, but takes arguments in tiles of 8, and copies all
#: weights between. On GPUs XLA takes each layer's write to the cache, done in place, for one more
#: cache, finds that the step does not fit, and computes matrix products twice to make room. And it
#: leaves loops, and conditions with loops in them, out of CUDA graphs: the host then waits for the
#: device at each of them, in the midst of a step.
_OPTIONS: dict[str, CompilerOptions] = {
    "TPU7x": {"xla_tpu_control_large_2nd_minor_layout_for_x16": 0},
    "NVIDIA": {
        "xla_disable_hlo_passes": "rematerialization",
        "xla_gpu_enable_command_buffer": (
            "FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,DYNAMIC_SLICE_FUSION,CONDITIONAL,WHILE"
        ),
    },
}


class CompileCounter:
    """Counts compilations of this process, those read from the persistent cache among them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._count = 0
        jax.monitoring.register_event_duration_secs_listener(self._on_event)

    @property
    def count(self) -> int:
        """Compilations so far."""
        return self._count

    def _on_event(self, event: str, duration_secs: float, **_: object) -> None:
        if event == _EVENT:
            with self._lock:
                self._count += 1


@functools.cache
def compile_counter() -> CompileCounter:
    """The process's counter; counts from the first call on."""
    return CompileCounter()


def compiler_options(device_kind: str, *, cuda_graphs: bool = True) -> CompilerOptions | None:
    """What XLA is told when it compiles for such a device, by JAX's name; None for nothing.

    Args:
        cuda_graphs: whether programs of a GPU may become graphs.
    """
    maker = device_kind.split(maxsplit=1)[0]
    options = _OPTIONS.get(maker)
    if options is None or maker != "NVIDIA" or cuda_graphs:
        return options
    return {**options, "xla_gpu_enable_command_buffer": ""}


def use_persistent_cache(directory: str) -> Path:
    """Has JAX keep compiled programs in a directory, ~/.cache/jaxserve/xla where empty.

    Raises:
        ConfigError: the directory cannot be made, or not be written.
    """
    path = Path(directory or "~/.cache/jaxserve/xla")
    try:
        path = path.expanduser()
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home directory
        raise ConfigError(
            f"engine.compile_cache_dir: cannot write to {path}: {error}; give another directory"
        ) from error
    if jax.config.jax_compilation_cache_dir != str(path):
        compilation_cache.reset_cache()  # else JAX stays with the directory it used first
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return path
