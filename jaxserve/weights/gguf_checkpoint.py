"""A GGUF file presented as a Hugging Face checkpoint: keys, names and layouts of HF.

llama.cpp's converter changes three things beside the names, which are undone here: rows of q and k
of the Llama family are reordered so that rotary pairs lie together; Gemma's norms have 1 added;
Llama 3's rotary scaling becomes a tensor of factors. Source: github.com/ggml-org/llama.cpp,
convert_hf_to_gguf.py and gguf-py/gguf/constants.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxserve.errors import UnsupportedModel, WeightsError
from jaxserve.formats.gguf_file import GgufFile

_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3": "Gemma3ForCausalLM",
}
#: HF config key: GGUF metadata key after the architecture's name.
_KEYS = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "max_position_embeddings": "context_length",
    "head_dim": "attention.key_length",
    "rope_theta": "rope.freq_base",
    "sliding_window": "attention.sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
_REQUIRED = tuple(_KEYS)[:7]
_TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
#: The norm between attention and MLP; Gemma has two more.
_MLP_NORM = {"ffn_norm": "post_attention_layernorm"}
_GEMMA_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_ROPE_FACTORS = "rope_freqs.weight"
#: Layers of Gemma 3 with full attention: every sixth; the file does not say so.
_GEMMA3_PATTERN = 6


class GgufCheckpoint:
    """See the module, and `weights.checkpoint.Checkpoint`.

    Raises:
        WeightsError: the file is broken or lacks metadata.
        UnsupportedModel: an architecture or a feature that is not implemented.
    """

    def __init__(self, path: Path) -> None:
        self._file = GgufFile(path)
        name = self._file.metadata.get("general.architecture")
        if name not in _ARCHITECTURES:
            raise UnsupportedModel(
                f"{path}: the GGUF architecture {name!r} is not supported; supported: "
                f"{', '.join(_ARCHITECTURES)}"
            )
        self._architecture = str(name)
        self._names = {
            hf_name: gguf_name
            for gguf_name in self._file.names()
            if (hf_name := self._hf_name(gguf_name)) is not None
        }
        self.config = self._config()

    def names(self) -> frozenset[str]:
        """See `Checkpoint`."""
        return frozenset(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        """See `Checkpoint`."""
        return self._file.shape(self._names[name])

    def read(self, name: str) -> np.ndarray:
        """See `Checkpoint`."""
        tensor = self._file.read(self._names[name])
        if self._architecture == "llama" and ".self_attn." in name:
            if ".q_proj." in name:
                return _rotary_halves(tensor, self.config["num_attention_heads"])
            if ".k_proj." in name:
                return _rotary_halves(tensor, self.config["num_key_value_heads"])
        if self._architecture.startswith("gemma") and name.endswith("norm.weight"):
            return tensor.astype(np.float32) - np.float32(1)
        return tensor

    def _hf_name(self, name: str) -> str | None:
        """None for what is no parameter."""
        if name == _ROPE_FACTORS:
            return None
        if name in _TOP_NAMES:
            return _TOP_NAMES[name]
        gemma = self._architecture.startswith("gemma")
        known = _LAYER_NAMES | (_GEMMA_NORMS if gemma else _MLP_NORM)
        parts = name.split(".")
        if len(parts) == 4 and parts[0] == "blk" and parts[2] in known:
            return f"model.layers.{parts[1]}.{known[parts[2]]}.{parts[3]}"
        raise UnsupportedModel(
            f"{self._file.path}: no {self._architecture} model that is supported has a tensor "
            f"{name!r}"
        )

    def _config(self) -> dict[str, Any]:
        metadata, prefix = self._file.metadata, f"{self._architecture}."
        config: dict[str, Any] = {"architectures": [_ARCHITECTURES[self._architecture]]}
        for key, gguf_key in _KEYS.items():
            if prefix + gguf_key in metadata:
                config[key] = metadata[prefix + gguf_key]
            elif key in _REQUIRED:
                raise WeightsError(f"{self._file.path} has no {prefix}{gguf_key} in its metadata")
        if metadata.get(f"{prefix}expert_count"):
            raise UnsupportedModel(f"{self._file.path} is a mixture of experts: not supported")
        embedding = "token_embd.weight"
        if embedding not in self._file.names():
            raise WeightsError(f"{self._file.path} has no tensor {embedding!r}")
        config["vocab_size"] = self._file.shape(embedding)[0]
        config["tie_word_embeddings"] = "output.weight" not in self._file.names()
        config["eos_token_id"] = metadata.get("tokenizer.ggml.eos_token_id")
        config["attention_bias"] = "blk.0.attn_q.bias" in self._file.names()
        config |= self._rope_scaling()
        return config | self._of_architecture(config)

    def _of_architecture(self, config: dict[str, Any]) -> dict[str, Any]:
        """What a converter leaves out since the architecture implies it."""
        if self._architecture == "llama":
            if "sliding_window" in config:
                return {"architectures": ["MistralForCausalLM"], "hidden_act": "silu"}
            return {"hidden_act": "silu"}
        if self._architecture.startswith("qwen"):
            return {"hidden_act": "silu", "use_sliding_window": False, "sliding_window": None}
        # llama.cpp scales by the head dimension, except for the 27B models, where it is D / N.
        is_27b = config["num_hidden_layers"] == (46 if self._architecture == "gemma2" else 62)
        size = config["hidden_size"] // config["num_attention_heads"]
        extra = {
            "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": size if is_27b else config.get("head_dim", 256),
        }
        if self._architecture == "gemma3":
            extra |= {"rope_local_base_freq": 10000.0}
            extra |= {"sliding_window_pattern": _GEMMA3_PATTERN}
        return extra

    def _rope_scaling(self) -> dict[str, Any]:
        metadata, prefix = self._file.metadata, f"{self._architecture}.rope.scaling."
        kind = metadata.get(f"{prefix}type", "none")
        factor = metadata.get(
            f"{prefix}factor", metadata.get(f"{self._architecture}.rope.scale_linear")
        )
        if _ROPE_FACTORS in self._file.names():
            return {"rope_scaling": self._llama3_scaling()}
        if kind == "none" or factor in (None, 1.0):
            return {}
        if kind != "linear":
            raise UnsupportedModel(f"{self._file.path}: rope scaling {kind!r} is not supported")
        return {"rope_scaling": {"rope_type": "linear", "factor": float(factor)}}

    def _llama3_scaling(self) -> dict[str, Any]:
        """Llama 3's parameters from the factors made of them, by which frequencies are divided.

        Only Llama 3.1's and 3.2's parameters occur; they differ in the factor, which is the
        factors' maximum. The factors are checked against them.
        """
        metadata = self._file.metadata
        factors = self._file.read(_ROPE_FACTORS).astype(np.float64).ravel()
        scaling = {
            "rope_type": "llama3",
            "factor": float(factors.max()),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
        base = float(metadata.get(f"{self._architecture}.rope.freq_base", 10000.0))
        expected = _llama3_factors(len(factors), base, scaling)
        if not np.allclose(factors, expected, rtol=1e-3):
            raise UnsupportedModel(f"{self._file.path}: its rotary factors are not Llama 3's")
        return scaling


def _rotary_halves(tensor: Float[np.ndarray, "NH *D"], num_heads: int) -> np.ndarray:
    """Rows from pairs side by side (GGUF) to first halves before second halves (HF)."""
    rows = tensor.reshape(num_heads, -1, 2, *tensor.shape[1:])
    return rows.swapaxes(1, 2).reshape(tensor.shape)


def _llama3_factors(count: int, base: float, scaling: dict[str, Any]) -> Float[np.ndarray, "H/2"]:
    wavelengths = 2 * np.pi * base ** (np.arange(count) / count)
    old = scaling["original_max_position_embeddings"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    smooth = np.clip((old / wavelengths - low) / (high - low), 0, 1)
    return 1 / ((1 - smooth) / scaling["factor"] + smooth)
