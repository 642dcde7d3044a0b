"""The interface of paged attention; every backend computes what `reference.py` says.

Pages are [L, P, K, Z, W]: one page of one KV head is a contiguous [Z, W] tile, which is what a TPU
or GPU kernel moves in one copy, and what the CPU kernel walks in order. A row of it holds a
position's key in its first half and its value in the second (`kv_update.page_width`): so one copy
brings both, and a head of 64 fills the 128 lanes of a TPU.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pallas_kernels.errors import UnsupportedKernel
from pallas_kernels.kv_update import kv_update
from pallas_kernels.quantized_pages import Pages
from pallas_kernels.ragged import RaggedBatch

#: A module each, imported when it is asked for: Pallas takes a quarter of a second.
BACKENDS = ("xla", "cpu", "tpu", "gpu")


def paged_attention(
    q: Float[Array, "T N H"],
    pages: Pages,
    layer: int | Int[Array, ""],
    batch: RaggedBatch,
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: Float[Array, "N"] | None = None,
    backend: str,
) -> Float[Array, "T N H"]:
    """Causal attention of each token over its own row's pages.

    Query heads n of one KV head are adjacent: head n reads KV head n // (N // K). A token at
    position p sees positions max(0, p - window + 1) … p, its own included; its key and value must
    already be in the pages (see `kv_update`).

    Args:
        layer: which layer's pages; a Python int where layers are unrolled, traced in a scan.
        scale: multiplies q·k.
        window: sliding window in tokens, None for full attention.
        soft_cap: scores become soft_cap * tanh(score / soft_cap).
        sinks: a score for each head that counts in its softmax and has no value; not capped.
        backend: "xla" (any platform), "cpu" (native), "tpu" or "gpu" (Pallas).

    Returns:
        In q's dtype; zeros for padding tokens.

    Raises:
        UnsupportedKernel: the backend cannot run here, or not with these shapes or dtypes.
        ValueError: shapes that contradict each other, or an unknown backend.
    """
    _check(q, pages, window, sinks, backend)
    return _module(backend).paged_attention(
        q, pages, layer, batch, scale=scale, window=window, soft_cap=soft_cap, sinks=sinks
    )


def write_and_attend(
    q: Float[Array, "T N H"],
    k_new: Float[Array, "T K H"],
    v_new: Float[Array, "T K H"],
    pages: Pages,
    layer: int | Int[Array, ""],
    batch: RaggedBatch,
    places: tuple[Int[Array, "T"], Int[Array, "T"]],
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: Float[Array, "N"] | None = None,
    backend: str,
) -> tuple[Float[Array, "T N H"], Pages]:
    """`kv_update` and `paged_attention`; on a GPU one kernel in decode programs.

    Args:
        k_new, v_new: the tokens' own key and value.
        places: page and offset of each token, of `RaggedBatch.token_places`.

    Returns:
        The attention's output, and the pages: the same buffers where the caller donated them.

    Raises:
        UnsupportedKernel, ValueError: as either of the two.
    """
    options = {"scale": scale, "window": window, "soft_cap": soft_cap, "sinks": sinks}
    if backend == "gpu":
        _check(q, pages, window, sinks, backend)
        gpu = _module(backend)
        if gpu.writes(batch, pages, q.shape[1]):
            return gpu.write_and_attend(q, k_new, v_new, pages, layer, batch, **options)
    num_rows = batch.context_lens.shape[0]
    pages = kv_update(pages, k_new, v_new, layer, *places, num_rows=num_rows, backend=backend)
    return paged_attention(q, pages, layer, batch, backend=backend, **options), pages


def _check(
    q: Float[Array, "T N H"],
    pages: Pages,
    window: int | None,
    sinks: Float[Array, "N"] | None,
    backend: str,
) -> None:
    """Raises what `paged_attention` raises."""
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r}: paged_attention has {', '.join(BACKENDS)}")
    if pages.shape[-1] % 2 or pages.shape[-1] < 2 * q.shape[-1]:
        raise ValueError(
            f"q {q.shape} and pages {pages.shape} differ: a row of a page holds a key and a value"
        )
    if q.shape[1] % pages.shape[2]:
        raise ValueError(f"{q.shape[1]} query heads are no multiple of {pages.shape[2]} KV heads")
    if window is not None and window < 1:
        raise ValueError(f"window={window}: give at least 1, or None for full attention")
    if sinks is not None and sinks.shape != q.shape[1:2]:
        raise ValueError(f"sinks {sinks.shape} and {q.shape[1]} query heads differ")
    reason = unsupported(backend, head_dim=q.shape[-1], dtype=pages.dtype)
    if reason is not None:
        raise UnsupportedKernel(f"paged_attention backend={backend!r}: {reason}")


def unsupported(backend: str, *, head_dim: int, dtype: DTypeLike) -> str | None:
    """Why the backend cannot run here with such pages; None where it can."""
    return _module(backend).unsupported(head_dim=head_dim, dtype=dtype)


def _module(backend: str) -> ModuleType:
    return import_module(f"pallas_kernels.paged_attention.{backend}")
