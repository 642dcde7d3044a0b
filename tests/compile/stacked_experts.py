"""A loop over layers of experts, compiled for chips that are not here; run as a program.

    python -m tests.compile.stacked_experts SLICE

Prints JSON: temporary bytes and those of all matrices; of what the engine has XLA compile ("ours")
and of what XLA makes of it unasked ("unasked").
"""

from __future__ import annotations

import json
import sys
from typing import Any

from benchmarks.compile_check import targets

LAYERS, EXPERTS, SIZE, WIDE, ROWS = 4, 8, 2048, 768, 512


def main(where: str) -> None:
    """On one device of the slice."""
    targets.prepare()
    import jax
    import jax.numpy as jnp

    from jaxserve.device.chips import parse_slice
    from jaxserve.device.compiles import compiler_options
    from pallas_kernels.grouped_matmul import grouped_matmul

    device = targets.devices(parse_slice(where))[0]
    place = jax.sharding.SingleDeviceSharding(device)

    def shape(*sizes: int, dtype: Any = jnp.bfloat16) -> Any:
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=place)

    def step(x: Any, gate: Any, down: Any, sizes: Any) -> Any:
        def layer(x: Any, i: Any) -> tuple[Any, None]:
            hidden = grouped_matmul(x, gate, sizes, first_group=i * EXPERTS)
            return grouped_matmul(hidden, down, sizes, first_group=i * EXPERTS), None

        return jax.lax.scan(layer, x, jnp.arange(LAYERS))[0]

    stack = LAYERS * EXPERTS
    arguments = (
        shape(ROWS, SIZE),
        shape(stack, SIZE, WIDE),
        shape(stack, WIDE, SIZE),
        shape(EXPERTS, dtype=jnp.int32),
    )
    lowered = jax.jit(step).trace(*arguments).lower()
    found = {"matrices": 2 * stack * SIZE * WIDE * 2}
    for name, options in (("ours", compiler_options(device.device_kind)), ("unasked", None)):
        memory = lowered.compile(compiler_options=options).memory_analysis()
        found[name] = memory.temp_size_in_bytes
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
