"""How parameters lie in memory, where what JAX takes by itself would be copied in every step.

A TPU keeps an array in tiles over its last two axes, of eight rows or, where there are only two, of
two. Gate and up are one matrix [D, 2, F]: in tiles of two rows, of which XLA makes tiles of eight
before it multiplies. In a loop over layers it cannot do both that and take the layer out of the
stack in one go, and writes each layer's matrix to memory first. Here D and 2 change places in
memory, and the shape stays.
"""

from __future__ import annotations

from collections.abc import Sequence

from jax.experimental.layout import Layout

#: Of gate and up, behind the axis of layers where there is one.
_HALVES = ("embed", None, "mlp")
_PLATFORM = "tpu"


def param_layout(axes: Sequence[str | None], platform: str) -> Layout | None:
    """Of a parameter with these logical axes; None for what JAX takes by itself."""
    if platform != _PLATFORM or tuple(axes[-3:]) != _HALVES:
        return None
    outer = len(axes) - 3
    return Layout((*range(outer), outer + 1, outer, outer + 2))
