"""What sentence-transformers writes beside a model: pooling, normalisation, length, prompts.

Read by the engine (pooling, length) and by the front end (prompts). A directory without these files
says nothing of all that.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxserve.errors import UnsupportedModel, WeightsError
from jaxserve.types import POOLINGS

#: Keys of older files, each true or false, for our words.
_MODES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_lasttoken": "last",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len",
}
_WORDS = {"lasttoken": "last", "mean_tokens": "mean", "cls_token": "cls"}


@dataclass(frozen=True, kw_only=True)
class SentenceFiles:
    """What the files say; None where they do not.

    Attributes:
        pooling: one of POOLINGS.
        normalize: whether vectors have length one.
        max_length: tokens of a text.
        lower_case: whether texts are lowercased before anything else is done to them.
        prompts: text to put before another, by name; default_prompt: the name of the one that is
            used where none is named.
    """

    pooling: str | None = None
    normalize: bool | None = None
    max_length: int | None = None
    lower_case: bool = False
    prompts: dict[str, str] = field(default_factory=dict)
    default_prompt: str = ""


def read_sentence_files(directory: Path) -> SentenceFiles:
    """Reads them.

    Raises:
        WeightsError: a file is broken.
        UnsupportedModel: the model has a part that is not implemented.
    """
    if not directory.is_dir():
        return SentenceFiles()
    pooling = normalize = None
    modules = _read(directory / "modules.json")
    if modules is not None:
        if not isinstance(modules, list):
            raise WeightsError(f"{directory / 'modules.json'} must hold a list")
        normalize = False
        for module in modules:
            kind = str(module.get("type", "")).rpartition(".")[2]
            if kind == "Pooling":
                pooling = _pooling(directory / str(module.get("path", "")) / "config.json")
            elif kind == "Normalize":
                normalize = True
            elif kind != "Transformer":
                raise UnsupportedModel(
                    f"{directory / 'modules.json'}: the module {kind} is not supported; "
                    "Transformer, Pooling and Normalize are"
                )
    lengths = _read(directory / "sentence_bert_config.json") or {}
    config = _read(directory / "config_sentence_transformers.json") or {}
    prompts = config.get("prompts") or {}
    tokenizer = _read(directory / "tokenizer_config.json") or {}
    max_length = lengths.get("max_seq_length") or tokenizer.get("model_max_length")
    return SentenceFiles(
        pooling=pooling,
        normalize=normalize,
        max_length=max_length if isinstance(max_length, int) and max_length > 0 else None,
        lower_case=lengths.get("do_lower_case") is True,
        prompts={str(name): str(text) for name, text in prompts.items() if text},
        default_prompt=config.get("default_prompt_name") or "",
    )


def _pooling(file: Path) -> str:
    config = _read(file)
    if not isinstance(config, dict):
        raise WeightsError(f"{file} must hold a JSON object")
    found = [word for key, word in _MODES.items() if config.get(key)]
    mode = config.get("pooling_mode")
    if isinstance(mode, str):
        found = [_WORDS.get(mode, mode)]
    if len(found) != 1 or found[0] not in POOLINGS:
        raise UnsupportedModel(
            f"{file}: pooling {' and '.join(found) or 'of no kind'} is not supported; one of "
            f"{', '.join(POOLINGS)} is"
        )
    if config.get("include_prompt") is False:
        raise UnsupportedModel(f"{file}: pooling without the prompt's tokens is not supported")
    return found[0]


def _read(file: Path) -> Any:
    if not file.is_file():
        return None
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError(f"cannot read {file}: {error}") from error
