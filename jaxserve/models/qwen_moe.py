"""Qwen 3 with a mixture of experts (Qwen3-30B-A3B and its like).

Source: arXiv 2505.09388 and transformers' `modeling_qwen3_moe`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from jaxserve.errors import UnsupportedModel
from jaxserve.models import hf_tensors
from jaxserve.models.decoder import Decoder
from jaxserve.models.hf_config import HfConfig
from jaxserve.models.hf_tensors import Rules
from jaxserve.models.llama import attention_tensors, dense_spec, pre_norm_tensors
from jaxserve.models.moe import MixtureLayer, moe_spec
from jaxserve.models.spec import LayerKind, ModelSpec


class Qwen3Moe(Decoder):
    """Qwen3MoeForCausalLM: query and key heads are normalised, some layers may be dense."""

    layer_class = MixtureLayer

    @classmethod
    def spec_from_hf(cls, config: dict[str, Any]) -> ModelSpec:
        """See `Decoder.spec_from_hf`."""
        fields = HfConfig(config)
        fields.refuse("mlp_bias", False)
        num_layers = fields.count("num_hidden_layers")
        # Here transformers lets every layer slide, or none.
        absent = "sliding_window" not in config
        slides = fields.flag("use_sliding_window", False)
        slides = slides and (absent or fields.has("sliding_window"))
        window = fields.count("sliding_window", 4096) if slides else None
        whole = "sliding_attention" if slides else "full_attention"
        fields.refuse("layer_types", [whole] * num_layers)
        kind = LayerKind(rope=fields.rope(10000.0), window=window)
        spec = dense_spec(
            fields,
            architecture="Qwen3MoeForCausalLM",
            layers=tuple(
                replace(kind, sparse=sparse) for sparse in _sparse_layers(fields, num_layers)
            ),
            max_context=32768,
            attention_bias=fields.flag("attention_bias", False),
            qk_norm=True,
            default_kv_heads=4,
        )
        moe = moe_spec(
            fields,
            fields.count("moe_intermediate_size", 768),
            norm_topk_prob=fields.flag("norm_topk_prob", False),
            default_experts=(128, 8),
        )
        return replace(spec, moe=moe)

    @classmethod
    def layer_tensors(cls, spec: ModelSpec, kind: LayerKind, prefix: str) -> Rules:
        """See `Decoder.layer_tensors`."""
        if not kind.sparse:
            return pre_norm_tensors(spec, prefix)
        names = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
        mixture = hf_tensors.mixture(f"{prefix}.mlp", spec, names)
        return {**attention_tensors(spec, prefix), **hf_tensors.within(("mlp",), mixture)}


def _sparse_layers(fields: HfConfig, num_layers: int) -> list[bool]:
    """Every `decoder_sparse_step`-th layer but those in `mlp_only_layers`."""
    step = fields.count("decoder_sparse_step", 1)
    dense = fields.fields.get("mlp_only_layers") or []
    if not isinstance(dense, list) or not all(isinstance(i, int) for i in dense):
        raise UnsupportedModel(f"config: mlp_only_layers={dense!r} must be numbers of layers")
    return [i not in dense and (i + 1) % step == 0 for i in range(num_layers)]
