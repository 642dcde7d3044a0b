"""The interface of kv_update: in place where the pages are donated."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pallas_kernels.errors import UnsupportedKernel
from pallas_kernels.quantized_pages import Pages

#: Lanes of a TPU's registers.
_TPU_LANES = 128

BACKENDS = ("xla", "cpu", "tpu", "gpu")


def kv_update(
    pages: Pages,
    k_new: Float[Array, "T K H"],
    v_new: Float[Array, "T K H"],
    layer: int | Int[Array, ""],
    token_pages: Int[Array, "T"],
    token_offsets: Int[Array, "T"],
    *,
    num_rows: int | None = None,
    backend: str = "xla",
) -> Pages:
    """Writes token t's key and value to pages[layer, token_pages[t], :, token_offsets[t]].

    The key goes to the first half of a row, the value to the second; lanes past H are undefined.
    Where pages are quantized, so are the key and the value, each head's by its own scale.

    Args:
        layer: a Python int where layers are unrolled, traced in a scan.
        token_pages, token_offsets: from `RaggedBatch.token_places`; padding goes to page 0.
        num_rows: rows that the tokens belong to, each with tokens and positions in a sequence; a
            bound that saves "tpu" work. None where it is not known.
        backend: "xla" (any platform), "cpu" (native), "tpu" (Pallas) or "gpu" (XLA's scatter).

    Returns:
        The pages, the same buffers where the caller donated them. The content of page 0 is
        undefined afterwards.

    Raises:
        UnsupportedKernel: the backend cannot run here, or not with these shapes or dtypes.
        ValueError: shapes that contradict each other, or an unknown backend.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r}: kv_update has {', '.join(BACKENDS)}")
    expected = (k_new.shape[0], pages.shape[2], k_new.shape[2])
    if k_new.shape != expected or v_new.shape != expected or pages.shape[4] < 2 * k_new.shape[2]:
        raise ValueError(f"pages {pages.shape} and tokens {k_new.shape}, {v_new.shape} differ")
    kernel = _module(backend)
    reason = kernel.unsupported(head_dim=k_new.shape[-1], dtype=pages.dtype)
    if reason is not None:
        raise UnsupportedKernel(f"kv_update backend={backend!r}: {reason}")
    return kernel.kv_update(pages, k_new, v_new, layer, token_pages, token_offsets, num_rows)


def empty_pages(
    shape: tuple[int, int, int, int, int], dtype: DTypeLike, *, backend: str = "xla"
) -> Pages:
    """Pages with undefined content, under `jax.jit`.

    Args:
        shape: [L, P, K, Z, W].
        backend: "xla" writes zeros; "cpu" leaves them untouched, so that the operating system
            gives a page memory only when it is first written.

    Raises:
        UnsupportedKernel, ValueError: as `kv_update`.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r}: kv_update has {', '.join(BACKENDS)}")
    kernel = _module(backend)
    reason = kernel.unsupported(head_dim=shape[-1] // 2, dtype=dtype)
    if reason is not None:
        raise UnsupportedKernel(f"empty_pages backend={backend!r}: {reason}")
    return kernel.empty_pages(shape, dtype)


def _module(backend: str) -> ModuleType:
    """Imported when it is asked for: Pallas takes a quarter of a second."""
    name = "xla" if backend == "gpu" else backend
    return import_module(f"pallas_kernels.kv_update.{name}")


def page_width(head_dim: int, backend: str) -> int:
    """W: elements of a page's row for one position, key and value.

    On a TPU whole registers of 128 lanes, so that a copy moves nothing but data.
    """
    return _whole_registers(2 * head_dim, backend)


def scales_width(page_size: int, backend: str) -> int:
    """C: elements of a row of scales, those of one KV head's keys and values in a page of codes."""
    return _whole_registers(2 * page_size, backend)


def page_multiple(dtype: DTypeLike, backend: str) -> int:
    """What a page's positions must be a multiple of: on a TPU they fill 32 bytes of sublanes."""
    return 32 // jnp.dtype(dtype).itemsize if backend == "tpu" else 1


def _whole_registers(width: int, backend: str) -> int:
    return -(-width // _TPU_LANES) * _TPU_LANES if backend == "tpu" else width
