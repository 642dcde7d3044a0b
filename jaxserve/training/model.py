"""The served decoder over whole rows: the same layers and weights, without pages, with deltas.

Each layer runs as serving runs it (norms, projections, rotary embedding, MLP), but for two parts
that are put in its place: attention reads the row's own keys and values instead of pages, and a
linear layer adds what its targets' deltas say. So there is no second model to keep in step.

Memory: of a layer's forward pass only the matmuls' results are kept for the backward pass; norms,
activations and attention's scores are computed again. The loss takes logits a chunk of tokens at a
time, those that are learned first, and skips chunks with none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32, Int, PRNGKeyArray

from jaxserve.models.context import GroupPages
from jaxserve.models.decoder import Decoder, Layer, layer_stacks
from jaxserve.models.layers import Attention, GatedMLP, LayerInputs
from jaxserve.models.linear import Linear, precision
from jaxserve.models.rotary import rotary_table
from jaxserve.training.adapter import Delta, Deltas
from jaxserve.training.packing import Rows
from jaxserve.training.recipe import TARGETS

#: Tokens whose logits exist at once.
_LOSS_CHUNK = 256
_NO_PAGES = cast(GroupPages, None)
_KEPT = jax.checkpoint_policies.dots_with_no_batch_dims_saveable


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class RowInputs(LayerInputs):
    """What a layer is given over whole rows.

    Attributes:
        segments: which example of its row each token belongs to, see `Rows`.
    """

    segments: Int[Array, "B S"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Dose:
    """How the deltas of a layer are applied.

    Attributes:
        scale: they are multiplied by it.
        dropout: share of their inputs that is zeroed.
        key: of the dropout in this layer and step; None zeroes none.
    """

    scale: float = field(metadata={"static": True})
    dropout: float = field(default=0.0, metadata={"static": True})
    key: PRNGKeyArray | None = None

    def of_layer(self, layer: Int[Array, ""] | int) -> Dose:
        """The same with a key of the layer's own."""
        return self if self.key is None else replace(self, key=jax.random.fold_in(self.key, layer))

    def drop(self, x: Float[Array, "T in"], target: str) -> Float[Array, "T in"]:
        """The input of a target's delta."""
        if self.key is None or not self.dropout:
            return x
        key, keep = jax.random.fold_in(self.key, TARGETS.index(target)), 1 - self.dropout
        return jnp.where(jax.random.bernoulli(key, keep, x.shape), x / keep, 0)


class AdaptedLinear:
    """A linear layer, and beside it the deltas of the targets that it was fused from.

    Args:
        shapes: of each target's output in the layer's; joined along `axis` they are all of it.
    """

    def __init__(
        self,
        base: Linear,
        shapes: Mapping[str, tuple[int, ...]],
        axis: int,
        deltas: Mapping[str, Delta],
        dose: Dose,
    ) -> None:
        self._base = base
        self._shapes = shapes
        self._axis = axis
        self._deltas = deltas
        self._dose = dose

    def __call__(self, x: Float[Array, "T in"], *place: Any) -> Float[Array, "T *out"]:
        """As `Linear`."""
        y = self._base(x, *place)
        if self._deltas.keys().isdisjoint(self._shapes):
            return y
        parts = [self._part(x, target, shape) for target, shape in self._shapes.items()]
        return y + jnp.concatenate(parts, axis=self._axis).astype(y.dtype)

    def _part(
        self, x: Float[Array, "T in"], target: str, shape: tuple[int, ...]
    ) -> Float[Array, "T *part"]:
        delta, exactly = self._deltas.get(target), precision(self._base.options)
        if delta is None:
            return jnp.zeros((x.shape[0], *shape), x.dtype)
        low = jnp.dot(self._dose.drop(x, target), delta.a.astype(x.dtype), precision=exactly)
        high = jnp.dot(low, delta.b.astype(x.dtype), precision=exactly)
        return (self._dose.scale * high).reshape(-1, *shape)


class RowAttention(Attention):
    """Attention over whole rows, with deltas: a served layer's parts, put together anew."""

    def __init__(self, served: Attention, deltas: Mapping[str, Delta], dose: Dose) -> None:
        self.spec = served.spec
        self.window = served.window
        self.options = served.options
        self.q_norm, self.k_norm = served.q_norm, served.k_norm
        heads, groups, size = self.spec.num_kv_heads, self.spec.queries_per_kv, self.spec.head_dim
        shapes = {"q_proj": (heads, groups, size), "k_proj": (heads, 1, size)}
        shapes["v_proj"] = shapes["k_proj"]
        self.qkv = AdaptedLinear(served.qkv, shapes, 2, deltas, dose)
        self.out = AdaptedLinear(served.out, {"o_proj": served.out.out_dims}, 1, deltas, dose)

    def _attend(
        self,
        qk_TKGH: Float[Array, "T K G+1 H"],
        v_TKH: Float[Array, "T K H"],
        pages: GroupPages,
        inputs: LayerInputs,
    ) -> tuple[Float[Array, "T K G H"], GroupPages]:
        """Each token over those before it in its segment."""
        segments = cast(RowInputs, inputs).segments
        num_rows, length = segments.shape
        qk = qk_TKGH.reshape(num_rows, length, *qk_TKGH.shape[1:])
        v = v_TKH.reshape(num_rows, length, *v_TKH.shape[1:])
        exactly = precision(self.options)
        scores = self.spec.scale * jnp.einsum(
            "BSKGH,BTKH->BKGST",
            qk[:, :, :, :-1],
            qk[:, :, :, -1],
            precision=exactly,
            preferred_element_type=jnp.float32,
        )
        if self.spec.soft_cap is not None:
            scores = self.spec.soft_cap * jnp.tanh(scores / self.spec.soft_cap)
        ages = jnp.arange(length)[:, None] - jnp.arange(length)
        is_seen = (ages >= 0) & (ages < (self.window or length))
        is_seen = is_seen & (segments[:, :, None] == segments[:, None, :])
        scores = jnp.where(is_seen[:, None, None], scores, -jnp.inf)
        shares = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
        mixed = jnp.einsum("BKGST,BTKH->BSKGH", shares, v, precision=exactly)
        return mixed.reshape(-1, *mixed.shape[2:]), pages


