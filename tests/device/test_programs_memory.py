"""The state is donated: every program returns it in its own buffers and copies none of it.

Read off the compiled programs, over pools of gigabytes that are never allocated.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Any

import jax
import pytest

from jaxserve.config import SchedulerConfig
from jaxserve.device.executor import Executor
from jaxserve.device.state import DeviceState
from jaxserve.device.step import Program
from jaxserve.models.decoder import Decoder
from jaxserve.models.options import ModelOptions
from tests.device.rig import MESH, PAGE_SIZE, fresh_state
from tests.models.loading import load_tiny

pytestmark = pytest.mark.slow

PROGRAMS = (
    Program(num_rows=4, num_tokens=4),
    Program(num_rows=4, num_tokens=4, decode_steps=4),
    Program(num_rows=4, num_tokens=16),
)
POOL_PAGES = 1 << 20
#: So many slots that a copy of any large array of the sampler's state would be seen.
LIMITS = SchedulerConfig(max_rows=8192, max_step_tokens=8192)
MOST_TEMPORARY = 1_000_000


def huge_state(state: DeviceState) -> Any:
    """The same state, with POOL_PAGES pages, as shapes."""

    def shape(path: Any, x: jax.Array) -> jax.ShapeDtypeStruct:
        is_pages = any(getattr(key, "name", None) == "cache" for key in path)
        sizes = (x.shape[0], POOL_PAGES, *x.shape[2:]) if is_pages else x.shape
        return jax.ShapeDtypeStruct(sizes, x.dtype, sharding=x.sharding)

    return jax.tree_util.tree_map_with_path(shape, state)


def check_in_place(model: Decoder, keys: Iterable[Hashable]) -> None:
    """Compiles some of an executor's programs and looks at their memory."""
    state = huge_state(fresh_state(model, LIMITS, num_pages=2))
    bytes_of_state = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    assert bytes_of_state > 3 << 30
    executor = Executor(model, state, PROGRAMS, PAGE_SIZE, MESH)
    wanted = executor._wanted()
    for key in keys:
        compiled: Any = executor._compile(wanted[key])
        memory = compiled.memory_analysis()
        assert memory.alias_size_in_bytes == bytes_of_state, key
        assert memory.temp_size_in_bytes < MOST_TEMPORARY, key


@pytest.mark.parametrize("layers", ["unrolled", "scanned"])
@pytest.mark.parametrize("backend", ["xla", "cpu"])
def test_steps_do_not_copy_the_state(backend: str, layers: str) -> None:
    """With full attention beside a sliding window."""
    options = ModelOptions(matmul=backend, attention=backend, layers=layers)
    check_in_place(load_tiny("gemma2", options), PROGRAMS)


def test_changes_of_state_do_not_copy_it() -> None:
    slots = [("slots", 8, with_lists) for with_lists in (False, True)]
    check_in_place(
        load_tiny("gemma2", ModelOptions()), [*slots, "entries", "prefix", ("copy", 0), ("copy", 1)]
    )
