"""Mixtral: Mistral's layers with a mixture of experts for an MLP.

Source: arXiv 2401.04088 and transformers' `modeling_mixtral`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from jaxserve.models import hf_tensors
from jaxserve.models.decoder import Decoder
from jaxserve.models.hf_config import HfConfig
from jaxserve.models.hf_tensors import Rules
from jaxserve.models.llama import attention_tensors, dense_spec
from jaxserve.models.moe import MixtureLayer, moe_spec
from jaxserve.models.spec import LayerKind, ModelSpec


class Mixtral(Decoder):
    """MixtralForCausalLM: every layer is sparse; all slide where `sliding_window` is set."""

    layer_class = MixtureLayer

    @classmethod
    def spec_from_hf(cls, config: dict[str, Any]) -> ModelSpec:
        """See `Decoder.spec_from_hf`."""
        fields = HfConfig({"rms_norm_eps": 1e-5} | config)
        num_layers = fields.count("num_hidden_layers")
        for name in ("attention_bias", "mlp_bias"):
            fields.refuse(name, False)
        window = fields.count("sliding_window") if fields.has("sliding_window") else None
        whole = "full_attention" if window is None else "sliding_attention"
        fields.refuse("layer_types", [whole] * num_layers)
        kind = LayerKind(rope=fields.rope(1e6), window=window, sparse=True)
        spec = dense_spec(
            fields,
            architecture="MixtralForCausalLM",
            layers=(kind,) * num_layers,
            max_context=131072,
            default_kv_heads=8,
        )
        moe = moe_spec(fields, spec.feed_forward, norm_topk_prob=True, default_experts=(8, 2))
        return replace(spec, moe=moe)

    @classmethod
    def layer_tensors(cls, spec: ModelSpec, kind: LayerKind, prefix: str) -> Rules:
        """See `Decoder.layer_tensors`."""
        names = {"gate": "w1", "up": "w3", "down": "w2"}
        mixture = hf_tensors.mixture(f"{prefix}.block_sparse_moe", spec, names)
        return {**attention_tensors(spec, prefix), **hf_tensors.within(("mlp",), mixture)}
