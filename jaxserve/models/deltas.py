"""What adapters add in a step: beside each matrix of the base, for the tokens that use one.

A step with adapters is a program of its own; without, `StepDeltas` is None and nothing of this is
traced. Tokens are grouped by slot once a step (`StepDeltas.of`), and all layers share the groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from jaxserve.models.linear import precision
from jaxserve.models.options import ModelOptions
from jaxserve.models.parallel import TENSOR_AXES
from pallas_kernels.lora_matmul import (
    LoraWeights,
    TokenBlocks,
    block_tokens,
    expand_rows,
    lora_matmul,
)

#: Sites whose inputs devices share: each has a part of z, and they add them up.
_SPLIT_INPUTS = ("out", "down")


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class SlotClass:
    """The adapters in the slots of one rank, of one copy of the model or of all.

    Attributes:
        sites: as `models.adapters` has them, b with the base's output axes.
        has_embed, has_head, has_experts: whether the slot's adapter has deltas of these.
    """

    sites: dict[str, LoraWeights]
    has_embed: Bool[Array, "1 S"]
    has_head: Bool[Array, "1 S"]
    has_experts: Bool[Array, "1 S"]

    @property
    def num_slots(self) -> int:
        """S."""
        return self.has_embed.shape[1]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class StepDeltas:
    """The step's adapters.

    Attributes:
        classes: of slots; they are numbered through, class by class.
        blocks: of the step's tokens, for each class.
        slots: of each token; negative for none.
        layer: whose matrices; of the model, not of its cache group.
    """

    classes: tuple[SlotClass, ...]
    blocks: tuple[TokenBlocks, ...]
    slots: Int[Array, "T"]
    layer: Int[Array, ""]

    @classmethod
    def of(cls, classes: Sequence[SlotClass], slots: Int[Array, "T"]) -> StepDeltas:
        """Groups the tokens."""
        return cls(
            classes=tuple(classes),
            blocks=tuple(block_tokens(own, c.num_slots) for c, own in by_class(classes, slots)),
            slots=slots,
            layer=jnp.zeros((), jnp.int32),
        )

    def at(self, layer: Int[Array, ""]) -> StepDeltas:
        """For one layer."""
        return replace(self, layer=jnp.asarray(layer, jnp.int32))


def add_delta(
    deltas: StepDeltas | None,
    site: str,
    x: Float[Array, "T K"],
    y: Float[Array, "T *out"],
    options: ModelOptions,
) -> Float[Array, "T *out"]:
    """y, the base's product with x, and what the tokens' adapters add to it in this layer."""
    if deltas is None:
        return y
    weights = tuple(own.sites[site] for own in deltas.classes)
    return _add(site, x, y, weights, deltas.blocks, deltas.layer, options)


def add_embedding(
    deltas: StepDeltas | None,
    token_ids: Int[Array, "T"],
    x: Float[Array, "T D"],
    options: ModelOptions,
) -> Float[Array, "T D"]:
    """x, the tokens' rows of the table, and what their adapters add to them."""
    if deltas is None or "embed" not in deltas.classes[0].sites:
        return x
    for own, slots in by_class(deltas.classes, deltas.slots):
        has = has_deltas(own.has_embed, slots)

        def add(
            x: Array, own: SlotClass = own, slots: Array = slots, has: Array = has
        ) -> Float[Array, "T D"]:
            site = own.sites["embed"]
            place = jnp.clip(slots, 0, own.num_slots - 1)
            z = site.a.at[0, place, token_ids].get(mode="clip")
            blocks = block_tokens(jnp.where(has, slots, -1), own.num_slots)
            return expand_rows(z, x, site.b[0], blocks, precision(options))

        x = jax.lax.cond(jnp.any(has), add, lambda x: x, x)
    return x


def add_logits(
    deltas: StepDeltas | None,
    slots: Int[Array, "B"],
    x: Float[Array, "B D"],
    y: Float[Array, "B V"],
    options: ModelOptions,
) -> Float[Array, "B V"]:
    """y, the logits of x, and what the rows' adapters add to them.

    Args:
        slots: of each row.
    """
    if deltas is None or "head" not in deltas.classes[0].sites:
        return y
    for own, local in by_class(deltas.classes, slots):
        has = has_deltas(own.has_head, local)

        def add(
            y: Array, own: SlotClass = own, local: Array = local, has: Array = has
        ) -> Float[Array, "B V"]:
            blocks = block_tokens(jnp.where(has, local, -1), own.num_slots)
            layer = jnp.zeros((), jnp.int32)
            return _add("head", x, y, (own.sites["head"],), (blocks,), layer, options)

        y = jax.lax.cond(jnp.any(has), add, lambda y: y, y)
    return y


