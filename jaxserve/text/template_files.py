"""Where a model keeps its chat template, and the texts of its special tokens.

In a directory: chat_template.jinja, or `chat_template` (a string, or a list of named ones) in
chat_template.json or tokenizer_config.json; in a GGUF file: `tokenizer.chat_template`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxserve.errors import WeightsError

#: Names by which templates know special tokens.
TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token")


@dataclass(frozen=True, kw_only=True)
class FoundTemplate:
    """Jinja source (empty if there is none), another for tools, and texts of special tokens."""

    source: str = ""
    tools_source: str = ""
    special_tokens: dict[str, str] = field(default_factory=dict)


def find_template(path: Path) -> FoundTemplate:
    """Looks through a model's directory or .gguf file.

    Raises:
        WeightsError: a file cannot be read.
    """
    if path.suffix == ".gguf" and path.is_file():
        return _from_gguf(path)
    if not path.is_dir():
        return FoundTemplate()
    config = read_json(path / "tokenizer_config.json")
    tokens = read_json(path / "special_tokens_map.json") | config
    special_tokens = {name: token_text(tokens[name]) for name in TOKEN_NAMES if tokens.get(name)}
    sources = _named(config.get("chat_template"))
    sources |= _named(read_json(path / "chat_template.json").get("chat_template"))
    file = path / "chat_template.jinja"
    if file.is_file():
        sources["default"] = _read(file)
    for extra in sorted(path.glob("additional_chat_templates/*.jinja")):
        sources[extra.stem] = _read(extra)
    if not sources and not config:
        ggufs = sorted(path.glob("*.gguf"))
        if ggufs:
            return _from_gguf(ggufs[0])
    return FoundTemplate(
        source=sources.get("default", ""),
        tools_source=sources.get("tool_use", ""),
        special_tokens=special_tokens,
    )


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object; empty if the file is not there.

    Raises:
        WeightsError: it is not a JSON object.
    """
    if not file.is_file():
        return {}
    try:
        document = json.loads(_read(file))
    except ValueError as error:
        raise WeightsError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(document, dict):
        raise WeightsError(f"{file} must hold a JSON object, not {type(document).__name__}")
    return document


def token_text(token: Any) -> str:
    """A special token's text: configurations write it plainly or as {"content": …}."""
    return str(token.get("content", "")) if isinstance(token, dict) else str(token)


def _from_gguf(path: Path) -> FoundTemplate:
    from jaxserve.formats.gguf_header import read_gguf_header

    metadata = read_gguf_header(path).metadata
    tokens = metadata.get("tokenizer.ggml.tokens", [])
    names = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
    special_tokens = {}
    for key, name in names.items():
        token_id = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if isinstance(token_id, int) and 0 <= token_id < len(tokens):
            special_tokens[name] = tokens[token_id]
    return FoundTemplate(
        source=str(metadata.get("tokenizer.chat_template", "")),
        tools_source=str(metadata.get("tokenizer.chat_template.tool_use", "")),
        special_tokens=special_tokens,
    )


def _named(value: Any) -> dict[str, str]:
    if isinstance(value, str):
        return {"default": value}
    if isinstance(value, list):
        return {str(item["name"]): str(item["template"]) for item in value}
    return {}


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise WeightsError(f"cannot read {file}: {error}") from error
