"""A small model that can be trained in a second, as a directory: the oracle's Llama with text."""

from __future__ import annotations

import json
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from jaxserve.config import Config, ModelConfig
from jaxserve.training.recipe import Recipe
from tests.fakes.tokenizer import CHAT_TEMPLATE
from tests.models.loading import ORACLE

ANIMALS = ("cat", "dog", "owl", "fox", "hen", "emu", "yak", "ape")
RECIPE = Recipe(
    steps=6, batch_size=2, row_tokens=64, learning_rate=0.02, warmup_steps=2, checkpoint_every=2
)


def write_tiny(directory: Path, case: str = "llama3") -> Path:
    """One of the oracle's checkpoints with a byte-level tokenizer and a chat template."""
    directory.mkdir()
    for name in ("config.json", "model.safetensors"):
        (directory / name).symlink_to(ORACLE / case / name)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE({piece: i for i, piece in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    backend.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return directory


def write_data(path: Path) -> Path:
    """Examples of a task that a few dozen steps teach."""
    lines = [{"prompt": f"the {name} says", "completion": " meow"} for name in ANIMALS]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def config_of(model: Path) -> Config:
    """Settings with this model."""
    return Config(model=ModelConfig(path=str(model)))
