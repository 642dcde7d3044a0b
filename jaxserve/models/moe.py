"""A mixture of experts: each token goes through the few gated MLPs that a router picks for it.

Source: arXiv 2101.03961, 2401.04088 and transformers' `modeling_mixtral`, `modeling_qwen3_moe`.

A step's (token, expert) pairs are sorted by expert, so that each expert multiplies its rows as one
group (`grouped_matmul`), and the results go back through the inverse permutation:

    token    0   1   2   3         pairs, sorted     ┌ expert 0: tokens 1 3       token t:
    experts  2,5 0,2 5,2 0,7   ──▶ by expert     ──▶ ┤ expert 2: tokens 0 1 2 ──▶ sum over its pairs
                                                     │ expert 5: tokens 0 2       of weight × row
                                                     └ expert 7: token 3

Padding tokens go to no expert, so that they cost no weights. Where experts are spread over devices,
each sorts the same pairs, with those of other devices' experts behind its own (`over_experts`).
Gate and up are two matrices: as one, [E, D, 2, F], a TPU would copy them into the shape that its
kernel takes.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxserve.errors import ConfigError, UnsupportedModel
from jaxserve.models.deltas import add_router
from jaxserve.models.expert_deltas import ExpertDeltas
from jaxserve.models.hf_config import HfConfig
from jaxserve.models.layers import ACTIVATIONS, MLP, GatedMLP, LayerInputs, PreNormLayer
from jaxserve.models.linear import exact_param, precision, random_matrix
from jaxserve.models.options import ModelOptions
from jaxserve.models.parallel import over_experts
from jaxserve.models.spec import LayerKind, ModelSpec, MoeSpec
from pallas_kernels.grouped_matmul import grouped_matmul


class ExpertMatrix(NamedTuple):
    """One matrix of each expert, those of other layers too where they are stacked.

    Attributes:
        weight: [E, K, N] or [L, E, K, N].
        scale: of this layer's codes; None where weight holds none.
    """

    weight: Float[Array, "*L E K N"] | Int[Array, "*L E K N"]
    scale: Float[Array, "E N"] | None


class ExpertMatrices(NamedTuple):
    """All of a layer's; gate and up [E, D, F], down [E, F, D]."""

    gate: ExpertMatrix
    up: ExpertMatrix
    down: ExpertMatrix


class Experts(nnx.Module):
    """One matrix of each expert of a layer."""

    def __init__(
        self,
        shape: tuple[int, int, int],
        axes: tuple[str, str, str],
        options: ModelOptions,
        rngs: nnx.Rngs,
    ) -> None:
        """Builds them with random weights; shape is E, K, N."""
        codes = options.quantization
        matrix = random_matrix(shape, 1, axes, codes, options, rngs, whole=True)
        self.weight, self.scale, _ = matrix

    def arrays(self) -> ExpertMatrix:
        """What the step is given."""
        return ExpertMatrix(self.weight[...], None if self.scale is None else self.scale[...])


class MixtureMLP(nnx.Module):
    """Sum over a token's experts of its weight for each times down(act(gate x) · up x)."""

    def __init__(self, spec: ModelSpec, options: ModelOptions, rngs: nnx.Rngs) -> None:
        """Builds it with random weights.

        Raises:
            ConfigError: options that have no experts.
        """
        if spec.moe is None:
            raise ValueError(f"{spec.architecture} has no experts")
        for name, reason in unsupported(options).items():
            raise ConfigError(f"{name} cannot run a mixture of experts: {reason}")
        self.moe = spec.moe
        self.activation = spec.activation
        self.options = options
        experts, size, wide = self.moe.num_experts, spec.hidden_size, self.moe.feed_forward
        router = jax.random.normal(rngs.params(), (size, experts)) / math.sqrt(size)
        self.router = exact_param(router, ("embed", None))
        into, out_of = ("experts", "embed", "expert_mlp"), ("experts", "expert_mlp", "embed")
        self.gate = Experts((experts, size, wide), into, options, rngs)
        self.up = Experts((experts, size, wide), into, options, rngs)
        self.down = Experts((experts, wide, size), out_of, options, rngs)

    def __call__(self, x: Float[Array, "T D"], inputs: LayerInputs) -> Float[Array, "T D"]:
        """Applies it to every token; padding comes out as zeros."""
        with jax.named_scope("router"):
            logits_TE = router_logits(x, self.router[...])
            logits_TE = add_router(inputs.deltas, x, logits_TE, self.options)
            experts_TA, weights_TA = route(logits_TE, self.moe)
            is_live_T = jnp.arange(x.shape[0]) < inputs.num_live
            experts_TA = jnp.where(is_live_T[:, None], experts_TA, self.moe.num_experts)
        matrices = ExpertMatrices(self.gate.arrays(), self.up.arrays(), self.down.arrays())
        mix = over_experts(self._mix, self.options, self.moe)
        deltas = ExpertDeltas.of(inputs.deltas)
        return mix(x, experts_TA, weights_TA, matrices, inputs.stack_index, deltas)

    def _mix(
        self,
        x: Float[Array, "T D"],
        experts_TA: Int[Array, "T A"],
        weights_TA: Float[Array, "T A"],
        matrices: ExpertMatrices,
        layer: Int[Array, ""] | None,
        deltas: ExpertDeltas | None,
        first_expert: Int[Array, ""] | int,
    ) -> Float[Array, "T D"]:
        """What the experts from `first_expert` on, those of `matrices`, add for each token.

        Args:
            experts_TA: of each token; num_experts for none.
            layer: whose matrices, where they are stacked.
            deltas: of the tokens' adapters; None where experts take none.
        """
        num_tokens, top_k = experts_TA.shape
        num_own = matrices.gate.weight.shape[-3]
        own_TA = experts_TA - first_expert
        own_TA = jnp.where((own_TA >= 0) & (own_TA < num_own), own_TA, num_own)
        expert_R = own_TA.reshape(-1)
        order_R = jnp.argsort(expert_R)
        sizes_E = jnp.sum(expert_R[:, None] == jnp.arange(num_own), axis=0, dtype=jnp.int32)
        token_R = order_R // top_k
        blocks = () if deltas is None else deltas.group(token_R, expert_R[order_R])

        def multiply(
            rows: Float[Array, "R K"], matrix: ExpertMatrix, site: str
        ) -> Float[Array, "R N"]:
            out = grouped_matmul(
                rows,
                matrix.weight.reshape(-1, *matrix.weight.shape[-2:]),
                sizes_E,
                first_group=0 if layer is None else layer * num_own,
                scale=matrix.scale,
                precision=precision(self.options),
                backend=self.options.experts,
            )
            return out if deltas is None else deltas.add(site, rows, out, blocks, self.options)

        rows = x[token_R]
        gate = multiply(rows, matrices.gate, "expert_gate")
        up = multiply(rows, matrices.up, "expert_up")
        hidden = ACTIVATIONS[self.activation](gate.astype(jnp.float32)) * up.astype(jnp.float32)
        out_RD = multiply(hidden.astype(x.dtype), matrices.down, "expert_down")
        out_TAD = out_RD[jnp.argsort(order_R)].reshape(num_tokens, top_k, -1)
        # Rows of no expert of this device are zero.
        mixed_TD = jnp.sum(out_TAD.astype(jnp.float32) * weights_TA[:, :, None], axis=1)
        return mixed_TD.astype(x.dtype)


