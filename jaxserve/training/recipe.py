"""How an adapter is trained: every number that decides what comes out, beside model and data.

Hashable, so that it can be a static argument of the compiled step, and plain, so that a checkpoint
holds it: a run goes on only under the recipe that it was begun with.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from jaxserve.errors import ConfigError

#: Linear layers of a decoder, in peft's names.
ATTENTION_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP_TARGETS = ("gate_proj", "up_proj", "down_proj")
TARGETS = (*ATTENTION_TARGETS, *MLP_TARGETS)
#: `row_tokens` is a multiple of it: the loss goes over a batch in chunks of as many tokens.
ROW_MULTIPLE = 64


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One training run.

    Attributes:
        rank: R of every target's delta.
        alpha: the delta is scaled by alpha / rank; by alpha / sqrt(rank) with rslora.
        rslora: see alpha (arXiv 2312.03732).
        targets: linear layers that get a delta, of TARGETS.
        dropout: share of a delta's inputs that is zeroed, in training only.
        steps: updates of the adapter.
        batch_size: rows of one forward pass.
        row_tokens: length of a row; short examples share one. A multiple of 64.
        accumulate: forward passes whose gradients make one update.
        learning_rate: at its peak, after the warm-up; falls to a tenth of it along a cosine.
        warmup_steps: in which the rate rises; less than steps.
        weight_decay: AdamW's, of both matrices.
        max_gradient_norm: longer gradients are cut to it.
        eval_share: share of the examples that is held out, to be evaluated on.
        eval_every: steps between evaluations; 0 evaluates at the end only.
        checkpoint_every: steps between checkpoints; 0 writes one at the end only.
        seed: of the initial adapter, the order of the examples, what is held out, and dropout.

    Raises:
        ConfigError: a value is out of its bounds; the option's name is in the message.
    """

    rank: int = 8
    alpha: float = 16.0
    rslora: bool = False
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    dropout: float = 0.0
    steps: int = 200
    batch_size: int = 4
    row_tokens: int = 512
    accumulate: int = 1
    learning_rate: float = 1e-3
    warmup_steps: int = 10
    weight_decay: float = 0.0
    max_gradient_norm: float = 1.0
    eval_share: float = 0.0
    eval_every: int = 50
    checkpoint_every: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        for name, (low, high) in _BOUNDS.items():
            value = getattr(self, name)
            if not low <= value <= high:  # also refuses NaN
                raise ConfigError(f"{option(name)} must be between {low} and {high}, got {value}")
        if self.row_tokens % ROW_MULTIPLE:
            raise ConfigError(
                f"{option('row_tokens')} must be a multiple of {ROW_MULTIPLE}, "
                f"got {self.row_tokens}"
            )
        if self.warmup_steps >= self.steps:
            raise ConfigError(
                f"{option('warmup_steps')}={self.warmup_steps} must be below "
                f"{option('steps')}={self.steps}"
            )
        unknown = [target for target in self.targets if target not in TARGETS]
        if unknown or not self.targets:
            raise ConfigError(
                f"{option('targets')} takes some of {','.join(TARGETS)}, got "
                f"{unknown[0] if unknown else 'none'!r}"
            )

    @property
    def scale(self) -> float:
        """What a delta is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    @property
    def rows_per_step(self) -> int:
        """Rows that one update is made from."""
        return self.batch_size * self.accumulate


def option(name: str) -> str:
    """The command line's word for an attribute."""
    return "--" + name.replace("_", "-")


def differences(recipe: Recipe, stored: dict[str, object]) -> list[str]:
    """In what a recipe differs from one that was stored as JSON, in words."""
    found = []
    for field in dataclasses.fields(Recipe):
        now, then = getattr(recipe, field.name), stored.get(field.name)
        then = tuple(then) if isinstance(then, list) else then
        if now != then:
            found.append(f"{option(field.name)} was {then}, now {now}")
    return found


_BOUNDS: dict[str, tuple[float, float]] = {
    "rank": (1, 1024),
    "alpha": (1e-6, 1e6),
    "dropout": (0, 0.95),
    "steps": (1, 10_000_000),
    "batch_size": (1, 4096),
    "row_tokens": (ROW_MULTIPLE, 1 << 20),
    "accumulate": (1, 4096),
    "learning_rate": (1e-9, 10),
    "warmup_steps": (0, 10_000_000),
    "weight_decay": (0, 10),
    "max_gradient_norm": (1e-6, 1e6),
    "eval_share": (0, 0.9),
    "eval_every": (0, 10_000_000),
    "checkpoint_every": (0, 10_000_000),
    "seed": (0, 2**31 - 1),
}