class RowMLP(GatedMLP):
    """A served gated MLP with deltas."""

    def __init__(self, served: GatedMLP, deltas: Mapping[str, Delta], dose: Dose) -> None:
        self.activation = served.activation
        self.options = served.gate_up.options
        wide = (1, served.gate_up.out_dims[1])
        shapes = {"gate_proj": wide, "up_proj": wide}
        self.gate_up = AdaptedLinear(served.gate_up, shapes, 1, deltas, dose)
        shapes = {"down_proj": served.down.out_dims}
        self.down = AdaptedLinear(served.down, shapes, 1, deltas, dose)


def hidden_states(model: Decoder, deltas: Deltas, rows: Rows, dose: Dose) -> Float[Array, "B S D"]:
    """Hidden states after the final norm, of every token of the rows [B, S]."""
    x = model.embed.lookup(jnp.asarray(rows.token_ids).reshape(-1))
    if model.spec.embed_scale != 1.0:
        x = x * jnp.asarray(model.spec.embed_scale, x.dtype)
    positions = jnp.asarray(rows.positions).reshape(-1)
    head_dim = model.spec.attention.head_dim
    tables = {
        rope: rotary_table(rope, head_dim, positions)
        for rope in dict.fromkeys(kind.rope for kind in model.spec.layers)
    }

    def run(layer: Layer, x: Array, of_layer: dict[str, Delta], example: int, index: Any) -> Array:
        """Runs `layer`, of the kind of layer `example`, at `index` of them all."""
        inputs = RowInputs(
            index=jnp.int32(0),
            stack_index=None,
            batch=cast(Any, None),
            token_pages=cast(Any, None),
            token_offsets=cast(Any, None),
            rotary=tables[model.spec.layers[example].rope],
            num_live=jnp.int32(x.shape[0]),
            segments=jnp.asarray(rows.segments),
        )
        return _run_layer(nnx.split(layer), x, of_layer, inputs, dose.of_layer(index))

    stacks = layer_stacks(model.spec, model.options)
    period = sum(len(indices) > 1 for indices in stacks)
    if period:
        parts = [nnx.split(layer) for layer in model.layers[:period]]

        def body(x: Array, block: Any) -> tuple[Array, None]:
            arrays, of_layers, places = block
            for (kind, _), own, of_layer, indices, index in zip(
                parts, arrays, of_layers, stacks, places, strict=False
            ):
                x = run(nnx.merge(kind, own), x, of_layer, indices[0], index)
            return x, None

        places = [jnp.asarray(indices) for indices in stacks[:period]]
        x, _ = jax.lax.scan(body, x, ([own for _, own in parts], deltas[:period], places))
    for entry in range(period, len(stacks)):
        x = run(model.layers[entry], x, deltas[entry], stacks[entry][0], stacks[entry][0])
    return model.norm(x).reshape(*rows.token_ids.shape, -1)


@partial(jax.checkpoint, policy=_KEPT)
def _run_layer(
    split: Any, x: Array, deltas: dict[str, Delta], inputs: RowInputs, dose: Dose
) -> Array:
    layer = nnx.merge(*split)
    layer.attention = RowAttention(layer.attention, deltas, dose)
    if isinstance(layer.mlp, GatedMLP):
        layer.mlp = RowMLP(layer.mlp, deltas, dose)
    return layer(x, _NO_PAGES, inputs)[0]


def loss_sum(
    model: Decoder, deltas: Deltas, rows: Rows, dose: Dose
) -> tuple[Float32[Array, ""], Int[Array, ""]]:
    """Sum of the learned targets' negative log-probabilities, in nats, and how many they are."""
    hidden = hidden_states(model, deltas, rows, dose)
    is_learned = jnp.asarray(rows.is_learned).reshape(-1)
    chunk = math.gcd(_LOSS_CHUNK, is_learned.size)
    order = jnp.argsort(~is_learned)
    chunks = (
        hidden.reshape(-1, hidden.shape[-1])[order].reshape(-1, chunk, hidden.shape[-1]),
        jnp.asarray(rows.targets).reshape(-1)[order].reshape(-1, chunk),
        is_learned[order].reshape(-1, chunk),
    )

    @jax.checkpoint
    def of_chunk(hidden: Array, targets: Array, is_learned: Array) -> Array:
        logits = model.logits(hidden)
        at_target = jnp.take_along_axis(logits, targets[:, None], axis=1)[:, 0]
        lost = jax.nn.logsumexp(logits, axis=-1) - at_target
        return jnp.sum(jnp.where(is_learned, lost, 0.0))

    def add(total: Array, chunk: tuple[Array, Array, Array]) -> tuple[Array, None]:
        return total + jax.lax.cond(
            chunk[2].any(), of_chunk, lambda *_: jnp.float32(0), *chunk
        ), None

    total, _ = jax.lax.scan(add, jnp.float32(0), chunks)
    return total, jnp.sum(is_learned, dtype=jnp.int32)
