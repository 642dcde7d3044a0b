"""Programs to compile: a step, or a change of the state, over every copy of the model.

A program is a pure function of one copy; here it is mapped over the mesh's "data" axis, told where
its arguments lie and which are donated, and lowered. Owned by `executor`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.stages import Lowered

from jaxserve.device.adapters import CLASS_SPEC
from jaxserve.device.sharding import by_data, per_data_shard, replicated
from jaxserve.device.state import DeviceState, state_specs
from jaxserve.models.deltas import SlotClass


@dataclass(frozen=True, slots=True)
class Wanted:
    """A program to compile: a step over parameters, state and inputs, or a change of the state.

    Attributes:
        inputs: from the host, of one copy of the model; where one names a sharding, it is that of
            all copies' together.
        cost: relative time to compile; 0 for changes of state.
        reads: the program leaves the state as it is and returns what it reads of it, which lies
            like this where there are several devices.
        adapters: a step that is given those in the slots beside the parameters.
        slots: the program changes the arrays of this class of slots instead of the state.
        params: the model's leaves that it is given; all of them where None.
    """

    function: Callable[..., Any]
    inputs: Any
    cost: int = 0
    reads: NamedSharding | None = None
    adapters: bool = False
    slots: int | None = None
    params: Sequence[Any] | None = None


class Lowering:
    """Lowers programs for one mesh; the state is donated and stays where it is.

    Args:
        params: the model's leaves; they and the state may be abstract.
        shared: the mesh spans several hosts, so that results must be whole on every device.
        classes: of adapter slots.
    """

    def __init__(
        self,
        mesh: Mesh,
        params: Any,
        state: DeviceState,
        *,
        shared: bool,
        classes: Sequence[SlotClass] = (),
    ) -> None:
        self._mesh = mesh
        self._copies = mesh.shape["data"]
        self._params = shapes(params)
        self._state = shapes(state)
        self._shared = shared
        self._classes = shapes(tuple(classes))

    def lower(self, wanted: Wanted, platforms: tuple[str, ...] | None = None) -> Lowered:
        """One program, not yet compiled.

        Args:
            platforms: what to lower for, where the mesh's devices do not say it.
        """
        changed = self._state if wanted.slots is None else self._classes[wanted.slots]
        arguments, results = (changed, wanted.inputs), ()
        if wanted.cost:
            leaves = self._params if wanted.params is None else shapes(wanted.params)
            params = (leaves, self._classes) if wanted.adapters else leaves
            arguments, results = (params, *arguments), (None,)
        function, shardings = wanted.function, None
        if self._mesh.size > 1:
            function = self._over_copies(wanted)
            arguments = (*arguments[:-1], self.for_copies(wanted.inputs))
            held = jax.tree.map(lambda x: x.sharding, changed)
            read = replicated(self._mesh) if self._shared else by_data(self._mesh)
            shardings = wanted.reads or ((held, read) if results else held)
        donated = () if wanted.reads else len(arguments) - 2
        jitted = jax.jit(function, donate_argnums=donated, out_shardings=shardings)
        return jitted.trace(*arguments).lower(lowering_platforms=platforms)

    def for_copies(self, inputs: Any) -> Any:
        """Shapes of what the host gives to all copies."""
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(
                (self._copies, *x.shape), x.dtype, sharding=x.sharding or by_data(self._mesh)
            ),
            inputs,
        )

    def _over_copies(self, wanted: Wanted) -> Callable[..., Any]:
        """The function of one copy, mapped over all."""
        states = state_specs() if wanted.slots is None else CLASS_SPEC
        every = PartitionSpec("data")

        def step(params: Any, state: DeviceState, inputs: Any) -> Any:
            state, results = wanted.function(params, state, _first(inputs))
            return state, jax.tree.map(lambda x: x[None], results)

        def read(state: DeviceState, inputs: Any) -> Any:
            return jax.tree.map(lambda x: x[None], wanted.function(state, _first(inputs)))

        def change(state: DeviceState, inputs: Any) -> DeviceState:
            return wanted.function(state, _first(inputs))

        if wanted.cost:
            params = (PartitionSpec(), CLASS_SPEC) if wanted.adapters else PartitionSpec()
            specs = (params, states, every)
            return per_data_shard(self._mesh, step, specs, (states, every))
        if wanted.reads:
            return per_data_shard(self._mesh, read, (states, every), every)
        return per_data_shard(self._mesh, change, (states, every), states)


def integers(*shape: int) -> jax.ShapeDtypeStruct:
    """Shape of an int32 array from the host."""
    return jax.ShapeDtypeStruct(shape, np.int32)


def shapes(tree: Any) -> Any:
    """Shapes, dtypes, shardings of a tree of arrays; layouts too, where axes lie in another order.

    A program takes its arguments in the layout that it was compiled for, and in no other.
    """

    def shape(x: Any) -> jax.ShapeDtypeStruct:
        where = getattr(x, "sharding", None)
        layout = getattr(getattr(x, "format", None), "layout", None)
        if layout is not None and tuple(layout.major_to_minor) != tuple(range(x.ndim)):
            where = x.format
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

    return jax.tree.map(shape, tree)


def _first(tree: Any) -> Any:
    """The own part of arrays that have the copies of the model in front."""
    return jax.tree.map(lambda x: x[0], tree)
