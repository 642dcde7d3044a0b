"""What a Hugging Face config asks for is honoured, or refused by name."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from jaxserve.errors import UnsupportedModel
from jaxserve.models.options import ModelOptions
from jaxserve.models.registry import ARCHITECTURES, model_class
from jaxserve.models.rotary import Rope
from jaxserve.models.spec import ModelSpec, MoeSpec
from tests.models.loading import CASES, config_of

SCALING = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def _spec(config: dict[str, Any]) -> ModelSpec:
    return model_class(config).spec_from_hf(config)


def _changed(case: str, **fields: Any) -> dict[str, Any]:
    return {**config_of(case), **fields}


def _old_form(case: str, **fields: Any) -> dict[str, Any]:
    """As transformers before 5 wrote it: no `rope_parameters`, no `layer_types`."""
    config = _changed(case, **fields)
    for name in ("rope_parameters", "layer_types"):
        config.pop(name, None)
    return config


@pytest.mark.parametrize(
    ("case", "fields"),
    [
        ("llama2", {"hidden_act": "relu"}),
        ("llama2", {"hidden_act": ["silu"]}),
        ("llama2", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}),
        ("llama2", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}),
        ("llama2", {"rope_parameters": {"rope_type": "linear", "factor": 0}}),
        ("llama2", {"rope_parameters": {"rope_type": "linear"}}),
        ("llama2", {"rope_parameters": {"partial_rotary_factor": 0.5}}),
        ("llama2", {"rope_parameters": {"rope_theta": -1.0}}),
        ("llama2", {"rope_parameters": "linear"}),
        ("llama2", {"rope_parameters": {"rope_type": "llama3", **SCALING, "high_freq_factor": 1}}),
        ("llama2", {"partial_rotary_factor": 0.5}),
        ("llama2", {"sliding_window": 128}),
        ("llama2", {"num_key_value_heads": 3}),
        ("llama2", {"hidden_size": None}),
        ("llama2", {"vocab_size": "many"}),
        ("llama2", {"num_hidden_layers": 0}),
        ("llama2", {"rms_norm_eps": float("nan")}),
        ("llama2", {"attention_bias": 1}),
        ("llama2", {"eos_token_id": "</s>"}),
        ("llama2", {"quantization_config": {"quant_method": "awq"}}),
        ("llama2", {"head_dim": 15}),
        ("mistral", {"attention_bias": True}),
        ("mistral", {"sliding_window": 0}),
        ("mistral", {"layer_types": ["sliding_attention", "full_attention", "full_attention"]}),
        ("qwen2", {"use_mrope": True}),
        ("qwen2", {"layer_types": ["full_attention"]}),
        ("qwen2", {"layer_types": ["full_attention", "chunked_attention", "full_attention"]}),
        ("qwen3", {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}}),
        ("mixtral", {"num_experts_per_tok": 9}),
        ("mixtral", {"num_local_experts": 0}),
        ("mixtral", {"attention_bias": True}),
        ("mixtral", {"sliding_window": 0}),
        ("mixtral", {"layer_types": ["full_attention", "sliding_attention"]}),
        ("qwen3_moe", {"moe_intermediate_size": 0}),
        ("qwen3_moe", {"norm_topk_prob": "yes"}),
        ("qwen3_moe", {"decoder_sparse_step": 0}),
        ("qwen3_moe", {"mlp_only_layers": "all"}),
        ("qwen3_moe", {"layer_types": ["sliding_attention"] * 2}),
        ("gemma2", {"use_bidirectional_attention": True}),
        ("gemma2", {"hidden_activation": "relu"}),
        ("gemma3", {"attn_logit_softcapping": 50.0}),
        ("gemma3", {"sliding_window_pattern": 0}),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(case: str, fields: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedModel) as caught:
        _spec(_changed(case, **fields))
    assert next(iter(fields)) in caught.value.message


@pytest.mark.parametrize(
    "config",
    [
        {"architectures": ["MambaForCausalLM"], "model_type": "mamba"},
        {"architectures": []},
        {"model_type": "deepseek_v3"},
        {},
    ],
)
def test_an_unknown_architecture_is_refused_with_the_known_ones(config: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedModel) as caught:
        model_class(config)
    for name in ARCHITECTURES:
        assert name in caught.value.message


@pytest.mark.parametrize("case", CASES)
def test_model_type_stands_in_for_architectures(case: str) -> None:
    config = config_of(case)
    expected = model_class(config)
    del config["architectures"]
    assert model_class(config) is expected


def test_both_forms_of_rotary_scaling_are_read() -> None:
    expected = Rope(
        theta=500000.0,
        scaling="llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_context=64,
    )
    assert _spec(config_of("llama3")).layers[0].rope == expected
    for key in ("rope_type", "type"):
        old = _old_form("llama3", rope_theta=500000.0, rope_scaling={key: "llama3", **SCALING})
        assert _spec(old) == _spec(config_of("llama3"))
    plain = _old_form("llama3", rope_theta=500000.0, rope_scaling=None)
    assert _spec(plain).layers[0].rope == Rope(theta=500000.0)
    assert _spec(_old_form("llama3")).layers[0].rope == Rope(theta=10000.0)


def test_gemma3_has_a_rotary_base_for_each_kind_of_layer_in_both_forms() -> None:
    new = _spec(config_of("gemma3_linear"))
    far, near = new.layers[1], new.layers[0]
    assert far.rope == Rope(theta=1e6, scaling="linear", factor=8.0) and far.window is None
    assert near.rope == Rope(theta=1e4) and near.window == 12
    old = _old_form(
        "gemma3_linear",
        rope_theta=1e6,
        rope_local_base_freq=1e4,
        rope_scaling={"rope_type": "linear", "factor": 8.0},
    )
    assert _spec(old) == new


def test_absent_layer_types_follow_the_architecture() -> None:
    for case in ("mistral", "qwen2_tied", "gemma2", "gemma3", "gemma3_linear"):
        config = config_of(case)
        windows = [kind.window for kind in _spec(config).layers]
        assert 12 in windows
        del config["layer_types" if "layer_types" in config else "architectures"]
        assert [kind.window for kind in _spec(config).layers] == windows


def test_windows_that_are_switched_off() -> None:
    assert _spec(_changed("mistral", sliding_window=None)).layers[0].window is None
    off = _changed("qwen2_tied", use_sliding_window=False, layer_types=None)
    assert {kind.window for kind in _spec(off).layers} == {None}


def test_mixtures_are_read_under_both_names() -> None:
    expected = MoeSpec(num_experts=16, top_k=4, feed_forward=32, norm_topk_prob=True)
    assert _spec(config_of("qwen3_moe")).moe == expected
    older = _changed("qwen3_moe", num_experts=16)
    del older["num_local_experts"]
    assert _spec(older).moe == expected
    mixtral = _spec(config_of("mixtral"))
    assert mixtral.moe == MoeSpec(num_experts=8, top_k=2, feed_forward=48, norm_topk_prob=True)
    assert _spec(_changed("mixtral", sliding_window=7)).layers[0].window == 7


def test_dense_layers_of_a_mixture() -> None:
    def sparse(**fields: Any) -> list[bool]:
        return [kind.sparse for kind in _spec(_changed("qwen3_moe_mixed", **fields)).layers]

    assert sparse() == [False, True, False, True, False]
    assert sparse(decoder_sparse_step=1, mlp_only_layers=[0, 3]) == [0, 1, 1, 0, 1]
    assert sparse(mlp_only_layers=None, decoder_sparse_step=None) == [1, 1, 1, 1, 1]
    windows = [kind.window for kind in _spec(config_of("qwen3_moe_mixed")).layers]
    assert windows == [12] * 5
    off = _spec(_changed("qwen3_moe_mixed", use_sliding_window=False))
    assert {kind.window for kind in off.layers} == {None}


def test_cache_groups_are_full_first_and_cover_every_layer_once() -> None:
    groups = _spec(config_of("gemma3")).cache_groups()
    assert [(g.kind, g.window, g.layers) for g in groups] == [
        ("full", None, (5,)),
        ("sliding", 12, (0, 1, 2, 3, 4, 6)),
    ]
    assert all((g.num_kv_heads, g.head_dim) == (2, 16) for g in groups)
    (only,) = _spec(config_of("mistral")).cache_groups()
    assert (only.kind, only.window, only.layers) == ("sliding", 12, (0, 1, 2))


def test_image_and_text_gemma_is_served_as_text() -> None:
    text = config_of("gemma3")
    del text["architectures"], text["eos_token_id"]
    whole = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "eos_token_id": [1, 106],
        "text_config": text,
        "vision_config": {},
    }
    cls = model_class(whole)
    spec = cls.spec_from_hf(whole)
    assert spec.eos_token_ids == (1, 106)
    assert spec.layers == _spec(config_of("gemma3")).layers
    for rule in cls.hf_tensors(spec, ModelOptions()).values():
        assert all(name.startswith("language_model.model.") for name in rule.names)
    with pytest.raises(UnsupportedModel, match="text_config"):
        cls.spec_from_hf({**whole, "text_config": 3})


def test_eos_token_ids() -> None:
    for value, expected in ((None, ()), (7, (7,)), ([2, 5, 2], (2, 5))):
        assert _spec(_changed("llama2", eos_token_id=value)).eos_token_ids == expected


def test_llama3_scaling_leaves_fast_frequencies_and_slows_slow_ones() -> None:
    rope = _spec(config_of("llama3")).layers[0].rope
    plain = Rope(theta=rope.theta).frequencies(64)
    scaled = rope.frequencies(64)
    wavelengths = 2 * np.pi / plain
    fast, slow = wavelengths < 64 / 4, wavelengths > 64
    assert fast.any() and slow.any() and (~fast & ~slow).any()
    np.testing.assert_array_equal(scaled[fast], plain[fast])
    np.testing.assert_allclose(scaled[slow], plain[slow] / 8, rtol=1e-6)
    between = scaled[~fast & ~slow] / plain[~fast & ~slow]
    assert ((between > 1 / 8) & (between < 1)).all()
