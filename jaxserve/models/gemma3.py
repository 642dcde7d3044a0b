"""Gemma 3, text: five local layers to one global, each kind with its own rotary base.

Source: arXiv 2503.19786 and transformers' `modeling_gemma3`. Of the image-and-text checkpoints
(Gemma3ForConditionalGeneration) the language model is served; images cannot be given.
"""

from __future__ import annotations

from typing import Any

from jaxserve.errors import UnsupportedModel
from jaxserve.models.gemma2 import Gemma2, gemma_spec, gemma_window
from jaxserve.models.hf_config import HfConfig
from jaxserve.models.rotary import Rope
from jaxserve.models.spec import LayerKind, ModelSpec


class Gemma3(Gemma2):
    """Gemma3ForCausalLM, and the text part of Gemma3ForConditionalGeneration."""

    @classmethod
    def spec_from_hf(cls, config: dict[str, Any]) -> ModelSpec:
        """See `Decoder.spec_from_hf`."""
        name, prefix = "Gemma3ForCausalLM", ""
        if "text_config" in config:
            text = config["text_config"]
            if not isinstance(text, dict):
                raise UnsupportedModel(f"config: text_config={text!r} must be a mapping")
            outer = ("eos_token_id", "tie_word_embeddings")
            config = {**text, **{key: config[key] for key in outer if config.get(key) is not None}}
            config = {"vocab_size": 262208, **config}
            name, prefix = "Gemma3ForConditionalGeneration", "language_model."
        fields = HfConfig(config)
        num_layers = fields.count("num_hidden_layers", 26)
        # transformers builds the layers with a score cap and never applies it
        fields.refuse("attn_logit_softcapping")
        pattern = fields.count("sliding_window_pattern", 6)
        types = fields.layer_types(num_layers) or tuple(
            "sliding_attention" if (i + 1) % pattern else "full_attention"
            for i in range(num_layers)
        )
        kinds = {
            "full_attention": LayerKind(rope=fields.rope(1e6, layer_type="full_attention")),
            "sliding_attention": LayerKind(rope=_local_rope(fields), window=gemma_window(fields)),
        }
        return gemma_spec(
            fields,
            architecture=name,
            layers=tuple(kinds[layer_type] for layer_type in types),
            max_context=131072,
            soft_cap=None,
            logit_soft_cap=fields.optional_number("final_logit_softcapping"),
            qk_norm=True,
            tensor_prefix=prefix,
        )


def _local_rope(fields: HfConfig) -> Rope:
    """Of the local layers: never scaled in the old form, its own entry in the new one."""
    theta = fields.number("rope_local_base_freq", 10000.0)
    if not fields.has("rope_parameters"):
        return Rope(theta=theta)
    entries = fields.fields["rope_parameters"]
    if isinstance(entries, dict) and not isinstance(entries.get("sliding_attention"), dict):
        return Rope(theta=theta)
    without_global = {**fields.fields, "rope_theta": theta}
    return HfConfig(without_global).rope(theta, layer_type="sliding_attention")
