"""PEFT adapters: read as they were written; broken ones refused, with a reason that says why."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxserve.errors import InvalidAdapter
from jaxserve.formats.peft import (
    WEIGHTS_FILE,
    Adapter,
    LoraModule,
    adapter_digest,
    read_adapter,
    write_adapter,
)
from jaxserve.formats.peft_config import CONFIG_FILE, PeftConfig, parse_config

LAYER = "model.layers.0.self_attn"
PREFIX = "base_model.model."


def module(
    rank: int, size_in: int, size_out: int, scale: float, *, embedding: bool = False
) -> LoraModule:
    """With random matrices."""
    rng = np.random.default_rng(rank)
    return LoraModule(
        a=rng.normal(size=(rank, size_in)).astype(np.float32),
        b=rng.normal(size=(size_out, rank)).astype(np.float32),
        scale=scale,
        embedding=embedding,
    )


def adapter() -> Adapter:
    """Ranks and alphas that differ by module, rsLoRA, and a table's delta."""
    config = PeftConfig(
        rank=4,
        alpha=8.0,
        rslora=True,
        target_modules=("q_proj", "v_proj", "embed_tokens"),
        rank_pattern={"v_proj": 2},
        alpha_pattern={r"layers\.0\.self_attn\.v_proj": 3.0},
        base_model="base",
    )
    modules = {
        f"{LAYER}.q_proj": module(4, 6, 8, 8 / math.sqrt(4)),
        f"{LAYER}.v_proj": module(2, 6, 4, 3 / math.sqrt(2)),
        "model.embed_tokens": module(4, 10, 6, 8 / math.sqrt(4), embedding=True),
    }
    return Adapter(config=config, modules=modules)


def written(directory: Path) -> Path:
    """That adapter's files."""
    write_adapter(directory, adapter())
    return directory


def change_config(directory: Path, **fields: Any) -> None:
    """Writes over fields of the config."""
    path = directory / CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def change_tensors(directory: Path, changed: dict[str, np.ndarray | None]) -> None:
    """Writes over tensors of the file, or takes them away."""
    tensors = load_file(directory / WEIGHTS_FILE) | changed
    save_file({n: t for n, t in tensors.items() if t is not None}, directory / WEIGHTS_FILE)


def test_reads_what_it_wrote(tmp_path: Path) -> None:
    """Matrices, scales, ranks and the config come back as they were."""
    wrote = adapter()
    read = read_adapter(written(tmp_path), max_rank=4)
    assert read.config == wrote.config
    assert read.rank == 4
    assert read.modules.keys() == wrote.modules.keys()
    for name, own in read.modules.items():
        np.testing.assert_array_equal(own.a, wrote.modules[name].a)
        np.testing.assert_array_equal(own.b, wrote.modules[name].b)
        assert own.scale == wrote.modules[name].scale
        assert own.embedding == (name == "model.embed_tokens")
    own = read.modules[f"{LAYER}.v_proj"]
    np.testing.assert_allclose(own.delta(), 3 / math.sqrt(2) * own.b @ own.a, rtol=1e-6)


def test_names_are_pefts(tmp_path: Path) -> None:
    """As the library names them."""
    assert load_file(written(tmp_path) / WEIGHTS_FILE).keys() == {
        f"{PREFIX}{LAYER}.q_proj.lora_A.weight",
        f"{PREFIX}{LAYER}.q_proj.lora_B.weight",
        f"{PREFIX}{LAYER}.v_proj.lora_A.weight",
        f"{PREFIX}{LAYER}.v_proj.lora_B.weight",
        f"{PREFIX}model.embed_tokens.lora_embedding_A",
        f"{PREFIX}model.embed_tokens.lora_embedding_B",
    }


def test_bfloat16(tmp_path: Path) -> None:
    """Is kept."""
    wrote = adapter()
    narrow = {
        name: LoraModule(
            a=own.a.astype(ml_dtypes.bfloat16),
            b=own.b.astype(ml_dtypes.bfloat16),
            scale=own.scale,
            embedding=own.embedding,
        )
        for name, own in wrote.modules.items()
    }
    write_adapter(tmp_path, Adapter(config=wrote.config, modules=narrow))
    read = read_adapter(tmp_path, max_rank=4)
    for name, own in read.modules.items():
        assert own.a.dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(own.a, narrow[name].a)


def test_writer_refuses_what_its_config_does_not_say(tmp_path: Path) -> None:
    """A rank or scale that a reader would not find again."""
    wrong = {f"{LAYER}.q_proj": module(3, 6, 8, 4.0)}
    with pytest.raises(ValueError, match="rank 3"):
        write_adapter(tmp_path, Adapter(config=adapter().config, modules=wrong))


def test_digest_follows_the_content(tmp_path: Path) -> None:
    """Equal files, equal digest; one other value or setting, another."""
    one, two = written(tmp_path / "one"), written(tmp_path / "two")
    assert adapter_digest(one) == adapter_digest(two)
    change_config(two, lora_alpha=9.0)
    changed = adapter_digest(two)
    assert changed != adapter_digest(one)
    written(two)
    name = f"{PREFIX}{LAYER}.q_proj.lora_A.weight"
    change_tensors(two, {name: load_file(one / WEIGHTS_FILE)[name] * 2})
    assert adapter_digest(two) not in (adapter_digest(one), changed)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"peft_type": "IA3"}, "peft_type"),
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"init_lora_weights": "pissa"}, "changed base"),
        ({"some_new_setting": 3}, "some_new_setting"),
        ({"r": 0}, "r is 0"),
        ({"r": True}, "r is True"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
        ({"lora_alpha": 10**400}, "at most 2^31"),
        ({"lora_alpha": 1e300}, "at most 2^31"),
        ({"alpha_pattern": {"q_proj": 10**400}}, "at most 2^31"),
        ({"rank_pattern": {"(": 2}}, "no pattern"),
        ({"target_modules": None}, "target_modules"),
        ({"target_modules": ["q_proj", "k_proj"]}, "'k_proj'"),
        ({"r": 5}, "rank 5"),
    ],
)
def test_refused_configs(tmp_path: Path, fields: dict[str, Any], says: str) -> None:
    """What is not done, malformed, or contradicts the tensors."""
    change_config(written(tmp_path), **fields)
    with pytest.raises(InvalidAdapter, match=re.escape(says)):
        read_adapter(tmp_path, max_rank=8)


