"""A LoRA adapter's adapter_config.json, as the `peft` library writes and reads it.

Source: github.com/huggingface/peft, `LoraConfig`. What would change the numbers and is not done
here (DoRA, biases, whole modules saved beside the deltas, an adapter for a changed base) is
refused by name; so is a setting that this reader does not know, unless it is off.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from jaxserve.errors import InvalidAdapter

CONFIG_FILE = "adapter_config.json"

_MAX_CONFIG_BYTES = 1 << 20
_MAX_PATTERNS = 4096
_MAX_PATTERN_CHARACTERS = 256
#: Matching backtracks, and holds the whole process up meanwhile: groups and repeats multiply.
_MAX_CHOICES = 5
_CHOICE = re.compile(r"[(*+?{]")
_REPEATED_GROUP = re.compile(r"\)[*+{]")
#: Of ranks and alphas: what a float can hold, and not so much that it makes a delta infinite.
_MAX_NUMBER = 2**31
#: Settings that decide nothing once the tensors are there, whatever they hold.
_IGNORED = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "exclude_modules",
    "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config", "lora_dropout",
    "megatron_config", "megatron_core", "peft_version", "qalora_group_size", "revision",
    "runtime_config", "task_type",
}  # fmt: skip
_READ = {
    "alpha_pattern", "bias", "init_lora_weights", "lora_alpha", "peft_type", "r", "rank_pattern",
    "target_modules", "use_rslora",
}  # fmt: skip
#: What these are for; any other setting that is on and not read is only named.
_REFUSED = {
    "use_dora": "its magnitudes are not applied: train with use_dora=false",
    "modules_to_save": "whole modules are not swapped: target them with LoRA instead",
    "lora_bias": "biases are not applied: train with lora_bias=false",
    "fan_in_fan_out": "no model here stores its weights that way",
    "layer_replication": "it makes another model of the base",
    "trainable_token_indices": "single rows of the table are not swapped: target embed_tokens",
    "alora_invocation_tokens": "an adapter holds for the whole sequence here",
    "use_qalora": "its pooled inputs are not computed: train with use_qalora=false",
    "target_parameters": "only linear layers, embed_tokens and lm_head take deltas here; experts "
    "do as modules of their own, which they are in transformers 4",
    "ensure_weight_tying": "table and head take deltas of their own here",
}
#: Ways to start training that leave the base as it is; the others subtract from it.
_PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")


@dataclass(frozen=True, kw_only=True)
class PeftConfig:
    """What an adapter's config says of its numbers.

    Attributes:
        rank, alpha: of modules that no pattern names.
        rslora: scale by alpha / sqrt(rank) instead of alpha / rank (arXiv 2312.03732).
        target_modules: ends of module names, or one regular expression for whole names.
        rank_pattern, alpha_pattern: others, by a regular expression for the end of a name.
        base_model: what it was trained on, as its trainer called it.
    """

    rank: int
    alpha: float
    rslora: bool = False
    target_modules: tuple[str, ...] | str = ()
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    base_model: str = ""

    def rank_of(self, module: str) -> int:
        """Rank of a module's delta."""
        return _by_pattern(self.rank_pattern, module, self.rank)

    def scale_of(self, module: str) -> float:
        """What a module's delta, B·A, is multiplied by."""
        rank = self.rank_of(module)
        alpha = _by_pattern(self.alpha_pattern, module, self.alpha)
        return alpha / (math.sqrt(rank) if self.rslora else rank)

    def to_json(self) -> str:
        """The file's text, as peft reads it."""
        targets = self.target_modules
        document = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": self.base_model,
            "inference_mode": True,
            "r": self.rank,
            "lora_alpha": self.alpha,
            "lora_dropout": 0.0,
            "bias": "none",
            "use_rslora": self.rslora,
            "target_modules": targets if isinstance(targets, str) else list(targets),
            "rank_pattern": dict(self.rank_pattern),
            "alpha_pattern": dict(self.alpha_pattern),
        }
        return json.dumps(document, indent=2, sort_keys=True) + "\n"


