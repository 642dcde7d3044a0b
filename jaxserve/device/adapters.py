"""LoRA adapters in device memory: slots by rank class, and the programs that write one.

A class is one `SlotClass` of stacked arrays; the arrays of the model's copies stand one behind the
other along the axis of slots, and each device holds the part of a slot that goes with its part of
the base's matrices. Step programs for adapters are given all classes beside the parameters, and
only read them; a slot is written, before a step, by a program that its class's arrays are donated
to. Since device calls form one chain, whoever used the slot in an earlier step has read it by then.

Which adapter is in which slot is the scheduler's affair (`scheduler.adapters`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Int

from jaxserve.device.sharding import num_shares, partition
from jaxserve.models.adapters import PARTS, AdapterLayout, SiteArrays
from jaxserve.models.deltas import SlotClass
from pallas_kernels.lora_matmul import LoraWeights

#: Of all arrays of a class: the copies of the model have their own slots.
CLASS_SPEC = PartitionSpec(None, "data")


#: Sites by which a slot tells what its adapter has deltas of.
_TOLD = ("embed", "head", "expert_gate")


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class SlotContent:
    """What a write brings to one slot.

    Attributes:
        slot: within the class; S, or more, for none.
        has: whether the adapter has deltas of the table, of the head, and of experts.
        sites: a and b of some sites.
    """

    slot: Int[Array, ""]
    has: Bool[Array, "3"]
    sites: SiteArrays


@dataclass(frozen=True, kw_only=True)
class RankClass:
    """Slots of one rank: how many there are, in each copy of the model."""

    rank: int
    num_slots: int


class AdapterSlots:
    """The classes of one engine.

    Args:
        layout: of the model.
        classes: ranks ascending.
        mesh: that the model is on.

    Attributes:
        arrays: of each class, on their devices; replaced by each write.
    """

    def __init__(self, layout: AdapterLayout, classes: Sequence[RankClass], mesh: Mesh) -> None:
        self.layout = layout
        self.classes = tuple(classes)
        self._copies = mesh.shape["data"]
        self.arrays = [self._empty(own, mesh) for own in classes]

    def _empty(self, own: RankClass, mesh: Mesh) -> SlotClass:
        slots = own.num_slots * self._copies

        def zeros(shape: tuple[int, ...], axes: tuple[str | None, ...]) -> Array:
            spec = partition(mesh, axes, shape)
            sharding = NamedSharding(mesh, PartitionSpec(spec[0], "data", *spec[1:]))
            return jnp.zeros((shape[0], slots, *shape[1:]), self.layout.dtype, device=sharding)

        sites = {}
        for name, (a, b) in self.layout.shapes(own.rank).items():
            axes_a, axes_b = self.layout.axes(name)
            sites[name] = LoraWeights(a=zeros(a, axes_a), b=zeros(b, axes_b))
        flags = [
            jnp.zeros((1, slots), np.bool_, device=NamedSharding(mesh, CLASS_SPEC))
            for _ in range(3)
        ]
        return SlotClass(sites=sites, has_embed=flags[0], has_head=flags[1], has_experts=flags[2])

    @property
    def num_bytes(self) -> int:
        """Of all slots of all copies."""
        return sum(x.nbytes for x in jax.tree.leaves(self.arrays))

    def place(self, slot: int) -> tuple[int, int]:
        """Class of a slot, and its number in it."""
        for index, own in enumerate(self.classes):
            if slot < own.num_slots:
                return index, slot
            slot -= own.num_slots
        raise ValueError(f"there is no slot {slot}")

    def writes(self, slot: int, sites: SiteArrays) -> list[tuple[str, int, SlotContent]]:
        """The writes that put an adapter into a slot: program, class, and its inputs."""
        index, place = self.place(slot)
        has = np.array([name in sites for name in _TOLD])
        writes = []
        for part in self.layout.parts:
            names = PARTS[part]
            if part != "layers" and not any(name in sites for name in names):
                continue
            empty = self.padding(part, index)
            own = {name: sites.get(name, zeros) for name, zeros in empty.sites.items()}
            content = replace(empty, slot=np.array(place, np.int32), has=has, sites=own)
            writes.append((part, index, content))
        return writes

    def padding(self, part: str, index: int) -> SlotContent:
        """A write to no slot."""
        own = self.classes[index]
        sites = {
            name: tuple(np.zeros(shape, self.layout.dtype) for shape in pair)
            for name, pair in self.layout.shapes(own.rank).items()
            if name in PARTS[part]
        }
        nowhere = np.array(own.num_slots, np.int32)
        return SlotContent(slot=nowhere, has=np.zeros(len(_TOLD), np.bool_), sites=sites)  # pyright: ignore[reportArgumentType]

    def programs(self) -> dict[tuple[str, str, int], tuple[Callable[..., Any], SlotContent, int]]:
        """The writes to compile, by key: function, inputs, class."""
        return {
            ("adapter", part, index): (write_slot, self.padding(part, index), index)
            for index in range(len(self.classes))
            for part in self.layout.parts
        }


def bytes_by_part(
    layout: AdapterLayout, classes: Sequence[RankClass], mesh: Mesh | AbstractMesh
) -> dict[str, int]:
    """Of all slots, on one device, by the parts of a slot (`models.adapters.PARTS`)."""
    found = dict.fromkeys(layout.parts, 0)
    for own in classes:
        for name, shapes in layout.shapes(own.rank).items():
            part = next(part for part in layout.parts if name in PARTS[part])
            for axes, shape in zip(layout.axes(name), shapes, strict=True):
                held = math.prod(shape) // num_shares(mesh, partition(mesh, axes, shape))
                found[part] += own.num_slots * held * layout.dtype.itemsize
    return found


def write_slot(own: SlotClass, content: SlotContent) -> SlotClass:
    """Puts an adapter's arrays into a slot of one copy of the model."""

    def put(held: Array, new: Array) -> Array:
        return held.at[:, content.slot].set(new, mode="drop")

    sites = dict(own.sites)
    for name, (a, b) in content.sites.items():
        sites[name] = LoraWeights(a=put(sites[name].a, a), b=put(sites[name].b, b))
    return replace(
        own,
        sites=sites,
        has_embed=put(own.has_embed, content.has[:1]),
        has_head=put(own.has_head, content.has[1:2]),
        has_experts=put(own.has_experts, content.has[2:]),
    )
