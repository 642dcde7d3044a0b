"""Codes: their error is bounded, what can be held exactly is, and models of codes compute alike."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from jaxserve.errors import ConfigError, WeightsError
from jaxserve.models.decoder import Decoder, layer_stacks
from jaxserve.models.linear import Linear
from jaxserve.models.options import ModelOptions
from jaxserve.models.quantize import fp8_codes, int4_codes, int8_codes
from jaxserve.models.spec import AttentionSpec
from jaxserve.weights.load import load_model
from pallas_kernels.quant_matmul import gpu, int4_matmul, reference
from tests.models.driver import Driver
from tests.models.loading import ORACLE, load_tiny, skip_without_native
from tests.models.test_decoder import _spec

PROMPT = list(range(3, 40))
#: Sizes that the groups of int4 codes divide.
SPEC = replace(
    _spec([None, 12] * 2),
    hidden_size=64,
    feed_forward=96,
    attention=AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=16, scale=0.25),
)


def test_int8_errs_by_half_a_step_at_most() -> None:
    w = np.random.default_rng(0).standard_normal((64, 3, 5)).astype(np.float32)
    w[:, 1, 2] = 0
    codes, scale = int8_codes(w, 0)
    assert (codes.dtype, scale.shape) == (np.int8, (3, 5))
    error = np.abs(reference.int8_weight(codes, scale) - w)
    assert (error <= np.abs(w).max(0) / 127 / 2 * 1.001).all()
    assert not codes[:, 1, 2].any()
    by_row, scale = int8_codes(w[:, :, 0], 1)
    assert scale.shape == (64,)
    assert (np.abs(by_row).max(1) == 127).all()


def test_int4_holds_what_16_steps_can_hold() -> None:
    rng = np.random.default_rng(1)
    codes = rng.integers(0, 16, (2, 32, 7)).astype(np.float32)
    codes[:, 0], codes[:, 1] = 0, 15
    w = (codes * np.float32(0.125) - 1).reshape(64, 7)
    found, scale, minimum = int4_codes(w)
    assert scale.shape == minimum.shape == (2, 7)
    np.testing.assert_array_equal(reference.int4_weight(found, scale, minimum), w)


def test_codes_do_not_depend_on_how_a_weight_lies() -> None:
    """Weights on a grid, as GGUF's are, make ties likely, which a sum's order would tip."""
    rng = np.random.default_rng(4)
    step, low = rng.random((2, 128, 1, 96)).astype(np.float16)
    w = (rng.integers(0, 16, (128, 32, 96)) * step - low).astype(np.float32).reshape(4096, 96)
    for ours, theirs in zip(int4_codes(w), int4_codes(np.asfortranarray(w)), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_int4_errs_less_than_by_range_alone() -> None:
    w = np.random.default_rng(2).standard_normal((320, 9)).astype(np.float32)
    codes, scale, minimum = int4_codes(w)
    error = np.square(reference.int4_weight(codes, scale, minimum) - w).mean()
    groups = w.reshape(10, 32, 9)
    step = np.ptp(groups, 1, keepdims=True) / 15
    low = groups.min(1, keepdims=True)
    by_range = np.square(np.rint((groups - low) / step) * step + low - groups).mean()
    assert error < 0.95 * by_range
    constant = np.full((32, 2), 0.3, np.float32)
    held = reference.int4_weight(*int4_codes(constant))
    np.testing.assert_allclose(held, constant, rtol=2**-8)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_has_no_code_is_refused(bad: float) -> None:
    w = np.ones((32, 2), np.float32)
    w[3, 1] = bad
    for codes_of in (int4_codes, lambda w: int8_codes(w, 0)):
        with pytest.raises(ValueError, match="not finite"):
            codes_of(w)
    with pytest.raises(ValueError, match="has 33"):
        int4_codes(np.ones((33, 2), np.float32))


def held(model: Decoder, options: ModelOptions) -> Decoder:
    """An unrolled, plain model's weights, held in another way."""
    skip_without_native(options)
    other = nnx.eval_shape(lambda: type(model)(model.spec, options, rngs=nnx.Rngs(0)))
    plain = {path: np.asarray(p.get_value()) for path, p in model.params().items()}
    params, stacks = other.params(), layer_stacks(model.spec, options)
    for path in params:
        if path[0] != "layers":
            arrays = other.encode(path, plain[path]) if path in plain else {}
        elif ("layers", 0, *path[2:]) in plain:
            entry = path[1]
            assert isinstance(entry, int)
            parts = [plain["layers", i, *path[2:]] for i in stacks[entry]]
            arrays = other.encode(path, parts[0] if len(parts) == 1 else np.stack(parts))
        else:
            continue  # a scale, which comes with its codes
        for name, array in arrays.items():
            params[name].set_value(jnp.asarray(array))
    return other


def logits(model: Decoder) -> np.ndarray:
    driver = Driver(model, 1, 64)
    first, _ = driver.step({0: PROMPT})
    second, _ = driver.step({0: [5]})
    return np.stack([first[0], second[0]])


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_every_way_of_holding_codes_computes_the_same(quantization: str) -> None:
    model = Decoder(SPEC, ModelOptions(), rngs=nnx.Rngs(0))
    plain = logits(model)
    dense = ModelOptions(quantization=quantization)
    expected = logits(held(model, dense))
    change = np.linalg.norm(expected - plain) / np.linalg.norm(plain)
    assert 1e-3 < change < {"int8": 0.03, "int4": 0.3}[quantization]
    packed = replace(dense, matmul="cpu")
    for options in (replace(dense, layers="scanned"), packed, replace(packed, layers="scanned")):
        other = logits(held(model, options))
        np.testing.assert_allclose(other, expected, rtol=1e-4, atol=1e-4, err_msg=str(options))