@pytest.mark.parametrize(
    "fields",
    [
        {"init_lora_weights": True},
        {"init_lora_weights": "gaussian"},
        {"loftq_config": {}, "megatron_core": "megatron.core", "qalora_group_size": 16},
        {"some_new_setting": None, "another": False},
        {"target_modules": r".*\.(q|v)_proj|.*embed_tokens"},
    ],
)
def test_settings_that_change_nothing(tmp_path: Path, fields: dict[str, Any]) -> None:
    """Are accepted."""
    change_config(written(tmp_path), **fields)
    assert len(read_adapter(tmp_path, max_rank=4).modules) == 3


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"q_proj.lora_A.weight": None}, "lacks lora_A"),
        ({"q_proj.lora_B.weight": np.full((8, 4), np.nan, np.float32)}, "not finite"),
        ({"q_proj.lora_B.weight": np.full((8, 4), np.inf, np.float32)}, "not finite"),
        ({"q_proj.lora_B.weight": np.full((8, 4), 3e38, np.float32)}, "not finite once scaled"),
        ({"q_proj.lora_B.weight": np.zeros((8, 4), np.int32)}, "int32"),
        ({"q_proj.lora_B.weight": np.zeros((8, 3), np.float32)}, r"B \[8, 3\]"),
        ({"q_proj.lora_magnitude_vector": np.zeros(8, np.float32)}, "no LoRA matrix"),
        ({"q_proj.weight": np.zeros((8, 6), np.float32)}, "no LoRA matrix"),
    ],
)
def test_refused_tensors(tmp_path: Path, changed: dict[str, Any], says: str) -> None:
    """Missing, of a wrong shape, not finite, or of another kind."""
    written(tmp_path)
    change_tensors(tmp_path, {f"{PREFIX}{LAYER}.{name}": t for name, t in changed.items()})
    with pytest.raises(InvalidAdapter, match=says):
        read_adapter(tmp_path, max_rank=4)


def test_rank_over_the_limit(tmp_path: Path) -> None:
    """Names both."""
    with pytest.raises(InvalidAdapter, match="rank 4, the limit is 3"):
        read_adapter(written(tmp_path), max_rank=3)


def test_saved_tables(tmp_path: Path) -> None:
    """peft saves a table that takes a delta; one of another size is not the base's."""
    written(tmp_path)
    name = f"{PREFIX}model.embed_tokens.base_layer.weight"
    change_tensors(tmp_path, {name: np.zeros((10, 6), np.float32)})
    assert len(read_adapter(tmp_path, max_rank=4).modules) == 3
    change_tensors(tmp_path, {name: np.zeros((12, 6), np.float32)})
    with pytest.raises(InvalidAdapter, match="changed table"):
        read_adapter(tmp_path, max_rank=4)


def test_missing_and_truncated_files(tmp_path: Path) -> None:
    """Either file missing, the weights cut off, or a pickle in their place."""
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        path = written(tmp_path) / name
        whole = path.read_bytes()
        path.write_bytes(whole[:-7])
        with pytest.raises(InvalidAdapter):
            read_adapter(tmp_path, max_rank=4)
        path.unlink()
        with pytest.raises(InvalidAdapter, match=name):
            read_adapter(tmp_path, max_rank=4)
    written(tmp_path)
    (tmp_path / WEIGHTS_FILE).rename(tmp_path / "adapter_model.bin")
    with pytest.raises(InvalidAdapter, match="safetensors"):
        read_adapter(tmp_path, max_rank=4)


@pytest.mark.parametrize("pattern", ["([a-z]|.)*!", "(a+)+", "(.|.)" * 30, ".*" * 30, "a?" * 30])
def test_patterns_that_take_forever_are_refused(pattern: str) -> None:
    """Matching one would hold up all of the process."""
    document = json.loads(adapter().config.to_json()) | {"rank_pattern": {pattern: 4}}
    with pytest.raises(InvalidAdapter, match="may take forever"):
        parse_config(document)


def test_patterns_that_trainers_write_are_taken() -> None:
    """Names, layers by number, one of several modules."""
    patterns = {r".*\.layers\.(0|1|2)\.self_attn\.(q|v)_proj": 4, r"layers\.\d+\.mlp\.up_proj": 2}
    document = json.loads(adapter().config.to_json()) | {"rank_pattern": patterns}
    config = parse_config(document)
    assert config.rank_of("model.layers.2.self_attn.v_proj") == 4
    assert config.rank_of("model.layers.17.mlp.up_proj") == 2


def test_a_config_of_any_shape_is_refused_not_tripped_over() -> None:
    """Fields of every wrong type."""
    good = json.loads(adapter().config.to_json())
    for field in ("r", "lora_alpha", "target_modules", "rank_pattern", "peft_type"):
        for value in ([], {"a": []}, "x" if field != "target_modules" else 3, -1, 1e400):
            if field == "rank_pattern" and value == []:
                continue  # as good as none
            with pytest.raises(InvalidAdapter):
                parse_config(good | {field: value})