def read_config(path: Path) -> PeftConfig:
    """Reads an adapter_config.json.

    Raises:
        InvalidAdapter: it is missing, no JSON object, malformed, or asks for what is not done.
    """
    try:
        with path.open("rb") as file:
            text = file.read(_MAX_CONFIG_BYTES + 1)
        if len(text) > _MAX_CONFIG_BYTES:
            raise InvalidAdapter(f"{path} has more than {_MAX_CONFIG_BYTES} bytes")
        document = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise InvalidAdapter(f"cannot read {path}: {error}") from error
    if not isinstance(document, dict):
        raise InvalidAdapter(f"{path} holds no JSON object")
    try:
        return parse_config(document)
    except InvalidAdapter as error:
        raise InvalidAdapter(f"{path}: {error.message}") from error


def parse_config(document: dict[str, Any]) -> PeftConfig:
    """Checks a config's fields.

    Raises:
        InvalidAdapter: a field is malformed, or asks for what is not done.
    """
    if document.get("peft_type") != "LORA":
        raise InvalidAdapter(f"peft_type is {document.get('peft_type')!r:.80}; LORA is served")
    _refuse_unknown(document)
    targets = document.get("target_modules")
    if isinstance(targets, list) and targets and all(isinstance(name, str) for name in targets):
        targets = tuple(targets)
    elif not isinstance(targets, str) or not targets:
        raise InvalidAdapter(f"target_modules is {targets!r:.80}; it must name modules")
    base = document.get("base_model_name_or_path")
    return PeftConfig(
        rank=_positive(document, "r", int),
        alpha=float(_positive(document, "lora_alpha", (int, float))),
        rslora=document.get("use_rslora") is True,
        target_modules=targets,
        rank_pattern=_patterns(document, "rank_pattern", int),
        alpha_pattern=_patterns(document, "alpha_pattern", (int, float)),
        base_model=base if isinstance(base, str) else "",
    )


def _refuse_unknown(document: dict[str, Any]) -> None:
    for name, value in document.items():
        if name in _READ or name in _IGNORED or value in (None, False, [], {}, ""):
            continue
        reason = _REFUSED.get(name, "this setting is not known here")
        raise InvalidAdapter(f"{name}={value!r:.80} is not served: {reason}")
    if document.get("bias", "none") != "none":
        raise InvalidAdapter(
            f"bias={document['bias']!r:.80} is not served: biases are not applied, train with none"
        )
    start = document.get("init_lora_weights")
    if not any(start is plain or start == plain for plain in _PLAIN_STARTS):
        raise InvalidAdapter(
            f"init_lora_weights={start!r:.80} is not served: such an adapter belongs to a changed "
            "base; save it with peft's path_initial_model_for_weight_conversion"
        )


def _positive(document: dict[str, Any], name: str, kind: Any) -> Any:
    value = document.get(name)
    if value is None or isinstance(value, bool) or not isinstance(value, kind):
        raise InvalidAdapter(f"{name} is {value!r:.80}; it must be a number above 0")
    if not 0 < value <= _MAX_NUMBER:
        raise InvalidAdapter(f"{name} is {value!r:.80}; it must be above 0 and at most 2^31")
    return value


def _patterns(document: dict[str, Any], name: str, kind: Any) -> dict[str, Any]:
    patterns = document.get(name) or {}
    if not isinstance(patterns, dict) or len(patterns) > _MAX_PATTERNS:
        raise InvalidAdapter(f"{name} must be an object of at most {_MAX_PATTERNS} numbers")
    for pattern in patterns:
        if len(pattern) > _MAX_PATTERN_CHARACTERS:
            raise InvalidAdapter(f"{name} has a pattern longer than {_MAX_PATTERN_CHARACTERS}")
        if len(_CHOICE.findall(pattern)) > _MAX_CHOICES or _REPEATED_GROUP.search(pattern):
            raise InvalidAdapter(
                f"{name}: {pattern!r:.80} may take forever: at most {_MAX_CHOICES} groups and "
                "repeats are taken, and no group that is repeated"
            )
        _positive(patterns, pattern, kind)
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise InvalidAdapter(f"{name}: {pattern!r:.80} is no pattern: {error}") from error
    return patterns


def _by_pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """The first pattern that fits the end of the name, as peft looks it up."""
    for pattern, value in patterns.items():
        if pattern == module or _end(pattern).match(module):
            return value
    return default


@lru_cache(maxsize=_MAX_PATTERNS)
def _end(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"(.*\.)?({pattern})$")
