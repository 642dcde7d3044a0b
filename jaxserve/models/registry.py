"""Which class serves a checkpoint: by the architecture that its config names.

The one place that knows all architectures; each is a file beside this one.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from jaxserve.errors import UnsupportedModel

if TYPE_CHECKING:
    from jaxserve.models.decoder import Decoder

#: HF architecture name: (module, class).
ARCHITECTURES: dict[str, tuple[str, str]] = {
    "LlamaForCausalLM": ("llama", "Llama"),
    "MistralForCausalLM": ("llama", "Mistral"),
    "Qwen2ForCausalLM": ("qwen", "Qwen2"),
    "Qwen3ForCausalLM": ("qwen", "Qwen3"),
    "MixtralForCausalLM": ("mixtral", "Mixtral"),
    "Qwen3MoeForCausalLM": ("qwen_moe", "Qwen3Moe"),
    "Gemma2ForCausalLM": ("gemma2", "Gemma2"),
    "Gemma3ForCausalLM": ("gemma3", "Gemma3"),
    "Gemma3ForConditionalGeneration": ("gemma3", "Gemma3"),
}
#: `model_type`, where a config has no `architectures`.
_MODEL_TYPES: dict[str, str] = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "gemma3": "Gemma3ForConditionalGeneration",
}


def architecture(config: dict[str, Any]) -> str:
    """Name of the config's architecture.

    Raises:
        UnsupportedModel: it has none, or one that is not implemented.
    """
    names = config.get("architectures")
    model_type = config.get("model_type")
    if isinstance(names, list) and names:
        name = names[0]
    else:
        name = _MODEL_TYPES.get(str(model_type), f"model_type {model_type!r}")
    if name not in ARCHITECTURES:
        raise UnsupportedModel(
            f"the architecture {name} is not supported; supported: {', '.join(ARCHITECTURES)}"
        )
    return name


def model_class(config: dict[str, Any]) -> type[Decoder]:
    """The class that serves a checkpoint with this HF config.

    Raises:
        UnsupportedModel: no implemented architecture, or weights in a quantized HF format.
    """
    module, name = ARCHITECTURES[architecture(config)]
    if config.get("quantization_config"):
        method = config["quantization_config"]
        method = method.get("quant_method", method) if isinstance(method, dict) else method
        raise UnsupportedModel(
            f"quantization_config={method!r} is not supported: give an unquantized or GGUF model"
        )
    return getattr(import_module(f"jaxserve.models.{module}"), name)
