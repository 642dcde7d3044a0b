"""Qwen 2 (and 2.5) and Qwen 3: Llama's layers with biases, or with normalised queries and keys.

Source: arXiv 2407.10671, 2505.09388 and transformers' `modeling_qwen2`, `modeling_qwen3`.
"""

from __future__ import annotations

from typing import Any

from jaxserve.models.decoder import Decoder
from jaxserve.models.hf_config import HfConfig
from jaxserve.models.hf_tensors import Rules
from jaxserve.models.llama import dense_spec, pre_norm_tensors
from jaxserve.models.spec import LayerKind, ModelSpec


class Qwen2(Decoder):
    """Qwen2ForCausalLM: queries, keys and values have a bias, the output has none."""

    @classmethod
    def spec_from_hf(cls, config: dict[str, Any]) -> ModelSpec:
        """See `Decoder.spec_from_hf`."""
        fields = HfConfig(config)
        for name in ("mlp_bias", "use_mrope"):
            fields.refuse(name, False)
        return dense_spec(
            fields,
            architecture="Qwen2ForCausalLM",
            layers=_layers(fields),
            max_context=32768,
            attention_bias=True,
            output_bias=False,
        )

    @classmethod
    def layer_tensors(cls, spec: ModelSpec, kind: LayerKind, prefix: str) -> Rules:
        """See `Decoder.layer_tensors`."""
        return pre_norm_tensors(spec, prefix)


class Qwen3(Decoder):
    """Qwen3ForCausalLM: query and key heads are normalised before the rotary embedding."""

    @classmethod
    def spec_from_hf(cls, config: dict[str, Any]) -> ModelSpec:
        """See `Decoder.spec_from_hf`."""
        fields = HfConfig(config)
        fields.refuse("mlp_bias", False)
        return dense_spec(
            fields,
            architecture="Qwen3ForCausalLM",
            layers=_layers(fields),
            max_context=32768,
            attention_bias=fields.flag("attention_bias", False),
            qk_norm=True,
            default_kv_heads=32,
            default_head_dim=128,
        )

    @classmethod
    def layer_tensors(cls, spec: ModelSpec, kind: LayerKind, prefix: str) -> Rules:
        """See `Decoder.layer_tensors`."""
        return pre_norm_tensors(spec, prefix)


def _layers(fields: HfConfig) -> tuple[LayerKind, ...]:
    """Layers slide where `layer_types` says so or, without it, from `max_window_layers` on."""
    num_layers = fields.count("num_hidden_layers")
    types = fields.layer_types(num_layers)
    rope = fields.rope(10000.0)
    # a null sliding_window, with use_sliding_window, means none in transformers
    absent = "sliding_window" not in fields.fields
    slides = fields.flag("use_sliding_window", False) and (absent or fields.has("sliding_window"))
    window = fields.count("sliding_window", 4096) if slides else None
    if types is None:
        first = fields.count("max_window_layers", 28, least=0)
        types = tuple(
            "sliding_attention" if slides and i >= first else "full_attention"
            for i in range(num_layers)
        )
    return tuple(
        LayerKind(rope=rope, window=window if layer_type == "sliding_attention" else None)
        for layer_type in types
    )
