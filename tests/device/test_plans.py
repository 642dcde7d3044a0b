"""A step's device calls, packed and taken apart."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

from jaxserve.device.plans import PlanLayout
from jaxserve.device.step import Program
from jaxserve.sampling.slots import SlotArrays

STEP = Program(num_rows=4, num_tokens=4)


def numbers(*shape: int) -> np.ndarray:
    """Some int32."""
    return np.random.default_rng(0).integers(-(2**31), 2**31, shape, np.int32)


SMALL = SlotArrays(settings=numbers(2, 3), lists=None)
LARGE = SlotArrays(settings=numbers(2, 3), lists=numbers(2, 7))
PROGRAMS: dict[Any, Any] = {
    STEP: jax.ShapeDtypeStruct((2, 9), np.int32),
    ("slots", 2, False): SMALL,
    ("slots", 2, True): LARGE,
    "entries": jax.ShapeDtypeStruct((2, 4, 4), np.int32),
}


def test_calls_come_back_as_they_were():
    layout = PlanLayout(PROGRAMS)
    transposed = numbers(4, 4, 2).T.swapaxes(1, 2)
    calls = [
        (("slots", 2, True), LARGE),
        (("slots", 2, False), SMALL),
        ("entries", transposed),
        ("entries", numbers(2, 4, 4)),
        (STEP, numbers(2, 9)),
    ]
    packed = layout.pack(calls)
    assert packed.nbytes == 4 * (5 + 6 + 14 + 6 + 32 + 32 + 18)
    found = PlanLayout(dict(PROGRAMS)).unpack(bytes(packed))
    assert [key for key, _ in found] == [key for key, _ in calls]
    for (_, ours), (_, theirs) in zip(found, calls, strict=True):
        assert jax.tree.structure(ours) == jax.tree.structure(theirs)
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_what_is_no_plan_is_refused():
    layout = PlanLayout(PROGRAMS)
    packed = bytes(layout.pack([(STEP, numbers(2, 9))]))
    for wrong in (packed[:-4], packed[:2], b"\7\0\0\0", b"\xff\xff\xff\xff"):
        with pytest.raises(ValueError):
            layout.unpack(wrong)


def test_a_description_tells_programs_apart():
    described = PlanLayout(PROGRAMS).describe()
    assert described[2] == "('slots', 2, True): int32[2, 3], int32[2, 7]"
    assert len(set(described)) == len(PROGRAMS)
