"""What adapters add to the products of a mixture's experts.

The rows of a mixture are (token, expert) pairs. To the kernel each pair of slot and expert is a
slot of its own, number slot · E + expert, and the arrays of a class already lie so:

    a [L, S, E, R, K]  is  [L, S E, R, K]      b [L, S, E, R, N]  is  [L, S E, R, N]

so its work grows with the rows whose tokens use adapters with deltas of experts; the other rows
have no slot. Rows are sorted by expert, and each layer routes its tokens anew, so the blocks are
made in each layer.

Where experts are spread over devices each has the stacks of its own. Where devices share the
columns of gate and up, each has its part of z for down, and multiplies that by all of b: the sum
over devices that the mixture ends with adds these up too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from jaxserve.models.adapters import EXPERT_SITES
from jaxserve.models.deltas import StepDeltas, by_class, has_deltas
from jaxserve.models.linear import precision
from jaxserve.models.options import ModelOptions
from pallas_kernels.lora_matmul import LoraWeights, TokenBlocks, block_tokens, lora_matmul


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class ExpertDeltas:
    """The step's adapters in one mixture, of a device's own experts or of all.

    Attributes:
        classes: of slots; each has the arrays of every site of `EXPERT_SITES`.
        slots: of each class, the slot of each token in it; negative for none.
        layer: whose matrices.
    """

    classes: tuple[dict[str, LoraWeights], ...]
    slots: tuple[Int[Array, "T"], ...]
    layer: Int[Array, ""]

    @classmethod
    def of(cls, deltas: StepDeltas | None) -> ExpertDeltas | None:
        """Those of the step; None where experts take none."""
        if deltas is None or not EXPERT_SITES.keys() <= deltas.classes[0].sites.keys():
            return None
        return cls(
            classes=tuple({n: own.sites[n] for n in EXPERT_SITES} for own in deltas.classes),
            slots=tuple(
                jnp.where(has_deltas(own.has_experts, slots), slots, -1)
                for own, slots in by_class(deltas.classes, deltas.slots)
            ),
            layer=deltas.layer,
        )

    def specs(self, experts: str | None, columns: str | None) -> Any:
        """How they lie on the mesh.

        Args:
            experts, columns: its axes that experts, and the columns of gate and up, lie along.
        """
        lead = (None, None, experts, None)  # layers, slots, experts, ranks
        into, whole = PartitionSpec(*lead, columns), PartitionSpec(*lead, None)
        sites = {name: LoraWeights(a=whole, b=into) for name in EXPERT_SITES}  # pyright: ignore[reportArgumentType]
        sites["expert_down"] = LoraWeights(a=into, b=whole)  # pyright: ignore[reportArgumentType]
        spec: Any = PartitionSpec()
        return ExpertDeltas(
            classes=(sites,) * len(self.classes), slots=(spec,) * len(self.slots), layer=spec
        )

    def group(self, token_R: Int[Array, "R"], expert_R: Int[Array, "R"]) -> tuple[TokenBlocks, ...]:
        """The rows by slot and expert, for each class.

        Args:
            expert_R: of each row, among these; any other number for none.
        """
        blocks = []
        for sites, slots in zip(self.classes, self.slots, strict=True):
            _, num_slots, num_experts, *_ = sites["expert_gate"].a.shape
            slot_R = slots[token_R]
            used_R = (slot_R >= 0) & (expert_R >= 0) & (expert_R < num_experts)
            place_R = jnp.where(used_R, slot_R * num_experts + expert_R, -1)
            blocks.append(block_tokens(place_R, num_slots * num_experts))
        return tuple(blocks)

    def add(
        self,
        site: str,
        x: Float[Array, "R K"],
        y: Float[Array, "R N"],
        blocks: tuple[TokenBlocks, ...],
        options: ModelOptions,
    ) -> Float[Array, "R N"]:
        """y, the experts' products with x, and what the rows' adapters add to it."""
        flat = tuple(
            LoraWeights(a=_by_place(sites[site].a), b=_by_place(sites[site].b))
            for sites in self.classes
        )
        return lora_matmul(
            *(x, y, flat, blocks, self.layer),
            precision=precision(options),
            backend=options.lora,
        )


def _by_place(stack: Float[Array, "L S E R N"]) -> Float[Array, "L S*E R N"]:
    return stack.reshape(stack.shape[0], -1, *stack.shape[3:])
