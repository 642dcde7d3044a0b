"""The Llama family: Llama 2 and 3, SmolLM2, and Mistral, which adds a sliding window.

Pre-norm layers with grouped-query attention, rotary positions and a SwiGLU MLP. Source:
arXiv 2302.13971, 2310.06825 and transformers' `modeling_llama`, `modeling_mistral`.
"""

from __future__ import annotations

from typing import Any

from jaxserve.errors import UnsupportedModel
from jaxserve.models import hf_tensors
from jaxserve.models.decoder import Decoder
from jaxserve.models.hf_config import HfConfig
from jaxserve.models.hf_tensors import Rules
from jaxserve.models.spec import AttentionSpec, LayerKind, ModelSpec


class Llama(Decoder):
    """LlamaForCausalLM."""

    @classmethod
    def spec_from_hf(cls, config: dict[str, Any]) -> ModelSpec:
        """See `Decoder.spec_from_hf`."""
        fields = HfConfig(config)
        num_layers = fields.count("num_hidden_layers")
        fields.refuse("layer_types", ["full_attention"] * num_layers)
        fields.refuse("sliding_window")
        kind = LayerKind(rope=fields.rope(10000.0))
        return dense_spec(
            fields,
            architecture="LlamaForCausalLM",
            layers=(kind,) * num_layers,
            max_context=2048,
            attention_bias=fields.flag("attention_bias", False),
            mlp_bias=fields.flag("mlp_bias", False),
        )

    @classmethod
    def layer_tensors(cls, spec: ModelSpec, kind: LayerKind, prefix: str) -> Rules:
        """See `Decoder.layer_tensors`."""
        return pre_norm_tensors(spec, prefix)


class Mistral(Decoder):
    """MistralForCausalLM: all layers slide where `sliding_window` is set."""

    @classmethod
    def spec_from_hf(cls, config: dict[str, Any]) -> ModelSpec:
        """See `Decoder.spec_from_hf`."""
        fields = HfConfig(config)
        num_layers = fields.count("num_hidden_layers")
        for name in ("attention_bias", "mlp_bias"):
            fields.refuse(name, False)
        # transformers' default is 4096 where the key is absent, and no window where it is null
        window = fields.count("sliding_window", 4096)
        slides = "sliding_window" not in config or fields.has("sliding_window")
        whole = "sliding_attention" if slides else "full_attention"
        fields.refuse("layer_types", [whole] * num_layers)
        kind = LayerKind(rope=fields.rope(10000.0), window=window if slides else None)
        return dense_spec(
            fields,
            architecture="MistralForCausalLM",
            layers=(kind,) * num_layers,
            max_context=131072,
            default_kv_heads=8,
        )

    @classmethod
    def layer_tensors(cls, spec: ModelSpec, kind: LayerKind, prefix: str) -> Rules:
        """See `Decoder.layer_tensors`."""
        return pre_norm_tensors(spec, prefix)


def pre_norm_tensors(spec: ModelSpec, prefix: str) -> Rules:
    """Tensors of a `PreNormLayer` under the names that Llama, Mistral and Qwen share."""
    return {
        **attention_tensors(spec, prefix),
        **hf_tensors.within(("mlp",), hf_tensors.gated_mlp(f"{prefix}.mlp", spec)),
    }


def attention_tensors(spec: ModelSpec, prefix: str) -> Rules:
    """The same, without the MLP."""
    size = spec.hidden_size
    return {
        ("attention_norm", "scale"): hf_tensors.norm(f"{prefix}.input_layernorm.weight", size),
        ("mlp_norm", "scale"): hf_tensors.norm(f"{prefix}.post_attention_layernorm.weight", size),
        **hf_tensors.within(("attention",), hf_tensors.attention(f"{prefix}.self_attn", spec)),
    }


def dense_spec(
    fields: HfConfig,
    *,
    architecture: str,
    layers: tuple[LayerKind, ...],
    max_context: int,
    attention_bias: bool = False,
    output_bias: bool | None = None,
    mlp_bias: bool = False,
    qk_norm: bool = False,
    default_kv_heads: int | None = None,
    default_head_dim: int | None = None,
) -> ModelSpec:
    """The spec of a pre-norm decoder, from fields that Llama, Mistral and Qwen share.

    Args:
        max_context, default_kv_heads, default_head_dim: transformers' defaults; None for as many
            KV heads as query heads, and hidden_size / num_attention_heads.
        output_bias: as attention_bias where None.
    """
    hidden_size = fields.count("hidden_size")
    num_heads = fields.count("num_attention_heads")
    head_dim = fields.head_dim(default_head_dim or max(1, hidden_size // num_heads))
    return ModelSpec(
        architecture=architecture,
        vocab_size=fields.count("vocab_size"),
        hidden_size=hidden_size,
        feed_forward=fields.count("intermediate_size"),
        max_context=fields.count("max_position_embeddings", max_context),
        eos_token_ids=fields.token_ids("eos_token_id"),
        attention=AttentionSpec(
            num_heads=num_heads,
            num_kv_heads=kv_heads(fields, num_heads, default_kv_heads or num_heads),
            head_dim=head_dim,
            scale=head_dim**-0.5,
            qkv_bias=attention_bias,
            output_bias=attention_bias if output_bias is None else output_bias,
            qk_norm=qk_norm,
        ),
        layers=layers,
        activation=fields.activation("hidden_act", "silu"),
        mlp_bias=mlp_bias,
        norm_eps=fields.number("rms_norm_eps", 1e-6),
        tied=fields.flag("tie_word_embeddings", False),
    )


def kv_heads(fields: HfConfig, num_heads: int, default: int) -> int:
    """`num_key_value_heads`, which must divide the query heads."""
    count = fields.count("num_key_value_heads", default)
    if num_heads % count:
        raise UnsupportedModel(
            f"config: num_key_value_heads={count} must divide num_attention_heads={num_heads}"
        )
    return count
