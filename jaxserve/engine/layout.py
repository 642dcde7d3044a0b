"""How a model was dealt out over the devices, in words: what they do not share evenly, its cost."""

from __future__ import annotations

import logging

from jax.sharding import Mesh

from jaxserve.device.sharding import undivided
from jaxserve.models.decoder import Decoder
from jaxserve.models.spec import AttentionSpec, MoeSpec
from pallas_kernels.grouped_matmul import TPU_LANES

logger = logging.getLogger(__name__)


def log_layout(model: Decoder, mesh: Mesh) -> None:
    """What the devices do not share evenly, and what that costs."""
    experts = describe_experts(model.spec.moe, mesh.shape["model"])
    if experts and mesh.devices.flat[0].platform == "tpu":
        logger.warning("experts: %s", experts)
    if mesh.size == 1:
        return
    logger.info("mesh: %s", ", ".join(f"{n} {axis}" for axis, n in mesh.shape.items()))
    heads = describe_heads(model.spec.attention)
    if heads:
        logger.warning("attention heads: %s", heads)
    for name in undivided(mesh, model.params().items()):
        logger.warning("whole on every device, which do not divide it: %s", name)


def describe_heads(sizes: AttentionSpec) -> str:
    """How attention heads were dealt out, where not simply; empty where they were."""
    found = []
    if sizes.kv_copies > 1:
        found.append(f"{sizes.num_kv_heads} KV heads are held {sizes.kv_copies} times")
    if sizes.kv_padding:
        found.append(f"{sizes.kv_padding} KV heads of zeros fill up")
    if sizes.held_heads > sizes.num_heads:
        zeros = sizes.held_heads - sizes.num_heads
        found.append(f"{zeros} of {sizes.held_heads} query heads are zeros")
    return ", ".join(found)


def describe_experts(moe: MoeSpec | None, parts: int) -> str:
    """What a TPU has to do beside the experts' products; empty where nothing.

    Args:
        parts: of an expert's columns, one on each device of the mesh's "model" axis.
    """
    if moe is None:
        return ""
    columns = moe.feed_forward if moe.feed_forward % parts else moe.feed_forward // parts
    if columns % TPU_LANES == 0:
        return ""
    return (
        f"{columns} columns of each on a device are no multiple of {TPU_LANES}, so that XLA copies "
        "gate and up in every step"
        + ("; a higher parallel.expert and lower parallel.model avoid it" if parts > 1 else "")
    )
