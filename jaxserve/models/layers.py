"""Layers that all decoders share: norm, gated MLP, attention over the paged cache.

Token axis first everywhere: `[T, …]`, decoding rows and chunks of a step in one axis, as
`models.context` describes. Query and key heads are fused in one projection whose output is
[T, K, G + 2, H]: for each KV head its G query heads, its key and its value. So the "kv_heads" axis
can be sharded, and query head n reads KV head n // G.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxserve.models.context import GroupPages
from jaxserve.models.deltas import StepDeltas, add_delta
from jaxserve.models.linear import Linear, exact_param
from jaxserve.models.options import ModelOptions
from jaxserve.models.parallel import over_heads
from jaxserve.models.rotary import rotate
from jaxserve.models.spec import LayerKind, ModelSpec
from pallas_kernels.paged_attention.api import write_and_attend
from pallas_kernels.ragged import RaggedBatch

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
}


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class LayerInputs:
    """What a layer is given beside the residual stream and its group's pages.

    Attributes:
        index: of the layer in its cache group.
        stack_index: of the layer in its stacked weights, for kernels that take the stack; None
            where they are not stacked.
        batch, token_pages, token_offsets: of that group, see `StepContext`.
        rotary: cosine and sine of every token for the layer's rotary embedding.
        num_live: tokens that are not padding.
        deltas: of the tokens' adapters, in this layer; None in programs without.
    """

    index: Int[Array, ""]
    stack_index: Int[Array, ""] | None
    batch: RaggedBatch
    token_pages: Int[Array, "T"]
    token_offsets: Int[Array, "T"]
    rotary: tuple[Float[Array, "T H/2"], Float[Array, "T H/2"]]
    num_live: Int[Array, ""]
    deltas: StepDeltas | None = None


def normalize(x: Float[Array, "... D"], eps: float) -> Float[Array, "... D"]:
    """x over its root mean square along the last axis, in float32."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps)


class RMSNorm(nnx.Module):
    """Root-mean-square norm (arXiv 1910.07467) with a float32 scale."""

    def __init__(self, size: int, eps: float, axis: str | None = "embed") -> None:
        self.eps = eps
        self.scale = exact_param(jnp.ones(size), (axis,))

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """Computed in float32, returned in x's dtype."""
        return (normalize(x, self.eps) * self.scale[...]).astype(x.dtype)


class GatedMLP(nnx.Module):
    """down(act(gate x) · up x), gate and up in one matmul (arXiv 2002.05202)."""

    def __init__(self, spec: ModelSpec, options: ModelOptions, rngs: nnx.Rngs) -> None:
        self.activation = spec.activation
        self.options = options
        self.gate_up = Linear(
            spec.hidden_size,
            (2, spec.feed_forward),
            options,
            axes=("embed", None, "mlp"),
            rngs=rngs,
            bias=spec.mlp_bias,
        )
        self.down = Linear(
            spec.feed_forward,
            (spec.hidden_size,),
            options,
            axes=("mlp", "embed"),
            rngs=rngs,
            bias=spec.mlp_bias,
        )

    def __call__(self, x: Float[Array, "T D"], inputs: LayerInputs) -> Float[Array, "T D"]:
        """Applies it to every token."""
        place, deltas = (inputs.num_live, inputs.stack_index), inputs.deltas
        gate_up = add_delta(deltas, "gate_up", x, self.gate_up(x, *place), self.options)
        gate, up = gate_up[:, 0].astype(jnp.float32), gate_up[:, 1].astype(jnp.float32)
        hidden = (ACTIVATIONS[self.activation](gate) * up).astype(x.dtype)
        return add_delta(deltas, "down", hidden, self.down(hidden, *place), self.options)


