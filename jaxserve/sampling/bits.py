"""Random bits keyed by (seed, choice, position), never by row: Threefry-2x32 with 20 rounds.

Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011. Written out elementwise, so
that a step's rows become one small fused kernel; the bits are those of `jax.random`'s block.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, UInt

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA


def threefry(
    key: tuple[UInt[Array, "B"], UInt[Array, "B"]],
    counter: tuple[UInt[Array, "B"], UInt[Array, "B"]],
) -> tuple[UInt[Array, "B"], UInt[Array, "B"]]:
    """64 random bits for each key and counter, as two words."""
    keys = (*key, key[0] ^ key[1] ^ jnp.uint32(_PARITY))
    x, y = counter[0] + keys[0], counter[1] + keys[1]
    for group in range(5):
        for rotation in _ROTATIONS[group % 2]:
            x = x + y
            y = (y << rotation) | (y >> (32 - rotation))
            y = x ^ y
        x = x + keys[(group + 1) % 3]
        y = y + keys[(group + 2) % 3] + jnp.uint32(group + 1)
    return x, y
