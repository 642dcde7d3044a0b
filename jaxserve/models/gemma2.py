"""Gemma 2: norms before and after each part, soft caps, alternating local and global attention.

Source: arXiv 2408.00118 and transformers' `modeling_gemma2`. Norm scales are stored minus one;
the embeddings are multiplied by the root of the hidden size.
"""

from __future__ import annotations

from typing import Any

from jaxserve.models import hf_tensors
from jaxserve.models.decoder import Decoder
from jaxserve.models.hf_config import HfConfig
from jaxserve.models.hf_tensors import Rules
from jaxserve.models.layers import SandwichLayer
from jaxserve.models.llama import kv_heads
from jaxserve.models.spec import AttentionSpec, LayerKind, ModelSpec, TensorRule

_NORMS = {
    "attention_norm": "input_layernorm",
    "attention_post_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm",
}


class Gemma2(Decoder):
    """Gemma2ForCausalLM."""

    layer_class = SandwichLayer

    @classmethod
    def spec_from_hf(cls, config: dict[str, Any]) -> ModelSpec:
        """See `Decoder.spec_from_hf`."""
        fields = HfConfig(config)
        num_layers = fields.count("num_hidden_layers")
        types = fields.layer_types(num_layers) or tuple(
            "full_attention" if i % 2 else "sliding_attention" for i in range(num_layers)
        )
        rope = fields.rope(10000.0)
        window = gemma_window(fields)
        return gemma_spec(
            fields,
            architecture="Gemma2ForCausalLM",
            layers=tuple(
                LayerKind(rope=rope, window=window if kind == "sliding_attention" else None)
                for kind in types
            ),
            max_context=8192,
            soft_cap=soft_cap(fields, "attn_logit_softcapping", 50.0),
            logit_soft_cap=soft_cap(fields, "final_logit_softcapping", 30.0),
        )

    @classmethod
    def layer_tensors(cls, spec: ModelSpec, kind: LayerKind, prefix: str) -> Rules:
        """See `Decoder.layer_tensors`."""
        return {
            **{
                (ours, "scale"): hf_tensors.norm(f"{prefix}.{theirs}.weight", spec.hidden_size, 1.0)
                for ours, theirs in _NORMS.items()
            },
            **hf_tensors.within(
                ("attention",), hf_tensors.attention(f"{prefix}.self_attn", spec, 1.0)
            ),
            **hf_tensors.within(("mlp",), hf_tensors.gated_mlp(f"{prefix}.mlp", spec)),
        }

    @classmethod
    def final_norm(cls, spec: ModelSpec) -> TensorRule:
        """See `Decoder.final_norm`."""
        return hf_tensors.norm(f"{spec.tensor_prefix}model.norm.weight", spec.hidden_size, 1.0)


def gemma_spec(
    fields: HfConfig,
    *,
    architecture: str,
    layers: tuple[LayerKind, ...],
    max_context: int,
    soft_cap: float | None,
    logit_soft_cap: float | None,
    qk_norm: bool = False,
    tensor_prefix: str = "",
) -> ModelSpec:
    """The spec of a Gemma, from the fields that Gemma 2 and 3 share."""
    fields.refuse("use_bidirectional_attention", False)
    fields.refuse("mlp_bias", False)
    hidden_size = fields.count("hidden_size", 2304)
    num_heads = fields.count("num_attention_heads", 8)
    bias = fields.flag("attention_bias", False)
    return ModelSpec(
        architecture=architecture,
        vocab_size=fields.count("vocab_size"),
        hidden_size=hidden_size,
        feed_forward=fields.count("intermediate_size", 9216),
        max_context=fields.count("max_position_embeddings", max_context),
        eos_token_ids=fields.token_ids("eos_token_id"),
        attention=AttentionSpec(
            num_heads=num_heads,
            num_kv_heads=kv_heads(fields, num_heads, 4),
            head_dim=fields.head_dim(256),
            scale=fields.number("query_pre_attn_scalar", 256) ** -0.5,
            qkv_bias=bias,
            output_bias=bias,
            qk_norm=qk_norm,
            soft_cap=soft_cap,
        ),
        layers=layers,
        activation=fields.activation("hidden_activation", "gelu_pytorch_tanh"),
        norm_eps=fields.number("rms_norm_eps", 1e-6),
        tied=fields.flag("tie_word_embeddings", True),
        embed_scale=hidden_size**0.5,
        logit_soft_cap=logit_soft_cap,
        tensor_prefix=tensor_prefix,
    )


def gemma_window(fields: HfConfig) -> int | None:
    """Window of the local layers; null means none, an absent key transformers' default."""
    if "sliding_window" in fields.fields and not fields.has("sliding_window"):
        return None
    return fields.count("sliding_window", 4096)


def soft_cap(fields: HfConfig, name: str, default: float) -> float | None:
    """A cap; null means none, an absent key transformers' default."""
    if name in fields.fields and not fields.has(name):
        return None
    return fields.number(name, default)
