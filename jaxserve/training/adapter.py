"""The adapter that is trained: A and B of every target, laid out as the decoder's layers are.

Math: a target's output gains scale · (x A) B, with x [T, in], A [in, R], B [R, out]. A is random
and B zero at first, so that training begins at the base model (arXiv 2106.09685). Float32, whatever
the model's dtype.

An entry of `Decoder.layers` that holds several layers has their A and B stacked likewise, for the
scan. In files it is peft's: each layer's matrices apart, transposed (`formats.peft`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, PRNGKeyArray

from jaxserve.errors import ConfigError
from jaxserve.formats.peft import Adapter, LoraModule
from jaxserve.formats.peft_config import PeftConfig
from jaxserve.models.decoder import layer_stacks
from jaxserve.models.options import ModelOptions
from jaxserve.models.spec import ModelSpec
from jaxserve.training.recipe import ATTENTION_TARGETS, MLP_TARGETS, Recipe


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Delta:
    """One target's matrices, in one layer or in several that are stacked."""

    a: Float32[Array, "*L in R"]
    b: Float32[Array, "*L R out"]


#: By entry of `Decoder.layers`, the deltas of its targets.
Deltas = tuple[dict[str, Delta], ...]


def shapes(spec: ModelSpec) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of every linear layer that can have a delta."""
    sizes = spec.attention
    wide, heads = spec.hidden_size, sizes.num_heads * sizes.head_dim
    kv_heads = sizes.num_kv_heads * sizes.head_dim
    return {
        "q_proj": (wide, heads),
        "k_proj": (wide, kv_heads),
        "v_proj": (wide, kv_heads),
        "o_proj": (heads, wide),
        "gate_proj": (wide, spec.feed_forward),
        "up_proj": (wide, spec.feed_forward),
        "down_proj": (spec.feed_forward, wide),
    }


def init(spec: ModelSpec, options: ModelOptions, recipe: Recipe, key: PRNGKeyArray) -> Deltas:
    """A of variance 1 / in, B of zeros.

    Raises:
        ConfigError: a target that this model has not.
    """
    in_mlp = [target for target in recipe.targets if target in MLP_TARGETS]
    if in_mlp and any(kind.sparse for kind in spec.layers):
        raise ConfigError(
            f"--targets has {in_mlp[0]}, but this model's MLPs are mixtures of experts, which take "
            f"no adapter: give some of {','.join(ATTENTION_TARGETS)}"
        )
    deltas = []
    for entry, indices in enumerate(layer_stacks(spec, options)):
        stack = (len(indices),) if len(indices) > 1 else ()
        of_entry = {}
        for place, target in enumerate(recipe.targets):
            inputs, outputs = shapes(spec)[target]
            own = jax.random.fold_in(jax.random.fold_in(key, entry), place)
            a = jax.random.normal(own, (*stack, inputs, recipe.rank)) / math.sqrt(inputs)
            of_entry[target] = Delta(a=a, b=jnp.zeros((*stack, recipe.rank, outputs)))
        deltas.append(of_entry)
    return tuple(deltas)


def module_name(spec: ModelSpec, layer: int, target: str) -> str:
    """A target's name in peft's files, which is HF's."""
    part = "self_attn" if target in ATTENTION_TARGETS else "mlp"
    return f"{spec.tensor_prefix}model.layers.{layer}.{part}.{target}"


def to_peft(
    deltas: Deltas,
    spec: ModelSpec,
    options: ModelOptions,
    recipe: Recipe,
    *,
    base_model: str,
    dtype: np.dtype,
) -> Adapter:
    """The adapter as peft stores it.

    Args:
        base_model: what the model is called.
        dtype: of the stored matrices.
    """
    modules: dict[str, LoraModule] = {}
    for indices, of_entry in zip(layer_stacks(spec, options), deltas, strict=True):
        for target, delta in of_entry.items():
            a, b = np.asarray(delta.a), np.asarray(delta.b)
            a, b = a.reshape(-1, *a.shape[-2:]), b.reshape(-1, *b.shape[-2:])
            for layer, of_layer_a, of_layer_b in zip(indices, a, b, strict=True):
                modules[module_name(spec, layer, target)] = LoraModule(
                    a=np.ascontiguousarray(of_layer_a.T).astype(dtype),
                    b=np.ascontiguousarray(of_layer_b.T).astype(dtype),
                    scale=recipe.scale,
                )
    config = PeftConfig(
        rank=recipe.rank,
        alpha=recipe.alpha,
        rslora=recipe.rslora,
        target_modules=recipe.targets,
        base_model=base_model,
    )
    return Adapter(config=config, modules=modules)
