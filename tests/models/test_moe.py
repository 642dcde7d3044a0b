"""The mixture of experts by itself: routing, padding, codes, and the work it counts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxserve.errors import ConfigError
from jaxserve.models.decoder import Decoder
from jaxserve.models.layers import ACTIVATIONS
from jaxserve.models.mixtral import Mixtral
from jaxserve.models.moe import MixtureMLP, route, router_logits
from jaxserve.models.options import ModelOptions
from jaxserve.models.spec import LayerKind, ModelSpec, MoeSpec
from jaxserve.weights.load import load_model
from tests.models.driver import Driver
from tests.models.loading import ORACLE
from tests.models.test_decoder import _spec

MOE = MoeSpec(num_experts=6, top_k=2, feed_forward=12, norm_topk_prob=True)


def spec_of(moe: MoeSpec = MOE, sparse: tuple[bool, ...] = (True,)) -> ModelSpec:
    """A small model with these layers."""
    spec = _spec([None] * len(sparse))
    kinds = tuple(replace(spec.layers[0], sparse=flag) for flag in sparse)
    return replace(spec, moe=moe, layers=kinds)


def mlp_of(moe: MoeSpec = MOE, options: ModelOptions | None = None) -> MixtureMLP:
    """A layer's mixture, with random weights."""
    return MixtureMLP(spec_of(moe), options or ModelOptions(), nnx.Rngs(3))


def run(mlp: MixtureMLP, x: np.ndarray, num_live: int, deltas: Any = None) -> np.ndarray:
    """The mixture of some tokens, of which the first are live."""
    fields = {"num_live": jnp.int32(num_live), "stack_index": None, "deltas": deltas}
    inputs: Any = type("Inputs", (), fields)()
    return np.asarray(mlp(jnp.asarray(x, mlp.options.activations), inputs), np.float32)


def expected(mlp: MixtureMLP, x: np.ndarray) -> np.ndarray:
    """One token and one expert at a time, in float64."""
    router, gate, up, down = (
        np.asarray(param[...], np.float64)
        for param in (mlp.router, mlp.gate.weight, mlp.up.weight, mlp.down.weight)
    )
    out = np.zeros(x.shape)
    for t, row in enumerate(x.astype(np.float64)):
        probabilities = np.exp(row @ router)
        probabilities /= probabilities.sum()
        chosen = np.argsort(-probabilities, kind="stable")[: mlp.moe.top_k]
        weights = probabilities[chosen]
        if mlp.moe.norm_topk_prob:
            weights /= weights.sum()
        for e, weight in zip(chosen, weights, strict=True):
            activated = np.asarray(ACTIVATIONS[mlp.activation](jnp.asarray(row @ gate[e])))
            out[t] += weight * ((activated * (row @ up[e])) @ down[e])
    return out


@pytest.mark.parametrize("norm_topk_prob", [True, False])
@pytest.mark.parametrize("num_tokens", [1, 2, 23, 200])
def test_each_token_goes_through_its_experts(num_tokens: int, norm_topk_prob: bool) -> None:
    mlp = mlp_of(replace(MOE, norm_topk_prob=norm_topk_prob))
    x = np.random.default_rng(num_tokens).standard_normal((num_tokens, 8)).astype(np.float32)
    np.testing.assert_allclose(run(mlp, x, num_tokens), expected(mlp, x), atol=2e-5, rtol=0)


@pytest.mark.parametrize("top_k", [1, 6])
def test_one_expert_and_all_of_them(top_k: int) -> None:
    mlp = mlp_of(replace(MOE, top_k=top_k))
    x = np.random.default_rng(0).standard_normal((9, 8)).astype(np.float32)
    np.testing.assert_allclose(run(mlp, x, 9), expected(mlp, x), atol=2e-5, rtol=0)


def test_all_tokens_to_the_same_experts() -> None:
    mlp = mlp_of()
    router = np.asarray(mlp.router[...]).copy()
    x = np.abs(np.random.default_rng(0).standard_normal((40, 8))).astype(np.float32)
    router[:, 4], router[:, 1] = 5, 4
    mlp.router.set_value(jnp.asarray(router))
    chosen, _ = route(router_logits(jnp.asarray(x), mlp.router[...]), mlp.moe)
    assert set(map(tuple, np.asarray(chosen).tolist())) == {(4, 1)}
    np.testing.assert_allclose(run(mlp, x, 40), expected(mlp, x), atol=2e-5, rtol=0)


def test_ties_go_to_the_first_experts() -> None:
    x = jnp.ones((3, 8))
    chosen, weights = route(jnp.zeros((3, 6)), MOE)
    np.testing.assert_array_equal(chosen, [[0, 1]] * 3)
    np.testing.assert_allclose(weights, 0.5)
    _, weights = route(jnp.zeros((3, 6)), replace(MOE, norm_topk_prob=False))
    np.testing.assert_allclose(weights, 1 / 6, rtol=1e-6)
    mlp = mlp_of()
    mlp.router.set_value(jnp.zeros((8, 6)))
    out = run(mlp, np.asarray(x), 3)
    np.testing.assert_allclose(out, expected(mlp, np.asarray(x)), atol=2e-5, rtol=0)


def test_routing_is_float32_whatever_the_activations() -> None:
    """Two experts closer than bfloat16 can tell."""
    router = np.zeros((8, 6), np.float32)
    router[0, 3], router[0, 5] = 1.0, 1.0001
    logits = router_logits(jnp.ones((1, 8), jnp.bfloat16), jnp.asarray(router))
    chosen, weights = route(logits, MOE)
    assert chosen.tolist() == [[5, 3]] and weights.dtype == jnp.float32
    assert weights[0, 0] > weights[0, 1]