def test_int4_products_of_few_tokens_are_the_hopper_kernels(monkeypatch) -> None:
    taken: list[tuple[int, ...]] = []

    def kernel(x: Any, codes: Any, scale: Any, minimum: Any) -> Any:
        taken.append((*x.shape, *codes.shape[1:]))
        return int4_matmul(x, codes, scale, minimum)

    monkeypatch.setattr(gpu, "int4_matmul", kernel)
    options = ModelOptions(dtype="bfloat16", quantization="int4", matmul="gpu")
    for depth, out in ((64, (2, 128)), (96, (256,)), (64, (128,))):
        axes = ("embed", *[None] * len(out))
        linear = Linear(depth, out, options, axes=axes, rngs=nnx.Rngs(0))
        plain = Linear(depth, out, replace(options, matmul="xla"), axes=axes, rngs=nnx.Rngs(0))
        for num_tokens in (1, 64, 65):
            x = jnp.ones((num_tokens, depth), jnp.bfloat16)
            np.testing.assert_array_equal(linear(x), plain(x))
    assert taken == [(1, 64, 2, 128), (64, 64, 2, 128)]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"quantization": "int8", "dtype": "bfloat16"}, "bfloat16 by weights.quantization=int8"),
        ({"quantization": "int4", "dtype": "float32"}, "float32 by weights.quantization=int4"),
    ],
)
def test_weights_that_the_hopper_kernel_does_not_read(options: dict, reason: str) -> None:
    with pytest.raises(ConfigError, match=f"kernels.matmul=gpu .*{reason}"):
        ModelOptions(matmul="gpu", **options)


@pytest.mark.parametrize("case", ["llama3", "qwen2_tied", "gemma3"])
def test_checkpoints_are_quantized_while_they_are_loaded(case: str) -> None:
    options = ModelOptions(quantization="int8", matmul="cpu", layers="scanned")
    quantized = logits(load_tiny(case, options))
    expected = logits(held(load_tiny(case, ModelOptions()), ModelOptions(quantization="int8")))
    np.testing.assert_allclose(quantized, expected, rtol=1e-3, atol=1e-3)
    with pytest.raises(ConfigError, match=r"32 inputs at a time.* matrix of 112"):
        load_tiny(case, ModelOptions(quantization="int4"))


def test_fp8_codes_err_by_their_last_bit_at_most() -> None:
    rng = np.random.default_rng(0)
    w = rng.standard_normal((64, 3, 5)).astype(np.float32)
    w[:, 0, 0] = 0
    codes, scale = fp8_codes(w, 0)
    assert (codes.dtype, scale.shape, scale[0, 0]) == (ml_dtypes.float8_e4m3fn, (3, 5), 1)
    held = codes.astype(np.float32) * scale
    assert np.abs(codes.astype(np.float32)).max((0,))[1:].min() == 448
    # Three bits of mantissa; below the least exponent a fixed step.
    assert (np.abs(held - w) <= np.maximum(np.abs(w) / 16, scale * 2.0**-10)).all()


def test_fp8_weights_are_loaded_and_scanned() -> None:
    fp8 = ModelOptions(quantization="fp8")
    plain, quantized = logits(load_tiny("llama3", ModelOptions())), logits(load_tiny("llama3", fp8))
    change = np.linalg.norm(quantized - plain) / np.linalg.norm(plain)
    assert 0.01 < change < 0.4  # int8: 0.07; a model of noise amplifies what is rounded
    scanned = logits(load_tiny("llama3", replace(fp8, layers="scanned")))
    np.testing.assert_allclose(scanned, quantized, rtol=1e-3, atol=1e-3)
    with pytest.raises(ConfigError, match="reads no fp8 weights"):
        replace(fp8, matmul="cpu")


@pytest.mark.parametrize("matmul", ["xla", "cpu"])
@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_random_codes_have_the_variance_of_random_weights(matmul: str, quantization: str) -> None:
    options = ModelOptions(quantization=quantization, matmul=matmul)
    model = Decoder(SPEC, options, rngs=nnx.Rngs(0))
    x = jnp.asarray(np.random.default_rng(3).standard_normal((50, 64)), jnp.float32)
    assert 0.7 < float(model.layers[0].mlp.gate_up(x).std()) < 1.3
    assert 0.7 < float(model.embed.logits(x).std()) < 1.3


def test_a_weight_without_a_code_is_named(tmp_path) -> None:
    from safetensors.numpy import load_file, save_file

    for file in (ORACLE / "llama3").iterdir():
        if file.suffix == ".safetensors":
            tensors = load_file(file)
            name = next(name for name in tensors if "down_proj" in name)
            tensors[name] = np.full_like(tensors[name], np.nan)
            save_file(tensors, tmp_path / file.name)
        else:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(WeightsError, match=r"down_proj.*not finite"):
        load_model(tmp_path, options=ModelOptions(quantization="int8"))