class Attention(nnx.Module):
    """Grouped-query attention: writes the step's keys and values to the pages, then reads them."""

    def __init__(
        self, spec: ModelSpec, kind: LayerKind, options: ModelOptions, rngs: nnx.Rngs
    ) -> None:
        attention = spec.attention
        self.spec = attention
        self.window = kind.window
        self.options = options
        self.qkv = Linear(
            spec.hidden_size,
            (attention.held_kv_heads, attention.queries_per_kv + 2, attention.head_dim),
            options,
            axes=("embed", "kv_heads", None, None),
            rngs=rngs,
            bias=attention.qkv_bias,
        )
        self.out = Linear(
            attention.held_heads * attention.head_dim,
            (spec.hidden_size,),
            options,
            axes=("heads", "embed"),
            rngs=rngs,
            bias=attention.output_bias,
        )
        norm = attention.qk_norm
        self.q_norm = RMSNorm(attention.head_dim, spec.norm_eps, None) if norm else None
        self.k_norm = RMSNorm(attention.head_dim, spec.norm_eps, None) if norm else None

    def __call__(
        self, x: Float[Array, "T D"], pages: GroupPages, inputs: LayerInputs
    ) -> tuple[Float[Array, "T D"], GroupPages]:
        """Returns the output and the pages with the step's keys and values in them."""
        groups = self.spec.queries_per_kv
        place, deltas = (inputs.num_live, inputs.stack_index), inputs.deltas
        qkv = add_delta(deltas, "qkv", x, self.qkv(x, *place), self.options)
        qk_TKGH, v_TKH = qkv[:, :, : groups + 1], qkv[:, :, groups + 1]
        if self.q_norm is not None and self.k_norm is not None:
            scale = jnp.stack([self.q_norm.scale[...]] * groups + [self.k_norm.scale[...]])
            qk_TKGH = (normalize(qk_TKGH, self.q_norm.eps) * scale).astype(x.dtype)
        qk_TKGH = rotate(qk_TKGH, inputs.rotary)
        attend = over_heads(self._attend, self.options)
        mixed_TKGH, pages = attend(qk_TKGH, v_TKH, pages, replace(inputs, deltas=None))
        mixed = mixed_TKGH.reshape(x.shape[0], -1)
        return add_delta(deltas, "out", mixed, self.out(mixed, *place), self.options), pages

    def _attend(
        self,
        qk_TKGH: Float[Array, "T K G+1 H"],
        v_TKH: Float[Array, "T K H"],
        pages: GroupPages,
        inputs: LayerInputs,
    ) -> tuple[Float[Array, "T K G H"], GroupPages]:
        """The kernels, over some of the KV heads and their queries."""
        num_tokens, num_kv_heads, _, head_dim = qk_TKGH.shape
        mixed_TNH, kv = write_and_attend(
            qk_TKGH[:, :, :-1].reshape(num_tokens, -1, head_dim),
            qk_TKGH[:, :, -1],
            v_TKH,
            pages.kv,
            inputs.index,
            inputs.batch,
            (inputs.token_pages, inputs.token_offsets),
            scale=self.spec.scale,
            window=self.window,
            soft_cap=self.spec.soft_cap,
            backend=self.options.attention,
        )
        return mixed_TNH.reshape(num_tokens, num_kv_heads, -1, head_dim), GroupPages(kv=kv)


class MLP(Protocol):
    """What a layer does to each token by itself."""

    def __call__(self, x: Float[Array, "T D"], inputs: LayerInputs) -> Float[Array, "T D"]:
        """Applies it to every token."""
        ...


class PreNormLayer(nnx.Module):
    """x + attention(norm x), then x + mlp(norm x): Llama, Mistral, Qwen, Mixtral."""

    def __init__(
        self, spec: ModelSpec, kind: LayerKind, options: ModelOptions, rngs: nnx.Rngs
    ) -> None:
        self.attention_norm = RMSNorm(spec.hidden_size, spec.norm_eps)
        self.attention = Attention(spec, kind, options, rngs)
        self.mlp_norm = RMSNorm(spec.hidden_size, spec.norm_eps)
        self.mlp = self._make_mlp(spec, kind, options, rngs)

    def _make_mlp(
        self, spec: ModelSpec, kind: LayerKind, options: ModelOptions, rngs: nnx.Rngs
    ) -> MLP:
        return GatedMLP(spec, options, rngs)

    def __call__(
        self, x: Float[Array, "T D"], pages: GroupPages, inputs: LayerInputs
    ) -> tuple[Float[Array, "T D"], GroupPages]:
        """Returns the residual stream and the pages."""
        mixed, pages = self.attention(self.attention_norm(x), pages, inputs)
        x = x + mixed
        return x + self.mlp(self.mlp_norm(x), inputs), pages


class SandwichLayer(nnx.Module):
    """x + norm(attention(norm x)), then x + norm(mlp(norm x)): Gemma 2 and 3."""

    def __init__(
        self, spec: ModelSpec, kind: LayerKind, options: ModelOptions, rngs: nnx.Rngs
    ) -> None:
        self.attention_norm = RMSNorm(spec.hidden_size, spec.norm_eps)
        self.attention = Attention(spec, kind, options, rngs)
        self.attention_post_norm = RMSNorm(spec.hidden_size, spec.norm_eps)
        self.mlp_norm = RMSNorm(spec.hidden_size, spec.norm_eps)
        self.mlp = GatedMLP(spec, options, rngs)
        self.mlp_post_norm = RMSNorm(spec.hidden_size, spec.norm_eps)

    def __call__(
        self, x: Float[Array, "T D"], pages: GroupPages, inputs: LayerInputs
    ) -> tuple[Float[Array, "T D"], GroupPages]:
        """Returns the residual stream and the pages."""
        mixed, pages = self.attention(self.attention_norm(x), pages, inputs)
        x = x + self.attention_post_norm(mixed)
        return x + self.mlp_post_norm(self.mlp(self.mlp_norm(x), inputs)), pages
