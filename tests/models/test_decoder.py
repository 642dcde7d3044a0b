"""The decoder as a module: built abstractly, its parameters, its layers' order, counted work."""

from __future__ import annotations

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxserve.errors import ConfigError
from jaxserve.models.decoder import Decoder, layer_stacks
from jaxserve.models.options import ModelOptions
from jaxserve.models.registry import model_class
from jaxserve.models.rotary import Rope
from jaxserve.models.spec import AttentionSpec, LayerKind, ModelSpec
from tests.models.driver import Driver
from tests.models.loading import CASES, DENSE, config_of, load_tiny

SCANNED = ModelOptions(layers="scanned")
PACKED = ModelOptions(matmul="cpu", attention="cpu")


def _abstract(case: str, options: ModelOptions) -> Decoder:
    cls = model_class(config_of(case))
    spec = cls.spec_from_hf(config_of(case))
    return nnx.eval_shape(lambda: cls(spec, options, rngs=nnx.Rngs(0)))


def _spec(windows: list[int | None]) -> ModelSpec:
    return ModelSpec(
        architecture="LlamaForCausalLM",
        vocab_size=50,
        hidden_size=8,
        feed_forward=16,
        max_context=64,
        eos_token_ids=(),
        attention=AttentionSpec(num_heads=2, num_kv_heads=1, head_dim=4, scale=0.5),
        layers=tuple(LayerKind(rope=Rope(theta=1e4), window=window) for window in windows),
        activation="silu",
        norm_eps=1e-6,
        tied=True,
    )


@pytest.mark.parametrize(
    ("case", "options"),
    [(case, options) for case in CASES for options in (ModelOptions(), SCANNED)]
    + [(case, PACKED) for case in DENSE],
)
def test_abstract_models_have_a_rule_and_axes_for_every_parameter(
    case: str, options: ModelOptions
) -> None:
    model = _abstract(case, options)
    params = model.params()
    rules = model.hf_tensors(model.spec, options)
    assert set(params) == set(rules)
    for path, param in params.items():
        assert isinstance(param.get_value(), jax.ShapeDtypeStruct), path
        assert len(param.get_metadata("axes")) == len(param.shape), path
        exact = path[-1] in ("scale", "bias")
        assert param.dtype == (jnp.float32 if exact else options.dtype), path
        built = rules[path].build([np.zeros(shape, np.float32) for shape in rules[path].shapes])
        (held,) = model.encode(path, built).values()
        assert (held.shape, held.dtype) == (param.shape, param.dtype), path


def test_axes_name_what_can_be_sharded() -> None:
    params = _abstract("llama3", SCANNED).params()
    axes = {path[1:]: param.get_metadata("axes") for path, param in params.items()}
    assert axes["table",] == ("vocab", "embed")
    assert axes[0, "attention", "qkv", "weight"] == ("layers", "embed", "kv_heads", None, None)
    assert axes[0, "attention", "out", "weight"] == ("layers", "heads", "embed")
    assert axes[0, "mlp", "gate_up", "weight"] == ("layers", "embed", None, "mlp")
    assert axes[0, "mlp", "down", "weight"] == ("layers", "mlp", "embed")
    assert params["layers", 0, "attention", "qkv", "weight"].shape == (3, 64, 2, 4, 16)


def test_stacks_follow_the_repeating_pattern() -> None:
    local, far = 12, None
    cases: list[tuple[list[int | None], tuple[tuple[int, ...], ...]]] = [
        ([far] * 3, ((0, 1, 2),)),
        ([local, far] * 2, ((0, 2), (1, 3))),
        ([local, far, local, far, local], ((0, 2), (1, 3), (4,))),
        ([local, local, far], ((0,), (1,), (2,))),
        ([far, local, local], ((0,), (1,), (2,))),
        ([far], ((0,),)),
    ]
    for windows, expected in cases:
        assert layer_stacks(_spec(windows), SCANNED) == expected
        alone = tuple((i,) for i in range(len(windows)))
        assert layer_stacks(_spec(windows), ModelOptions()) == alone


def test_random_weights_have_the_stacked_layers_differ() -> None:
    model = Decoder(_spec([None] * 3), SCANNED, rngs=nnx.Rngs(0))
    weight = np.asarray(model.params()["layers", 0, "mlp", "down", "weight"].get_value())
    assert not np.allclose(weight[0], weight[1])
    assert 0.15 < weight.std() < 0.35  # 1 / sqrt(16)


