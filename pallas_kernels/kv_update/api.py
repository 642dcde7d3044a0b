"""The interface of kv_update: in place where the pages are donated."""

from __future__ import annotations

from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pallas_kernels.errors import UnsupportedKernel
from pallas_kernels.kv_update import cpu, xla
from pallas_kernels.quantized_pages import Pages

#: Lanes of a TPU's registers.
_TPU_LANES = 128

#: On a TPU and on a GPU the scatter is in place: compiled for a v5e and for an H100 it needs no
#: temporary memory (`tests/kernels/test_compile.py`).
BACKENDS = {"xla": xla, "cpu": cpu, "tpu": xla, "gpu": xla}


def kv_update(
    pages: Pages,
    k_new: Float[Array, "T K H"],
    v_new: Float[Array, "T K H"],
    layer: int | Int[Array, ""],
    token_pages: Int[Array, "T"],
    token_offsets: Int[Array, "T"],
    *,
    backend: str = "xla",
) -> Pages:
    """Writes token t's key and value to pages[layer, token_pages[t], :, token_offsets[t]].

    The key goes to the first half of a row, the value to the second; lanes past H are undefined.
    Where pages are quantized, so are the key and the value, each head's by its own scale.

    Args:
        layer: a Python int where layers are unrolled, traced in a scan.
        token_pages, token_offsets: from `RaggedBatch.token_places`; padding goes to page 0.
        backend: "xla" (any platform), "cpu" (native), "tpu" or "gpu".

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
    reason = BACKENDS[backend].unsupported(head_dim=k_new.shape[-1], dtype=pages.dtype)
    if reason is not None:
        raise UnsupportedKernel(f"kv_update backend={backend!r}: {reason}")
    return BACKENDS[backend].kv_update(pages, k_new, v_new, layer, token_pages, token_offsets)


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
    reason = BACKENDS[backend].unsupported(head_dim=shape[-1] // 2, dtype=dtype)
    if reason is not None:
        raise UnsupportedKernel(f"empty_pages backend={backend!r}: {reason}")
    return BACKENDS[backend].empty_pages(shape, dtype)


def page_width(head_dim: int, backend: str) -> int:
    """W: elements of a page's row for one position, key and value.

    On a TPU whole registers of 128 lanes, so that a copy moves nothing but data.
    """
    width = 2 * head_dim
    return -(-width // _TPU_LANES) * _TPU_LANES if backend == "tpu" else width