@pytest.mark.parametrize("num_live", [0, 1, 5])
def test_padding_reads_no_expert(num_live: int) -> None:
    """Padding would go to an expert that is not a number."""
    mlp = mlp_of()
    x = np.random.default_rng(1).standard_normal((8, 8)).astype(np.float32)
    live = x[:num_live]
    chosen, _ = route(router_logits(jnp.asarray(live), mlp.router[...]), MOE)
    touched = set(np.asarray(chosen).ravel().tolist())
    reference = expected(mlp, live)
    for experts in (mlp.gate, mlp.up, mlp.down):
        weight = np.asarray(experts.weight[...]).copy()
        weight[[e for e in range(6) if e not in touched]] = np.nan
        experts.weight.set_value(jnp.asarray(weight))
    out = run(mlp, x, num_live)
    np.testing.assert_allclose(out[:num_live], reference, atol=2e-5, rtol=0)
    assert not out[num_live:].any()


def test_experts_as_codes() -> None:
    case = ORACLE / "mixtral"
    plain = Driver(load_model(case, options=ModelOptions()), 1, 64)
    tokens = np.load(case / "reference.npz")["tokens"].tolist()
    expected = plain.step({0: tokens})[0]
    found = {}
    for layers in ("unrolled", "scanned"):
        model = load_model(case, options=ModelOptions(quantization="int8", layers=layers))
        codes = [
            param
            for path, param in model.params().items()
            if path[-3:-1] == ("mlp", "gate") and path[-1] == "weight"
        ]
        assert codes and all(param.dtype == jnp.int8 for param in codes)
        found[layers] = Driver(model, 1, 64).step({0: tokens})[0]
    np.testing.assert_allclose(found["scanned"], found["unrolled"], atol=1e-4, rtol=0)
    change = np.linalg.norm(found["unrolled"] - expected) / np.linalg.norm(expected)
    assert 1e-4 < change < 0.05


def test_random_codes_have_the_variance_of_random_weights() -> None:
    moe = replace(MOE, feed_forward=96)
    wide = replace(spec_of(moe), hidden_size=64)
    for quantization in ("none", "int8"):
        mlp = MixtureMLP(wide, ModelOptions(quantization=quantization), nnx.Rngs(0))
        matrix = mlp.gate.arrays()
        weight = np.asarray(matrix.weight, np.float32)
        if matrix.scale is not None:
            weight = weight * np.asarray(matrix.scale)[:, None]
        assert 0.9 < weight.std() * 8 < 1.1


def test_what_has_no_experts_is_refused() -> None:
    for options, reason in (
        (ModelOptions(matmul="cpu"), r"kernels\.matmul=cpu .*grouped by expert"),
        (ModelOptions(quantization="int4"), r"quantization=int4 .*=int8"),
    ):
        with pytest.raises(ConfigError, match=reason):
            nnx.eval_shape(lambda options=options: Mixtral(spec_of(), options, rngs=nnx.Rngs(0)))


def test_a_scan_reads_the_stack_in_place() -> None:
    """No temporary as large as one layer's experts."""
    moe = MoeSpec(num_experts=16, top_k=2, feed_forward=256, norm_topk_prob=True)
    spec = replace(spec_of(moe, (True,) * 3), hidden_size=128)
    model = Mixtral(spec, ModelOptions(layers="scanned"), rngs=nnx.Rngs(0))
    gate = model.params()["layers", 0, "mlp", "gate", "weight"]
    assert gate.shape == (3, 16, 128, 256)
    memory = Driver(model, 1, 8).compiled(4).memory_analysis()
    assert memory.temp_size_in_bytes < gate.nbytes / 3


def test_counted_work() -> None:
    spec = spec_of(sparse=(False, True, True))
    model = Decoder(spec, ModelOptions(dtype="bfloat16"), rngs=nnx.Rngs(0))
    # qkv 8 x 16 and out 8 x 8 in each layer; gate, up and down 8 x 16 in the dense one
    dense, router, expert = 3 * (8 * 16 + 8 * 8) + 3 * 8 * 16, 2 * 8 * 6, 2 * 3 * 8 * 12
    written = 2 * 4 * 2  # a key and a value of one head
    flops, num_bytes = model.count_work(5, 0, 0)
    assert flops == 2 * 5 * (dense + router + 2 * expert)
    touched = 6 * (1 - (4 / 6) ** 5)
    assert num_bytes == round(2 * (dense + touched * expert + 5 * 8) + 4 * router) + 3 * 5 * written
    # one token reads the experts that it goes to, many read all of them
    one, many = (model.count_work(n, 0, 0)[1] - n * (2 * 8 + 3 * written) for n in (1, 10_000))
    assert one == 2 * (dense + 2 * expert) + 4 * router
    assert many == 2 * (dense + 6 * expert) + 4 * router


def test_kinds_tell_sparse_layers() -> None:
    model = nnx.eval_shape(
        lambda: Mixtral(spec_of(sparse=(False, True)), ModelOptions(), rngs=nnx.Rngs(0))
    )
    kinds = [isinstance(layer.mlp, MixtureMLP) for layer in model.layers]
    assert kinds == [False, True]
    assert LayerKind(rope=spec_of().layers[0].rope).sparse is False