def test_encode_refuses_wrong_shapes_and_values_beyond_the_dtype() -> None:
    for options in (ModelOptions(), PACKED):
        model = _abstract("llama3", options)
        path = ("layers", 0, "mlp", "down", "weight")
        with pytest.raises(ValueError, match="shape"):
            model.encode(path, np.zeros((64, 64), np.float32))
    half = _abstract("llama3", ModelOptions(dtype="float16", matmul="cpu"))
    with pytest.raises(ValueError, match="65504"):
        half.encode(path, np.full((112, 64), 1e6, np.float32))
    with pytest.raises(KeyError):
        half.encode(("layers", 9), np.zeros(1, np.float32))


def test_options_are_checked() -> None:
    with pytest.raises(ConfigError, match="bfloat16"):
        ModelOptions(matmul="cpu", dtype="bfloat16")
    for field in ("dtype", "matmul", "attention", "layers"):
        with pytest.raises(ConfigError, match=field):
            ModelOptions(**{field: "fast"})
    assert ModelOptions(matmul="cpu", dtype="float16").activations == "float32"
    assert ModelOptions(dtype="bfloat16").activations == "bfloat16"


def test_the_base_class_reads_no_checkpoint() -> None:
    with pytest.raises(TypeError, match="registry"):
        Decoder.spec_from_hf({})
    with pytest.raises(TypeError, match="registry"):
        Decoder.layer_tensors(_spec([None]), _spec([None]).layers[0], "model.layers.0")


def test_a_rows_result_does_not_depend_on_its_company() -> None:
    """Alone, and in company with more padding; only rounding differs."""
    model = load_tiny("gemma2", PACKED)
    mine, other = list(range(10, 40)), list(range(100, 130))
    alone, company = Driver(model, 3, 64), Driver(model, 3, 64)
    first = alone.step({1: mine}, num_rows=1, num_tokens=32)[0][0]
    both = company.step({0: other, 1: mine}, num_rows=4, num_tokens=96)[0]
    np.testing.assert_allclose(first, both[1], atol=1e-5, rtol=0)
    for token in (7, 8, 9):
        first = alone.step({1: [token]})[0][0]
        both = company.step({0: [3], 1: [token]}, num_rows=4, num_tokens=4)[0]
        np.testing.assert_allclose(first, both[1], atol=1e-5, rtol=0)


def test_the_cache_is_updated_in_place() -> None:
    """The donated pages are the returned ones, unrolled and scanned."""
    for layers in ("unrolled", "scanned"):
        options = ModelOptions(layers=layers)
        model = load_tiny("llama3", options)
        driver = Driver(model, 2, 64)
        bytes_of_cache = sum(x.nbytes for x in jax.tree.leaves(driver.cache))
        memory = driver.compiled(8).memory_analysis()
        assert memory.alias_size_in_bytes >= bytes_of_cache, layers


def test_counted_work() -> None:
    spec = _spec([None, 4])
    model = Decoder(spec, ModelOptions(dtype="bfloat16"), rngs=nnx.Rngs(0))
    # qkv 8 x 16, out 8 x 8, gate and up 8 x 32, down 16 x 8; two layers
    matrices = 2 * (8 * 16 + 8 * 8 + 8 * 32 + 16 * 8)
    flops, num_bytes = model.count_work(3, 2, 30)
    read = 30 + 2 * 4  # the second layer's window holds 4 of each of two rows
    assert flops == 2 * matrices * 3 + 2 * 50 * 8 * 2 + 4 * 2 * 4 * read
    assert num_bytes == 2 * (matrices + 50 * 8) + 2 * 4 * 2 * (read + 2 * 3)
    wide = model.count_work(3, 2, 30, cache_dtype_bytes=4)[1]
    assert wide - num_bytes == 2 * 4 * 2 * (read + 2 * 3)
    # without logits only the looked-up rows of the table are read
    assert model.count_work(3, 0, 30)[1] == 2 * (matrices + 3 * 8) + 2 * 4 * 2 * (30 + 4 + 2 * 3)


def test_work_matches_the_parameters_held() -> None:
    for case in CASES:
        model = _abstract(case, ModelOptions())
        exact, spec = {"scale", "bias"}, model.spec
        params = {path: p for path, p in model.params().items() if path[-1] not in exact}
        # Of a mixture, one token reads as many experts as it goes to.
        read = 1 if spec.moe is None else Fraction(spec.moe.top_k, spec.moe.num_experts)
        held = sum(
            p.size * 4 * (read if "experts" in p.get_metadata("axes") else 1)
            for p in params.values()
        )
        lookup = 0 if spec.tied else spec.vocab_size * spec.hidden_size * 4
        written = 2 * spec.num_layers * spec.attention.num_kv_heads * spec.attention.head_dim * 4
        row = 0 if spec.tied else spec.hidden_size * 4
        assert model.count_work(1, 1, 0)[1] == held - lookup + row + written, case