def add_router(
    deltas: StepDeltas | None,
    x: Float[Array, "T D"],
    logits: Float[Array, "T E"],
    options: ModelOptions,
) -> Float[Array, "T E"]:
    """The router's logits of x, and what the tokens' adapters add to them.

    In full float32 whatever the model's dtype, as the router itself, and so in plain XLA where
    there is no kernel for that.
    """
    exact = replace(options, dtype="float32", lora="cpu" if options.lora == "cpu" else "xla")
    return add_delta(deltas, "router", x.astype(jnp.float32), logits, exact)


def _add(
    site: str,
    x: Float[Array, "T K"],
    y: Float[Array, "T *out"],
    weights: tuple[LoraWeights, ...],
    blocks: tuple[TokenBlocks, ...],
    layer: Int[Array, ""],
    options: ModelOptions,
) -> Float[Array, "T *out"]:
    """`lora_matmul`, on each device with its own part of the base's matrix."""
    parts = options.tensor_parallel
    summed = parts > 1 and site in _SPLIT_INPUTS and x.shape[1] % parts == 0

    def run(
        x: Array,
        y: Array,
        weights: tuple[LoraWeights, ...],
        blocks: tuple[TokenBlocks, ...],
        layer: Array,
    ) -> Float[Array, "T *out"]:
        flat = tuple(LoraWeights(a=own.a, b=own.b.reshape(*own.b.shape[:3], -1)) for own in weights)
        added = lora_matmul(
            x,
            y.reshape(y.shape[0], -1),
            flat,
            blocks,
            layer,
            cycle=_cycle(site, y),
            precision=precision(options),
            reduce=(lambda z: jax.lax.psum(z, TENSOR_AXES)) if summed else None,
            backend=options.lora,
        )
        return added.reshape(y.shape)

    if parts == 1:
        return run(x, y, weights, blocks, layer)
    split = _split_axis(site, y, parts)
    whole, inputs = PartitionSpec(), PartitionSpec(None, TENSOR_AXES) if summed else PartitionSpec()
    out = PartitionSpec(*(TENSOR_AXES if axis == split else None for axis in range(y.ndim)))
    b = PartitionSpec(None, None, None, *tuple(out)[1:])
    a = PartitionSpec(None, None, None, TENSOR_AXES) if summed else PartitionSpec()
    return jax.shard_map(
        run,
        in_specs=(inputs, out, (LoraWeights(a=a, b=b),) * len(weights), whole, whole),  # pyright: ignore[reportArgumentType]
        out_specs=out,
        axis_names=set(TENSOR_AXES),
        check_vma=False,
    )(x, y, weights, blocks, layer)


def _cycle(site: str, y: Float[Array, "T *out"]) -> tuple[int, ...]:
    """Widths of a site's parts in its flattened columns."""
    if site == "qkv":
        _, _, groups, size = y.shape
        return ((groups - 2) * size, size, size)
    if site == "gate_up":
        return (y.shape[2],) * 2
    return (y.shape[1],)


def _split_axis(site: str, y: Float[Array, "T *out"], parts: int) -> int | None:
    """Axis of y that devices share."""
    axis = {"qkv": 1, "gate_up": 2, "head": 1}.get(site)
    return axis if axis is not None and y.shape[axis] % parts == 0 else None


def by_class(
    classes: Sequence[SlotClass], slots: Int[Array, "T"]
) -> list[tuple[SlotClass, Int[Array, "T"]]]:
    """Each class, and the slots counted within it; outside of 0 … S - 1 where they are not its."""
    found, first = [], 0
    for own in classes:
        found.append((own, slots - first))
        first += own.num_slots
    return found


def has_deltas(flags: Bool[Array, "1 S"], slots: Int[Array, "T"]) -> Bool[Array, "T"]:
    """The flag of each token's slot; False where it has none in the class."""
    num_slots = flags.shape[1]
    inside = (slots >= 0) & (slots < num_slots)
    return flags[0, jnp.clip(slots, 0, num_slots - 1)] & inside
