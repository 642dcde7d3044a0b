"""What sentence-transformers' files say, of old versions and new ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jaxserve.errors import UnsupportedModel, WeightsError
from jaxserve.formats.sentence_files import SentenceFiles, read_sentence_files

OLD = ["models.Transformer", "models.Pooling", "models.Normalize"]
NEW = ["base.modules.transformer.Transformer", "sentence_transformer.modules.pooling.Pooling"]


def write(folder: Path, modules: list[str], pooling: dict, **files) -> Path:
    paths = {"Pooling": "1_Pooling"}
    listed = [
        {"type": f"sentence_transformers.{kind}", "path": paths.get(kind.rpartition(".")[2], "")}
        for kind in modules
    ]
    (folder / "modules.json").write_text(json.dumps(listed))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def test_old_files(tmp_path):
    modes = {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}
    prompts = {"prompts": {"query": "q: ", "empty": ""}, "default_prompt_name": "query"}
    folder = write(
        tmp_path,
        OLD,
        modes,
        sentence_bert_config={"max_seq_length": 256},
        config_sentence_transformers=prompts,
    )
    assert read_sentence_files(folder) == SentenceFiles(
        pooling="mean",
        normalize=True,
        max_length=256,
        prompts={"query": "q: "},
        default_prompt="query",
    )


def test_new_files(tmp_path):
    folder = write(
        tmp_path,
        NEW,
        {"embedding_dimension": 8, "pooling_mode": "lasttoken", "include_prompt": True},
        tokenizer_config={"model_max_length": 512},
    )
    found = read_sentence_files(folder)
    assert (found.pooling, found.normalize, found.max_length) == ("last", False, 512)


def test_a_directory_without_them_says_nothing(tmp_path):
    assert read_sentence_files(tmp_path) == SentenceFiles()
    assert read_sentence_files(tmp_path / "model.gguf") == SentenceFiles()


@pytest.mark.parametrize(
    ("modules", "pooling", "message"),
    [
        ([*OLD, "models.Dense"], {"pooling_mode": "mean"}, "the module Dense is not supported"),
        (OLD, {"pooling_mode_mean_sqrt_len_tokens": True}, "pooling mean_sqrt_len"),
        (OLD, {"pooling_mode_cls_token": True, "pooling_mode_max_tokens": True}, "cls and max"),
        (OLD, {}, "of no kind"),
        (OLD, {"pooling_mode": "mean", "include_prompt": False}, "without the prompt's tokens"),
    ],
)
def test_what_is_not_implemented_is_refused(tmp_path, modules, pooling, message):
    with pytest.raises(UnsupportedModel, match=message):
        read_sentence_files(write(tmp_path, modules, pooling))


def test_broken_files(tmp_path):
    (tmp_path / "modules.json").write_text("{")
    with pytest.raises(WeightsError, match="cannot read"):
        read_sentence_files(tmp_path)
    (tmp_path / "modules.json").write_text("{}")
    with pytest.raises(WeightsError, match="must hold a list"):
        read_sentence_files(tmp_path)
