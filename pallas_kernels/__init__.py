"""Kernels of the serving engine: a folder an operation, each with its oracle beside it.

`<op>/api.py` is the interface and dispatches on `backend`; `reference.py` is the oracle;
`xla.py` runs on every platform; `cpu.py` + `cpu.cc` are the native AVX2 version for hosts without
an accelerator; `traffic.py` counts bytes and FLOPs. Nothing here imports jaxserve, reads the
environment, or falls back silently: a backend that cannot run raises `UnsupportedKernel` with the
reason, and the caller decides.
"""

from pallas_kernels.errors import UnsupportedKernel

__all__ = ["UnsupportedKernel"]
