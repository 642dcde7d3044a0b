"""A model's tokenizer and chat template as Hugging Face's files, beside converted weights.

Invariant: `load_tokenizer` and `load_chat_template` find in the target, without overrides, what
they find in the source with them.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from jaxserve.text.fast import FastTokenizer
from jaxserve.text.gguf import load_gguf
from jaxserve.text.pieces import PieceTokenizer
from jaxserve.text.sentence_piece import SentencePieceTokenizer
from jaxserve.text.template import load_chat_template
from jaxserve.text.template_files import find_template, read_json
from jaxserve.text.tokenizer import load_tokenizer

_TOKENIZERS = ("tokenizer.json", "*.model")
#: What else belongs to a directory's tokenizer; templates in further files are written anew.
_BESIDE = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "chat_template.json",
    "chat_template.jinja",
)


def save_text(source: Path, target: Path, *, tokenizer: str = "", chat_template: str = "") -> None:
    """Copies a directory's files, or writes what a .gguf file carries.

    Args:
        source: the model, a directory or .gguf file; target: a directory.
        tokenizer, chat_template: paths used instead of the model's own, as the configuration has
            them.

    Raises:
        WeightsError: something cannot be read.
    """
    if tokenizer:
        load_tokenizer(source, tokenizer)  # refuses what is none
    _save_tokenizer(Path(tokenizer).expanduser() if tokenizer else source, target)
    _save_templates(source, target, chat_template)


def _save_tokenizer(origin: Path, target: Path) -> None:
    if origin.is_file() and origin.suffix != ".gguf":
        shutil.copyfile(origin, target / f"tokenizer{origin.suffix}")
        _copy(origin.parent, target, _BESIDE)
        return
    own = [file for pattern in _TOKENIZERS for file in origin.glob(pattern)]
    ggufs = [origin] if origin.is_file() else sorted(origin.glob("*.gguf"))
    if ggufs and not own:
        _write(load_gguf(ggufs[0]), find_template(ggufs[0]).special_tokens, target)
    else:
        _copy(origin, target, (*_TOKENIZERS, *_BESIDE))


def _copy(directory: Path, target: Path, patterns: tuple[str, ...]) -> None:
    for pattern in patterns:
        for file in filter(Path.is_file, directory.glob(pattern)):
            shutil.copyfile(file, target / file.name)


def _write(tokenizer: PieceTokenizer, special_tokens: dict[str, str], target: Path) -> None:
    if isinstance(tokenizer, FastTokenizer):
        tokenizer.save(target / "tokenizer.json")
    elif isinstance(tokenizer, SentencePieceTokenizer):
        (target / "tokenizer.model").write_bytes(tokenizer.model)
    config: dict[str, Any] = dict(special_tokens)
    empty = tokenizer.encode("")
    config["add_bos_token"] = _is_token(tokenizer, empty[:1], config.get("bos_token"))
    config["add_eos_token"] = _is_token(tokenizer, empty[-1:], config.get("eos_token"))
    _write_text(target / "tokenizer_config.json", json.dumps(config, indent=1, ensure_ascii=False))
    ends = {"eos_token_id": list(tokenizer.eos_token_ids)}
    _write_text(target / "generation_config.json", json.dumps(ends))


def _is_token(tokenizer: PieceTokenizer, ids: list[int], text: str | None) -> bool:
    return bool(ids) and tokenizer.token_text(ids[0]) == text


def _save_templates(source: Path, target: Path, chat_template: str) -> None:
    """Writes what the target's files do not say already."""
    found, written = find_template(source), find_template(target)
    override = load_chat_template(source, chat_template) if chat_template else None
    text = found.source if override is None else override.source
    if text != written.source:
        _write_text(target / "chat_template.jinja", text)
    if override is None and found.tools_source != written.tools_source:
        file = target / "additional_chat_templates" / "tool_use.jinja"
        file.parent.mkdir(exist_ok=True)
        _write_text(file, found.tools_source)
    if found.special_tokens.keys() - written.special_tokens.keys():
        file = target / "special_tokens_map.json"
        _write_text(file, json.dumps(found.special_tokens | read_json(file), ensure_ascii=False))


def _write_text(file: Path, text: str) -> None:
    file.write_text(text, encoding="utf-8")
