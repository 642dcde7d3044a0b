"""A model's tokenizer and chat template as Hugging Face's files, beside converted weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from jaxserve.text.fast import FastTokenizer
from jaxserve.text.pieces import PieceTokenizer
from jaxserve.text.sentence_piece import SentencePieceTokenizer
from jaxserve.text.template_files import find_template

#: What a directory's tokenizer and template may consist of.
FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "chat_template.json",
    "chat_template.jinja",
)


def save_text(source: Path, target: Path) -> None:
    """Copies from a directory, or writes what a .gguf file carries. Existing files are kept.

    Args:
        source: the model, as `load_tokenizer` takes it; target: an existing directory.

    Raises:
        WeightsError: the source's tokenizer cannot be read.
    """
    if source.is_dir() and not list(source.glob("*.gguf")):
        for name in FILES:
            if (source / name).is_file() and not (target / name).exists():
                shutil.copyfile(source / name, target / name)
        return
    from jaxserve.text.gguf import load_gguf

    file = source if source.is_file() else sorted(source.glob("*.gguf"))[0]
    _write(load_gguf(file), file, target)


def _write(tokenizer: PieceTokenizer, file: Path, target: Path) -> None:
    found = find_template(file)
    config: dict[str, Any] = dict(found.special_tokens)
    if isinstance(tokenizer, FastTokenizer):
        tokenizer.save(target / "tokenizer.json")
    elif isinstance(tokenizer, SentencePieceTokenizer):
        (target / "tokenizer.model").write_bytes(tokenizer.model)
    empty = tokenizer.encode("")
    config["add_bos_token"] = _is_token(tokenizer, empty[:1], config.get("bos_token"))
    config["add_eos_token"] = _is_token(tokenizer, empty[-1:], config.get("eos_token"))
    (target / "tokenizer_config.json").write_text(json.dumps(config, indent=1, ensure_ascii=False))
    if found.source:
        (target / "chat_template.jinja").write_text(found.source, encoding="utf-8")
    if not (target / "generation_config.json").exists():
        ends = {"eos_token_id": list(tokenizer.eos_token_ids)}
        (target / "generation_config.json").write_text(json.dumps(ends))


def _is_token(tokenizer: PieceTokenizer, ids: list[int], text: str | None) -> bool:
    return bool(ids) and tokenizer.token_text(ids[0]) == text
