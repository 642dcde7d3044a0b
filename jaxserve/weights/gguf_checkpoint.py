"""A GGUF file presented as a Hugging Face checkpoint: keys, names and layouts of HF.

llama.cpp's converter changes three things beside the names, which are undone here: rows of q and k
of the Llama family are reordered so that rotary pairs lie together; Gemma's norms have 1 added;
Llama 3's rotary scaling becomes a tensor of factors (`gguf_rope`). Source:
github.com/ggml-org/llama.cpp, conversion/{llama,gemma,qwen}.py and gguf-py/gguf/constants.py.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from jaxtyping import Shaped

from jaxserve.errors import UnsupportedModel
from jaxserve.formats.gguf_file import GgufFile
from jaxserve.weights.gguf_config import EMBEDDING, HEAD, architecture, config_of
from jaxserve.weights.gguf_rope import LLAMA3_FACTORS

_TOP_NAMES = {
    EMBEDDING: "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    HEAD: "lm_head.weight",
}
#: Of all architectures, within a layer.
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
#: The norm between attention and MLP; Gemma has two more.
_ONE_NORM = {"ffn_norm": "post_attention_layernorm"}
_GEMMA_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_QK_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_NAMES_BY_ARCHITECTURE = {
    "llama": _LAYER_NAMES | _ONE_NORM,
    "qwen2": _LAYER_NAMES | _ONE_NORM,
    "qwen3": _LAYER_NAMES | _ONE_NORM | _QK_NORMS,
    "gemma2": _LAYER_NAMES | _GEMMA_NORMS,
    "gemma3": _LAYER_NAMES | _GEMMA_NORMS | _QK_NORMS,
}
#: Tensors that say nothing that the metadata do not.
_IGNORED = (LLAMA3_FACTORS, "attn_rot_embd")


class GgufCheckpoint:
    """See the module, and `weights.checkpoint.Checkpoint`.

    Raises:
        WeightsError: the file is broken or lacks metadata.
        UnsupportedModel: an architecture or a feature that is not implemented.
    """

    def __init__(self, path: Path) -> None:
        self._file = GgufFile(path)
        self._architecture = architecture(self._file)
        self._names = {
            hf_name: gguf_name
            for gguf_name in self._file.names()
            if (hf_name := self._hf_name(gguf_name)) is not None
        }
        self.config = config_of(self._file)

    def names(self) -> frozenset[str]:
        """See `Checkpoint`."""
        return frozenset(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        """See `Checkpoint`."""
        return self._file.shape(self._names[name])

    def read(self, name: str) -> Shaped[np.ndarray, "..."]:
        """See `Checkpoint`."""
        tensor = self._file.read(self._names[name])
        if self._architecture == "llama" and (".q_proj." in name or ".k_proj." in name):
            return _rotary_halves(tensor, self.config["head_dim"])
        if self._architecture.startswith("gemma") and name.endswith("norm.weight"):
            return tensor.astype(np.float32) - np.float32(1)
        return tensor

    def _hf_name(self, name: str) -> str | None:
        """None for what is no parameter."""
        if name in _TOP_NAMES:
            return _TOP_NAMES[name]
        parts, known = name.split("."), _NAMES_BY_ARCHITECTURE[self._architecture]
        if len(parts) == 4 and parts[0] == "blk" and parts[2] in known:
            return f"model.layers.{parts[1]}.{known[parts[2]]}.{parts[3]}"
        if any(ignored in name for ignored in _IGNORED):
            return None
        raise UnsupportedModel(
            f"{self._file.path}: no {self._architecture} model that is supported has a tensor "
            f"{name!r}"
        )


def _rotary_halves(
    tensor: Shaped[np.ndarray, "NH *D"], head_dim: int
) -> Shaped[np.ndarray, "NH *D"]:
    """Rows of each head from pairs side by side (GGUF) to first halves before second halves (HF).

    Raises:
        ValueError: the rows are no whole heads.
    """
    rows = tensor.reshape(-1, head_dim // 2, 2, *tensor.shape[1:])
    return rows.swapaxes(1, 2).reshape(tensor.shape)
