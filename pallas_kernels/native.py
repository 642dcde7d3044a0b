"""Builds and loads the native CPU kernels: one shared library from the `.cc` files beside them.

`python -m pallas_kernels.native` builds it at installation; `load` builds it where it is missing,
registers its functions with XLA, and says why it is not there where it is not (no compiler, no
AVX2, not x86). Never a fallback in here: the caller asks, decides and logs.

The file's name carries a hash of the sources, the flags and the jaxlib whose headers they were
compiled against, so that a stale library is never loaded. It is written under another name and
renamed, so that several builders at once are harmless: the last one wins with the same bytes.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax

from pallas_kernels.errors import UnsupportedKernel

TARGETS = (
    "jaxserve_paged_attention",
    "jaxserve_kv_update",
    "jaxserve_leave",
    "jaxserve_packed_matmul",
    "jaxserve_packed_matmul_int8",
    "jaxserve_packed_matmul_int4",
    "jaxserve_segment_attention",
    "jaxserve_lora_matmul",
)
FLAGS = ("-std=c++17", "-O3", "-mavx2", "-mfma", "-mf16c", "-fPIC", "-shared", "-Wall")
CPU_FEATURES = frozenset({"avx2", "fma", "f16c"})
COMPILERS = ("g++", "clang++", "c++")
BUILD_TIMEOUT_S = 300

_PACKAGE = Path(__file__).parent
_SOURCES = (
    "paged_attention/cpu.cc",
    "kv_update/cpu.cc",
    "packed_matmul/cpu.cc",
    "segment_attention/cpu.cc",
    "lora_matmul/cpu.cc",
)
_HEADERS = ("parallel.h", "vector.h")


@dataclass(frozen=True, kw_only=True)
class Availability:
    """What `load` found.

    Attributes:
        library: the shared library in use; None where there is none.
        reason: why there is none, for a log line; None where there is one.
    """

    library: Path | None = None
    reason: str | None = None


@functools.cache
def load() -> Availability:
    """Builds the library if it is missing, and registers its functions with XLA, once."""
    try:
        library = build()
        loaded = ctypes.cdll.LoadLibrary(str(library))
        for target in TARGETS:
            jax.ffi.register_ffi_target(
                target, jax.ffi.pycapsule(getattr(loaded, target)), platform="cpu"
            )
    except (UnsupportedKernel, OSError, AttributeError) as error:
        return Availability(reason=str(error))
    return Availability(library=library)


def build(folder: Path = _PACKAGE / "_build", compilers: Sequence[str] = COMPILERS) -> Path:
    """Path of the library, compiled now if it is not there yet.

    Raises:
        UnsupportedKernel: this processor cannot run it, there is no compiler, or it failed.
    """
    reason = _processor_lacks()
    if reason is not None:
        raise UnsupportedKernel(reason)
    library = folder / f"kernels-{_fingerprint()}.so"
    if library.exists():
        return library
    compiler = next(filter(None, map(shutil.which, compilers)), None)
    if compiler is None:
        raise UnsupportedKernel(
            f"no C++ compiler ({', '.join(compilers)}): install one, e.g. `apt install g++`"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=folder, prefix="building-", suffix=".so")
    except OSError as error:
        raise UnsupportedKernel(f"cannot write the native library: {error}") from error
    os.close(handle)
    try:
        _compile(compiler, Path(temporary))
        os.replace(temporary, library)
    finally:
        Path(temporary).unlink(missing_ok=True)
    return library


def _compile(compiler: str, target: Path) -> None:
    sources = [str(_PACKAGE / source) for source in _SOURCES]
    command = [compiler, *FLAGS, f"-I{_PACKAGE}", "-isystem", jax.ffi.include_dir(), *sources]
    try:
        done = subprocess.run(
            [*command, "-o", str(target)], capture_output=True, text=True, timeout=BUILD_TIMEOUT_S
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UnsupportedKernel(f"{compiler} did not run to its end: {error}") from error
    if done.returncode != 0:
        raise UnsupportedKernel(f"{compiler} failed: {done.stderr.strip()[-2000:]}")


def _fingerprint() -> str:
    digest = hashlib.sha256()
    for name in (*_SOURCES, *_HEADERS):
        digest.update((_PACKAGE / name).read_bytes())
    jaxlib = importlib.metadata.version("jaxlib")
    digest.update(" ".join((*FLAGS, jaxlib, platform.machine())).encode())
    return digest.hexdigest()[:16]


def _processor_lacks() -> str | None:
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return f"the processor is {platform.machine()}, the native kernels are for x86-64"
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError as error:
        return f"cannot tell what the processor can do: {error}"
    flags = next((line for line in lines if line.startswith("flags")), "").split()
    missing = sorted(CPU_FEATURES.difference(flags))
    return f"the processor lacks {', '.join(missing)}" if missing else None


def main() -> int:
    """Builds, and says where or why not; exit status 0 either way, since XLA can do without."""
    available = load()
    if available.library is None:
        print(f"native kernels: not built, {available.reason}", file=sys.stderr)
    else:
        print(f"native kernels: {available.library}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
