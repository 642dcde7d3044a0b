"""Compiles the programs that move pages, for chips that are not here; run as a program.

    python -m tests.compile.moved_pages MODEL SLICE

Prints JSON: of each program its temporary bytes, those of its results, and those updated in place;
and the bytes of the pool on one device.
"""

from __future__ import annotations

import json
import sys

from benchmarks.compile_check import targets


def main(model: str, where: str) -> None:
    """One model on one slice, with the largest of the calls."""
    targets.prepare()
    import jax

    from benchmarks.compile_check.steps import ROWS_OF_STEPS
    from jaxserve.device.chips import parse_slice
    from jaxserve.device.host_store import SIZES, HostStore
    from jaxserve.device.lowering import Lowering
    from jaxserve.engine.ahead import ahead_of_time

    row = next(row for row in ROWS_OF_STEPS if row.name == f"{model}/{where}/decode")
    slice = parse_slice(where)
    mesh = targets.mesh(slice, row.config.parallel)
    ahead = ahead_of_time(row.config, row.checkpoint, slice, mesh)
    num_pages = ahead.num_pages()
    state = ahead.executor(row.program, num_pages)._state
    store = HostStore(state.cache, [1] * len(num_pages), mesh)
    lowering = Lowering(mesh, [], state, shared=False)
    found = {"pool": num_pages[0] * ahead.page_bytes()}
    wanted = store.wanted()
    for kind in ("save", "load"):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            lowered = lowering.lower(wanted[kind, 0, SIZES[-1]], targets.platforms(slice))
        memory = lowered.compile().memory_analysis()
        found[f"{kind} temp"] = memory.temp_size_in_bytes
        found[f"{kind} results"] = memory.output_size_in_bytes
        found[f"{kind} in place"] = memory.alias_size_in_bytes
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