class MixtureLayer(PreNormLayer):
    """A `PreNormLayer` whose MLP is a mixture where the layer's kind is sparse."""

    def _make_mlp(
        self, spec: ModelSpec, kind: LayerKind, options: ModelOptions, rngs: nnx.Rngs
    ) -> MLP:
        make = MixtureMLP if kind.sparse else GatedMLP
        return make(spec, options, rngs)


def router_logits(x: Float[Array, "T D"], router: Float[Array, "D E"]) -> Float[Array, "T E"]:
    """Of each token for each expert, in float32."""
    return jnp.dot(x.astype(jnp.float32), router, precision=jax.lax.Precision.HIGHEST)


def route(
    logits_TE: Float[Array, "T E"], moe: MoeSpec
) -> tuple[Int[Array, "T A"], Float[Array, "T A"]]:
    """Each token's experts, the likeliest first, and their weights, in float32.

    Of experts that are equally likely the first ones are taken.
    """
    top_TA, experts_TA = jax.lax.top_k(logits_TE, moe.top_k)
    among = top_TA if moe.norm_topk_prob else logits_TE
    weights_TA = jnp.exp(top_TA - jax.nn.logsumexp(among, axis=-1, keepdims=True))
    return experts_TA, weights_TA


def moe_spec(
    fields: HfConfig, feed_forward: int, *, norm_topk_prob: bool, default_experts: tuple[int, int]
) -> MoeSpec:
    """From a config's fields.

    Args:
        feed_forward: of one expert.
        default_experts: transformers' default of E, and of A.

    Raises:
        UnsupportedModel: they make no sense.
    """
    # transformers writes the first name from version 5 on, whatever the architecture.
    num_experts = fields.count(
        "num_local_experts" if fields.has("num_local_experts") else "num_experts",
        default_experts[0],
    )
    top_k = fields.count("num_experts_per_tok", default_experts[1])
    if top_k > num_experts:
        raise UnsupportedModel(
            f"config: num_experts_per_tok={top_k} must be at most the number of experts, "
            f"{num_experts}"
        )
    return MoeSpec(
        num_experts=num_experts,
        top_k=top_k,
        feed_forward=feed_forward,
        norm_topk_prob=norm_topk_prob,
    )


def unsupported(options: ModelOptions) -> dict[str, str]:
    """Settings under which there are no experts, and why."""
    reasons = {}
    if options.packed:
        reasons["kernels.matmul=cpu"] = NO_PACKED_EXPERTS
    if options.quantization == "fp8":
        reasons["weights.quantization=fp8"] = (
            "no product grouped by expert takes float8 on both sides: set weights.quantization=int8"
        )
    if options.quantization == "int4":
        reasons["weights.quantization=int4"] = (
            "XLA's grouped matmul reads 8-bit codes as they are, but 4-bit ones would be written "
            "out: set weights.quantization=int8"
        )
    return reasons


NO_PACKED_EXPERTS = "the native matmul has no product grouped by expert"
