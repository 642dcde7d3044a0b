"""What a run is made from: the served model, as training needs it, and its examples.

Errors of the command's user come first and cheap: examples are read and checked against the
model's config before any weight is loaded.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from jaxserve.config import Config
from jaxserve.engine.machine import devices
from jaxserve.errors import ConfigError
from jaxserve.models.decoder import Decoder
from jaxserve.models.options import ModelOptions
from jaxserve.models.registry import model_class
from jaxserve.text.template import load_chat_template
from jaxserve.text.tokenizer import load_tokenizer
from jaxserve.training.examples import Example, Reader
from jaxserve.training.packing import hold_out
from jaxserve.training.recipe import Recipe
from jaxserve.weights.checkpoint import open_checkpoint
from jaxserve.weights.load import load_model
from jaxserve.weights.sources import resolve, served_name

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class Task:
    """A model and what it shall learn.

    Attributes:
        model: dense, on one device.
        base_model: its name.
        examples: to train on.
        held_out: to evaluate on; may be empty.
    """

    model: Decoder
    base_model: str
    examples: list[Example]
    held_out: list[Example]

    def digest(self) -> str:
        """Hash of all examples' tokens: the same data through the same tokenizer and template."""
        digest = hashlib.sha256()
        for part in (self.examples, self.held_out):
            digest.update(b"%d " % len(part))
            for example in part:
                digest.update(b"%d " % len(example.token_ids))
                digest.update(example.token_ids.tobytes())
                digest.update(example.is_learned.tobytes())
        return digest.hexdigest()[:32]


def load_task(
    config: Config,
    recipe: Recipe,
    data: Path,
    eval_data: Path | None = None,
    progress: Progress = lambda phase, done, total: None,
) -> Task:
    """Reads examples, then loads the model.

    Args:
        eval_data: examples to evaluate on, instead of the recipe's share of data.

    Raises:
        ConfigError: a setting or option that does not fit training or this model; no such file.
        InvalidRequest: lines that cannot be learned from, by number.
        WeightsError: the model cannot be loaded.
    """
    if eval_data is not None and recipe.eval_share:
        raise ConfigError("--eval-data and --eval-share exclude each other: give one of them")
    options = train_options(config, devices()[0].platform)
    source = resolve(config.model, config.weights, progress)
    checkpoint = open_checkpoint(source, config.model.format)
    spec = model_class(checkpoint.config).spec_from_hf(checkpoint.config)
    if recipe.row_tokens > spec.max_context:
        raise ConfigError(
            f"--row-tokens is {recipe.row_tokens}, but the model was made for {spec.max_context} "
            "positions"
        )
    tokenizer = load_tokenizer(source, config.model.tokenizer)
    reader = Reader(
        tokenizer=tokenizer,
        template=load_chat_template(source, config.model.chat_template),
        eos_token_ids=tokenizer.eos_token_ids or spec.eos_token_ids,
        max_tokens=recipe.row_tokens,
        vocab_size=spec.vocab_size,
    )
    examples, held_out = _examples(reader, recipe, data, eval_data)
    model = load_model(source, format=config.model.format, options=options, progress=progress)
    return Task(
        model=model,
        base_model=served_name(config.model),
        examples=examples,
        held_out=held_out,
    )


def _examples(
    reader: Reader, recipe: Recipe, data: Path, eval_data: Path | None
) -> tuple[list[Example], list[Example]]:
    examples = reader.read(data)
    if eval_data is not None:
        return examples, reader.read(eval_data)
    if recipe.eval_share and len(examples) < 2:
        raise ConfigError(f"{data} holds one example, of which none can be held out")
    return hold_out(examples, recipe.eval_share, recipe.seed)


def train_options(config: Config, platform: str) -> ModelOptions:
    """The served model's options as far as training has them: dense weights, plain XLA.

    Raises:
        ConfigError: others were asked for.
    """
    reasons = {
        "weights.quantization": (config.weights.quantization, "none", "codes have no gradient"),
        "kernels.matmul": (config.kernels.matmul, "xla", "its products have no gradient"),
        "kernels.attention": (config.kernels.attention, "xla", "whole rows are not paged"),
        "parallel.model": (config.parallel.model, 1, "training runs on one device"),
        "parallel.data": (config.parallel.data, 1, "training runs on one device"),
        "parallel.hosts": (config.parallel.hosts, 1, "training runs on one device"),
    }
    for name, (value, wanted, reason) in reasons.items():
        if value not in (wanted, "auto", 0):
            raise ConfigError(f"lora train takes no {name}={value}: {reason}; leave it out")
    dtype = config.weights.dtype
    if dtype == "auto":
        dtype = "float32" if platform == "cpu" else "bfloat16"
    if dtype == "float16":
        raise ConfigError(
            "lora train takes no weights.dtype=float16: gradients leave its range; use bfloat16"
        )
    layers = "scanned" if config.kernels.layers == "auto" else config.kernels.layers
    return ModelOptions(dtype=dtype, layers=layers)
