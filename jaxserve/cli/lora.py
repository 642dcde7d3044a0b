"""`jaxserve lora train`: its arguments, and a run from them."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxserve.bars import StartupBars
from jaxserve.training.recipe import TARGETS, Recipe, option

if TYPE_CHECKING:
    from jaxserve.config import Config

DTYPES = ("float32", "bfloat16", "float16")

_ABOUT = {
    "rank": "of every delta",
    "alpha": "deltas are scaled by alpha / rank",
    "dropout": "share of a delta's inputs that is zeroed in training",
    "steps": "updates",
    "batch_size": "rows of one forward pass",
    "row_tokens": "length of a row, which short examples share; a multiple of 64",
    "accumulate": "forward passes of one update",
    "learning_rate": "at its peak",
    "warmup_steps": "in which the rate rises; fewer where --steps is",
    "weight_decay": "AdamW's",
    "max_gradient_norm": "longer gradients are cut to it",
    "eval_share": "share of the examples that is held out to evaluate on",
    "eval_every": "steps between evaluations; 0: at the end only",
    "checkpoint_every": "steps between checkpoints; 0: at the end only",
    "seed": "of everything that is drawn",
}


def add_train(command: argparse.ArgumentParser) -> None:
    """The arguments of `lora train`, less those that all commands take."""
    command.add_argument(
        "--data",
        type=Path,
        required=True,
        metavar="FILE",
        help='JSON lines, each with "messages", "prompt" and "completion", or "text"',
    )
    command.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="DIR",
        help="directory for the adapter (peft's files), loss.svg and checkpoints",
    )
    command.add_argument(
        "--eval-data", type=Path, metavar="FILE", help="examples to evaluate on, like --data"
    )
    command.add_argument(
        "--resume", action="store_true", help="go on from the last checkpoint in --output, if any"
    )
    command.add_argument(
        "--dtype",
        default="float32",
        choices=DTYPES,
        help="of the written adapter (default: float32)",
    )
    recipe = command.add_argument_group("how it is trained")
    default = Recipe()
    recipe.add_argument(
        "--targets",
        default=",".join(default.targets),
        metavar="NAME,…",
        help=f"linear layers: of {', '.join(TARGETS)}; or all "
        f"(default: {','.join(default.targets)})",
    )
    recipe.add_argument(
        "--rslora", action="store_true", help="scale by alpha / sqrt(rank) (arXiv 2312.03732)"
    )
    for name, about in _ABOUT.items():
        value = getattr(default, name)
        recipe.add_argument(
            option(name),
            type=type(value),
            default=None if name == "warmup_steps" else value,
            metavar="N" if isinstance(value, int) else "X",
            help=f"{about} (default: {value:g})",
        )


def train_adapter(config: Config, arguments: argparse.Namespace) -> int:
    """Trains an adapter and writes it; returns the exit status.

    Raises:
        ConfigError, InvalidRequest, WeightsError: see `training`.
    """
    import jax.numpy as jnp

    from jaxserve.training.run import Output, train
    from jaxserve.training.task import load_task

    targets = arguments.targets
    given: dict[str, Any] = {name: getattr(arguments, name) for name in _ABOUT}
    if given["warmup_steps"] is None:
        given["warmup_steps"] = min(Recipe.warmup_steps, arguments.steps - 1)
    recipe = Recipe(
        **given,
        rslora=arguments.rslora,
        targets=TARGETS if targets == "all" else tuple(filter(None, targets.split(","))),
    )
    dtype = jnp.dtype(arguments.dtype)
    output = Output(directory=arguments.output, resume=arguments.resume, dtype=dtype)
    with StartupBars(shown=None) as bars:
        task = load_task(config, recipe, arguments.data, arguments.eval_data, bars.show)
    train(task, recipe, output)
    sys.stdout.write(f"{arguments.output}\n")
    return 0
