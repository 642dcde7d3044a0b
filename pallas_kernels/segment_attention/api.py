"""The interface of segment attention; every backend computes what `reference.py` says.

Encoders' attention: sequences of different lengths lie one behind the other along the token axis,
and each token sees every token of its own sequence. Queries, keys and values come as the one array
that the fused projection made.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from jaxtyping import Array, Float, Int

from pallas_kernels.errors import UnsupportedKernel

#: A module each.
BACKENDS = ("xla", "cpu")


def segment_attention(
    qkv: Float[Array, "T 3 N H"],
    starts: Int[Array, "R+1"],
    *,
    scale: float,
    max_len: int,
    backend: str,
) -> Float[Array, "T N H"]:
    """Bidirectional attention within each row's tokens.

    Args:
        qkv: queries, keys and values of each token and head.
        starts: row r owns tokens starts[r] : starts[r + 1]; ascending, first entry 0. Rows may be
            empty; tokens from starts[-1] on are padding.
        scale: multiplies q·k.
        max_len: static upper bound of a row's tokens; a longer row is an error that is not seen.
        backend: "xla" (any platform) or "cpu" (native).

    Returns:
        In qkv's dtype; anything finite for padding tokens.

    Raises:
        UnsupportedKernel: the backend cannot run here, or not with such heads.
        ValueError: an unknown backend, or qkv of another shape.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r}: segment_attention has {', '.join(BACKENDS)}")
    if qkv.ndim != 4 or qkv.shape[1] != 3:
        raise ValueError(f"qkv {qkv.shape}: give [tokens, 3, heads, head size]")
    reason = unsupported(backend, head_dim=qkv.shape[-1])
    if reason is not None:
        raise UnsupportedKernel(f"segment_attention backend={backend!r}: {reason}")
    return _module(backend).segment_attention(qkv, starts, scale=scale, max_len=max_len)


def unsupported(backend: str, *, head_dim: int) -> str | None:
    """Why the backend cannot run here with such heads; None where it can."""
    return _module(backend).unsupported(head_dim=head_dim)


def _module(backend: str) -> ModuleType:
    return import_module(f"pallas_kernels.segment_attention.{backend}")
