"""A GGUF file's metadata as a Hugging Face config.

What llama.cpp derives from the architecture instead of the file (activations, Gemma's window
pattern and scale, which sizes mean 27B) is written out here. Source: github.com/ggml-org/llama.cpp,
conversion/*.py and src/models/*.cpp; keys in gguf-py/gguf/constants.py.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from jaxserve.errors import UnsupportedModel, WeightsError
from jaxserve.formats.gguf_file import GgufFile
from jaxserve.weights.gguf_rope import LLAMA3_FACTORS, llama3_scaling

#: GGUF's architecture: HF's, and its model_type.
ARCHITECTURES: dict[str, tuple[str, str]] = {
    "llama": ("LlamaForCausalLM", "llama"),
    "qwen2": ("Qwen2ForCausalLM", "qwen2"),
    "qwen3": ("Qwen3ForCausalLM", "qwen3"),
    "gemma2": ("Gemma2ForCausalLM", "gemma2"),
    "gemma3": ("Gemma3ForCausalLM", "gemma3_text"),
}
EMBEDDING, HEAD = "token_embd.weight", "output.weight"
#: Control tokens that end a turn, though the file may name only another end token.
_END_OF_TURN = ("<|eot_id|>", "<|im_end|>", "<end_of_turn>", "<|end_of_text|>")
_CONTROL = 3
#: A layer with full attention comes after this many sliding ones, itself counted.
_PATTERNS = {"gemma2": 2, "gemma3": 6}
#: Layers of the models whose scale is by D / N and not by H.
_LAYERS_OF_27B = {"gemma2": 46, "gemma3": 62}


def architecture(file: GgufFile) -> str:
    """The file's architecture.

    Raises:
        UnsupportedModel: it is not one of ARCHITECTURES.
    """
    name = file.metadata.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise UnsupportedModel(
            f"{file.path}: the GGUF architecture {name!r} is not supported; supported: "
            f"{', '.join(ARCHITECTURES)}"
        )
    return name


def config_of(file: GgufFile) -> dict[str, Any]:
    """The config that the model was converted from, as far as it matters here.

    Raises:
        WeightsError: metadata or the embedding table are missing or make no sense.
        UnsupportedModel: they ask for what is not implemented.
    """
    return _Config(file).fields()


class _Config:
    def __init__(self, file: GgufFile) -> None:
        self._file = file
        self._name = architecture(file)

    def fields(self) -> dict[str, Any]:
        if EMBEDDING not in self._file.names():
            raise WeightsError(f"{self._file.path} has no tensor {EMBEDDING!r}")
        if self._optional("expert_count"):
            raise UnsupportedModel(f"{self._file.path} is a mixture of experts: not supported")
        hf_name, model_type = ARCHITECTURES[self._name]
        hidden_size = self._count("embedding_length")
        num_heads = self._count("attention.head_count")
        head_dim = self._head_dim(hidden_size, num_heads)
        tensors = self._file.names()
        fields: dict[str, Any] = {
            "architectures": [hf_name],
            "model_type": model_type,
            "vocab_size": self._file.shape(EMBEDDING)[0],
            "hidden_size": hidden_size,
            "intermediate_size": self._count("feed_forward_length"),
            "num_hidden_layers": self._count("block_count"),
            "num_attention_heads": num_heads,
            "num_key_value_heads": self._count("attention.head_count_kv", num_heads),
            "head_dim": head_dim,
            "max_position_embeddings": self._count("context_length"),
            "rms_norm_eps": self._number("attention.layer_norm_rms_epsilon"),
            "rope_theta": self._number("rope.freq_base", 10000.0),
            "tie_word_embeddings": HEAD not in tensors,
            "attention_bias": "blk.0.attn_q.bias" in tensors,
            "mlp_bias": "blk.0.ffn_gate.bias" in tensors,
            "eos_token_id": end_token_ids(self._file.metadata),
        }
        rotated = self._count("rope.dimension_count", head_dim)
        if rotated != head_dim:
            fields["partial_rotary_factor"] = rotated / head_dim
        if scaling := self._rope_scaling(head_dim, fields["rope_theta"]):
            fields["rope_scaling"] = scaling
        if self._name.startswith("gemma"):
            return fields | self._gemma(fields)
        self._check_scale(head_dim)
        return fields | self._llama_like()

    def _llama_like(self) -> dict[str, Any]:
        if self._name.startswith("qwen"):
            return {"hidden_act": "silu", "use_sliding_window": False, "sliding_window": None}
        window = self._optional("attention.sliding_window")
        if not window:
            return {"hidden_act": "silu"}
        return {
            "architectures": ["MistralForCausalLM"],
            "model_type": "mistral",
            "hidden_act": "silu",
            "sliding_window": self._count("attention.sliding_window"),
        }

    def _gemma(self, fields: dict[str, Any]) -> dict[str, Any]:
        """Everything that Gemma adds, under the keys of transformers 5."""
        num_layers, head_dim = fields["num_hidden_layers"], fields["head_dim"]
        scale = self._optional("attention.scale")
        if scale is not None:
            scalar = self._number("attention.scale") ** -2
        elif num_layers == _LAYERS_OF_27B[self._name]:
            scalar = fields["hidden_size"] // fields["num_attention_heads"]
        else:
            scalar = head_dim
        default_window = 4096 if self._name == "gemma2" else 0
        window = self._optional("attention.sliding_window", default_window)
        slides = self._sliding_layers(num_layers) if window else [False] * num_layers
        added: dict[str, Any] = {
            "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": scalar,
            "sliding_window": window or None,
            "layer_types": ["sliding_attention" if s else "full_attention" for s in slides],
        }
        for name in ("attn_logit_softcapping", "final_logit_softcapping"):
            if self._optional(name) is not None:
                added[name] = self._number(name)
        if self._name == "gemma3":
            scaled = fields.pop("rope_scaling", {"rope_type": "default"})
            added["rope_parameters"] = {
                "full_attention": {**scaled, "rope_theta": fields["rope_theta"]},
                "sliding_attention": {
                    "rope_type": "default",
                    "rope_theta": self._number("rope.freq_base_swa", 10000.0),
                },
            }
        return added

    def _sliding_layers(self, num_layers: int) -> list[bool]:
        key = "attention.sliding_window_pattern"
        pattern = self._optional(key, _PATTERNS[self._name])
        if isinstance(pattern, list):
            if len(pattern) != num_layers:
                raise self._wrong(key, pattern, f"{num_layers} entries, one for each layer")
            return [bool(slides) for slides in pattern]
        period = self._count(key, _PATTERNS[self._name])
        return [(i + 1) % period != 0 for i in range(num_layers)]

    def _head_dim(self, hidden_size: int, num_heads: int) -> int:
        head_dim = self._count("attention.key_length", max(1, hidden_size // num_heads))
        of_values = self._count("attention.value_length", head_dim)
        if of_values != head_dim:
            raise UnsupportedModel(
                f"{self._file.path}: keys of {head_dim} and values of {of_values} differ in size; "
                "models with one head_dim are supported"
            )
        return head_dim

    def _check_scale(self, head_dim: int) -> None:
        scale = self._number("attention.scale", head_dim**-0.5)
        if not math.isclose(scale, head_dim**-0.5, rel_tol=1e-5):
            raise UnsupportedModel(
                f"{self._file.path}: attention.scale={scale} is not supported, only head_dim**-0.5"
            )

    def _rope_scaling(self, head_dim: int, theta: float) -> dict[str, Any] | None:
        if LLAMA3_FACTORS in self._file.names():
            factors = self._file.read(LLAMA3_FACTORS)
            scaling = llama3_scaling(factors, head_dim, theta)
            if scaling is None:
                raise UnsupportedModel(
                    f"{self._file.path}: the factors in {LLAMA3_FACTORS!r} are not of Llama 3's "
                    "kind of rotary scaling"
                )
            return scaling
        kind = self._optional("rope.scaling.type")
        factor = self._number("rope.scaling.factor", self._number("rope.scale_linear", 1.0))
        if kind == "none" or (kind in (None, "linear") and factor == 1.0):
            return None
        # any other kind is refused by name when the model reads its config
        return {"rope_type": kind or "linear", "factor": factor}

    # --- typed access ---

    def _optional(self, key: str, default: Any = None) -> Any:
        return self._file.metadata.get(f"{self._name}.{key}", default)

    def _count(self, key: str, default: int | None = None) -> int:
        """A positive whole number; a list of them, one a layer, must be all the same."""
        value = self._optional(key, default)
        if isinstance(value, list) and value:
            if any(item != value[0] for item in value):
                raise UnsupportedModel(
                    f"{self._file.path}: {self._name}.{key} differs between layers: not supported"
                )
            value = value[0]
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self._wrong(key, value, "a positive whole number")
        return value

    def _number(self, key: str, default: float | None = None) -> float:
        """A positive number: the shortest decimal that is this float32, as the config had it."""
        value = self._optional(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._wrong(key, value, "a number")
        with np.errstate(over="ignore"):
            short = float(str(np.float32(value)))
        if not (math.isfinite(short) and short > 0):
            raise self._wrong(key, value, "positive and finite")
        return short

    def _wrong(self, key: str, value: Any, wanted: str) -> WeightsError:
        key = f"{self._name}.{key}"
        if value is None:
            return WeightsError(f"{self._file.path} has no {key} in its metadata")
        return WeightsError(f"{self._file.path} is broken: {key}={value!r:.80} must be {wanted}")


def end_token_ids(metadata: dict[str, Any]) -> list[int]:
    """The tokens that end generation: those that the metadata name, and ends of turn."""
    tokens = metadata.get("tokenizer.ggml.tokens")
    tokens = tokens if isinstance(tokens, list) else []
    kinds = metadata.get("tokenizer.ggml.token_type")
    kinds = kinds if isinstance(kinds, list) else []
    named = [metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom")]
    turns = [
        i
        for i, (token, kind) in enumerate(zip(tokens, kinds, strict=False))
        if kind == _CONTROL and token in _END_OF_TURN
    ]
    ids = [i for i in (*named, *turns) if isinstance(i, int) and i >= 0]
    return list(dict.fromkeys(ids))
