"""Loading a checkpoint into a model: the values, where they go, and what is said of broken ones."""

from __future__ import annotations

import json
import logging
import threading
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxserve.errors import ConfigError, UnsupportedModel, WeightsError
from jaxserve.models.options import ModelOptions
from jaxserve.weights.checkpoint import open_checkpoint
from jaxserve.weights.load import load_model
from tests.models.driver import Driver
from tests.models.loading import ORACLE, config_of, load_tiny

OPTIONS = ModelOptions(layers="scanned")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A copy of a small checkpoint, to be changed."""
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((ORACLE / "llama3" / name).read_bytes())
    return tmp_path


def rewrite(directory: Path, change: dict[str, np.ndarray | None]) -> None:
    """Replaces tensors; None removes one."""
    tensors: dict[str, Any] = {**load_file(ORACLE / "llama3" / "model.safetensors"), **change}
    save_file(
        {name: t for name, t in tensors.items() if t is not None}, directory / "model.safetensors"
    )


@pytest.mark.parametrize(
    "options",
    [ModelOptions(), OPTIONS, ModelOptions(dtype="bfloat16"), ModelOptions(dtype="float16")],
    ids=str,
)
def test_parameters_are_what_the_rules_make_of_the_tensors(options: ModelOptions) -> None:
    ours = load_model(ORACLE / "gemma2", options=options)
    expected = load_tiny("gemma2", options).params()
    assert set(ours.params()) == set(expected)
    for path, param in ours.params().items():
        value = param.get_value()
        assert isinstance(value, jax.Array) and value.dtype == expected[path].dtype
        np.testing.assert_array_equal(np.asarray(value), np.asarray(expected[path].get_value()))


def test_packed_weights_are_loaded_packed() -> None:
    options = ModelOptions(matmul="cpu", attention="cpu")
    expected = load_tiny("llama3", options).params()
    for path, param in load_model(ORACLE / "llama3", options=options).params().items():
        np.testing.assert_array_equal(np.asarray(param), np.asarray(expected[path]))


def test_a_sharded_checkpoint_gives_the_same_logits(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"model-1-of-2.safetensors": names[::2], "model-2-of-2.safetensors": names[1::2]}
    for shard, held in shards.items():
        save_file({name: tensors[name] for name in held}, directory / shard)
    places = {name: shard for shard, held in shards.items() for name in held}
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    arrays = np.load(ORACLE / "llama3" / "reference.npz")
    driver = Driver(load_model(directory, options=OPTIONS), 1, 64)
    _, hidden = driver.step({0: arrays["tokens"].tolist()})
    np.testing.assert_allclose(driver.all_logits(hidden), arrays["logits"], atol=1e-4, rtol=0)
    (directory / "model-2-of-2.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"model-2-of-2\.safetensors is missing"):
        load_model(directory, options=OPTIONS)


def test_each_parameter_goes_where_its_axes_say() -> None:
    device = jax.devices()[0]
    asked: list[tuple[str | None, ...]] = []

    def sharding(axes: tuple[str | None, ...], shape: tuple[int, ...]) -> jax.sharding.Sharding:
        assert len(axes) == len(shape)
        asked.append(axes)
        mesh = jax.make_mesh((1,), ("model",), devices=[device])
        spec = jax.sharding.PartitionSpec(*(None if a != "vocab" else "model" for a in axes))
        return jax.sharding.NamedSharding(mesh, spec)

    model = load_model(ORACLE / "qwen2_tied", options=ModelOptions(), sharding=sharding)
    params = model.params()
    assert len(asked) == len(params) and ("vocab", "embed") in asked
    table = params["embed", "table"].get_value()
    assert isinstance(table.sharding, jax.sharding.NamedSharding)
    assert table.sharding.spec[0] == "model"
    for param in params.values():
        assert param.get_value().ndim == len(param.get_metadata("axes"))


def test_progress_counts_up_to_the_number_of_parameters() -> None:
    seen: list[tuple[str, int, int]] = []
    model = load_model(
        ORACLE / "qwen2", options=ModelOptions(), progress=lambda *now: seen.append(now)
    )
    count = len(model.params())
    assert seen == [("loading", i, count) for i in range(1, count + 1)]


def test_all_faults_are_reported_at_once_before_anything_is_read(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = "model.layers.0"
    rewrite(directory, {
        f"{layer}.self_attn.k_proj.weight": None,
        f"{layer}.mlp.up_proj.weight": np.zeros((3, 4), np.float32),
        "lm_head.weight": None,
        "model.norm.weight": np.zeros(65, np.float32),
    })  # fmt: skip
    monkeypatch.setattr(jax, "device_put", lambda *_: pytest.fail("loaded before all was checked"))
    with pytest.raises(WeightsError) as caught:
        load_model(directory, options=ModelOptions())
    message = str(caught.value)
    assert (
        str(directory) in message and message.count("is missing") + message.count("has shape") == 3
    )
    assert "and 1 more" in message
    rewrite(directory, {f"{layer}.mlp.up_proj.weight": np.zeros((3, 4), np.float32)})
    with pytest.raises(WeightsError, match=r"up_proj\.weight' has shape \(3, 4\).*\(112, 64\)"):
        load_model(directory, options=ModelOptions())


def test_unexpected_tensors_are_logged_and_known_ones_are_not(
    directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rewrite(directory, {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32)})
    with caplog.at_level(logging.WARNING):
        load_model(directory, options=OPTIONS)
    assert not caplog.records
    rewrite(directory, {"model.extra.weight": np.ones(8, np.float32)})
    with caplog.at_level(logging.WARNING):
        load_model(directory, options=OPTIONS)
    assert "model.extra.weight" in caplog.text and "1 tensors are not used" in caplog.text


def test_an_output_head_beside_a_tied_table_is_not_worth_a_word(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tensors = load_file(ORACLE / "qwen2_tied" / "model.safetensors")
    head = tensors["model.embed_tokens.weight"]
    save_file({**tensors, "lm_head.weight": head}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config_of("qwen2_tied")))
    with caplog.at_level(logging.WARNING):
        load_model(tmp_path, options=ModelOptions())
    assert not caplog.records


@pytest.mark.parametrize("matmul", ["xla", "cpu"])
def test_values_beyond_float16_are_refused(directory: Path, matmul: str) -> None:
    name = "model.layers.2.mlp.down_proj.weight"
    rewrite(directory, {name: np.full((64, 112), 1e5, np.float32)})
    options = ModelOptions(dtype="float16", matmul=matmul, attention=matmul)
    with pytest.raises(WeightsError, match=f"{name}.* range of float16"):
        load_model(directory, options=options)


def test_integers_are_no_weights(directory: Path) -> None:
    rewrite(directory, {"model.norm.weight": np.ones(64, np.int8)})
    with pytest.raises(UnsupportedModel, match="'model.norm.weight' is int8"):
        load_model(directory, options=ModelOptions())


def test_a_failure_leaves_no_thread_behind(directory: Path) -> None:
    rewrite(directory, {"model.norm.weight": np.ones(64, np.int8)})
    with pytest.raises(UnsupportedModel):
        load_model(directory, options=ModelOptions())
    assert not [t for t in threading.enumerate() if "loading" in t.name]


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, r"config\.json"),
        ({"config.json": b"{"}, r"config\.json"),
        ({"config.json": b"[]"}, "JSON object"),
        ({"config.json": b"\xff"}, r"config\.json"),
        ({"config.json": b"{}"}, r"no \.safetensors files"),
    ],
)
def test_a_broken_directory_gives_one_sentence(
    files: dict[str, bytes], words: str, tmp_path: Path
) -> None:
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(WeightsError, match=words) as caught:
        load_model(tmp_path, options=OPTIONS)
    assert "\n" not in str(caught.value)


def test_the_format_may_be_given_and_must_fit(directory: Path) -> None:
    assert open_checkpoint(directory, "hf").config["hidden_size"] == 64
    with pytest.raises(WeightsError, match="no model at"):
        open_checkpoint(directory / "none")
    with pytest.raises(WeightsError, match="is a file"):
        open_checkpoint(directory / "config.json", "hf")
    with pytest.raises(WeightsError, match="not a GGUF file"):
        open_checkpoint(directory / "config.json", "auto")
    with pytest.raises(WeightsError, match="must hold one .gguf file"):
        open_checkpoint(directory, "gguf")
    with pytest.raises(WeightsError, match="Orbax"):
        open_checkpoint(directory, "orbax")
    with pytest.raises(ConfigError, match="'zip'"):
        open_checkpoint(directory, "zip")


def test_end_tokens_come_from_the_generation_config(directory: Path) -> None:
    (directory / "generation_config.json").write_text('{"eos_token_id": [7, 8]}')
    assert load_model(directory, options=OPTIONS).spec.eos_token_ids == (7, 8)
    (directory / "generation_config.json").write_text('{"temperature": 1}')
    assert load_model(directory, options=OPTIONS).spec.eos_token_ids == (2, 5)


def test_bfloat16_files_are_read_without_rounding(directory: Path) -> None:
    checkpoint = open_checkpoint(directory)
    name = "model.embed_tokens.weight"
    assert checkpoint.read(name).dtype == ml_dtypes.bfloat16
    table = load_model(directory, options=ModelOptions()).params()["embed", "table"].get_value()
    np.testing.assert_array_equal(np.asarray(table), checkpoint.read(name).astype(np.float32))
