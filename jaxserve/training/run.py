"""A training run: from a model and a file of examples to an adapter in peft's files.

    output/adapter_config.json, adapter_model.safetensors    the adapter, once the run is done
    output/loss.svg                                          its losses, redrawn on the way
    output/checkpoints/                                      what --resume goes on from

The loop: next batch → update → sometimes evaluate, sometimes a checkpoint. A run that was stopped,
by Ctrl-C or by SIGKILL, and goes on sees the batches, random bits and learning rates that it would
have seen: its losses are those of a run that was never stopped.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from jaxserve.errors import ConfigError
from jaxserve.formats.peft import WEIGHTS_FILE, write_adapter
from jaxserve.training import packing
from jaxserve.training.adapter import to_peft
from jaxserve.training.checkpoint import Checkpoints
from jaxserve.training.history import History
from jaxserve.training.packing import Rows
from jaxserve.training.recipe import Recipe, differences
from jaxserve.training.step import begin, eval_step, train_step
from jaxserve.training.stopping import Stopping
from jaxserve.training.task import Task

CHECKPOINTS = "checkpoints"
PLOT = "loss.svg"
#: Lines that a run writes where no bar can be shown.
_MAX_LINES = 50


@dataclass(frozen=True, kw_only=True)
class Output:
    """Where a run writes, and how.

    Attributes:
        directory: made if need be.
        resume: whether to go on from the last checkpoint there, if there is one.
        dtype: of the adapter's matrices in the file.

    Raises:
        ConfigError: the directory holds a run already, and it is not to be resumed.
    """

    directory: Path
    resume: bool = False
    dtype: np.dtype = dataclasses.field(default_factory=lambda: np.dtype(np.float32))

    def __post_init__(self) -> None:
        checkpoints = self.directory / CHECKPOINTS
        begun = checkpoints.is_dir() and any(checkpoints.iterdir())
        if not self.resume and (begun or (self.directory / WEIGHTS_FILE).exists()):
            raise ConfigError(
                f"{self.directory} holds a run already: --resume goes on with it, or give another "
                "--output"
            )


def train(task: Task, recipe: Recipe, output: Output) -> History:
    """Trains to the recipe's last step and writes the adapter.

    Raises:
        ConfigError: the recipe does not fit the model, or the run that is resumed; or the loss is
            no number any more.
        WeightsError: the checkpoint cannot be read.
        KeyboardInterrupt: the run was asked to stop; a checkpoint holds all that was done.
        OSError: something cannot be written.
    """
    output.directory.mkdir(parents=True, exist_ok=True)
    with Checkpoints(output.directory / CHECKPOINTS) as checkpoints:
        run = _Run(task, recipe, output, checkpoints)
        run.go()
        return run.history


class _Run:
    """One run as it goes.

    Attributes:
        state: after the last update.
        history: up to it.
    """

    def __init__(
        self, task: Task, recipe: Recipe, output: Output, checkpoints: Checkpoints
    ) -> None:
        self._task = task
        self._recipe = recipe
        self._output = output
        self._checkpoints = checkpoints
        self._identity: dict[str, Any] = {
            "recipe": dataclasses.asdict(recipe),
            "model": task.base_model,
            "examples": task.digest(),
        }
        self.state = begin(task.model, recipe)
        self.history = History()
        if checkpoints.latest() is not None:
            self._resume()

    def _resume(self) -> None:
        stored = self._checkpoints.progress()
        changed = differences(self._recipe, stored["recipe"])
        if stored["model"] != self._task.base_model:
            changed.append(f"the model was {stored['model']}, now {self._task.base_model}")
        if stored["examples"] != self._identity["examples"]:
            changed.append("the examples are others, or the tokenizer or template is")
        if changed:
            raise ConfigError(
                f"the run in {self._output.directory} cannot go on: {'; '.join(changed)}. Give "
                "what it was begun with, or another --output"
            )
        self.state = self._checkpoints.state(self.state)
        self.history = History.from_json(stored["history"])

    def go(self) -> None:
        """To the end, or until it is asked to stop."""
        recipe, start = self._recipe, int(self.state.step)
        self._tell(self._description())
        if start:
            self._tell(f"goes on after step {start}")
        else:
            self._evaluate(0)
        bar = tqdm(total=recipe.steps, initial=start, unit="step", disable=None)
        with bar, Stopping() as stopping:
            for step, batches in zip(
                range(start + 1, recipe.steps + 1), self._batches(start), strict=False
            ):
                self._update(step, batches, bar)
                is_last = step == recipe.steps
                if is_last or (recipe.eval_every and step % recipe.eval_every == 0):
                    self._evaluate(step)
                if is_last or (recipe.checkpoint_every and step % recipe.checkpoint_every == 0):
                    self._save()
                if stopping.asked and not is_last:
                    self._save()
                    self._tell(f"stopped after step {step}; --resume goes on from there")
                    raise KeyboardInterrupt
        self._write()

    def _batches(self, start: int) -> Iterator[Rows]:
        """Batches [A, B, S], those of the steps after `start`."""
        recipe = self._recipe
        for rows in packing.endless(
            self._task.examples,
            row_tokens=recipe.row_tokens,
            num_rows=recipe.rows_per_step,
            seed=recipe.seed,
            start=start,
        ):
            shape = recipe.accumulate, recipe.batch_size, recipe.row_tokens
            yield jax.tree.map(lambda array, shape=shape: array.reshape(shape), rows)

    def _update(self, step: int, batches: Rows, bar: tqdm[Any]) -> None:
        began = time.monotonic()
        self.state, report = train_step(self._task.model, self.state, batches, recipe=self._recipe)
        loss = float(report.loss)
        if not math.isfinite(loss):
            raise ConfigError(
                f"the loss is {loss} at step {step}: give a lower --learning-rate than "
                f"{self._recipe.learning_rate}"
            )
        self.history.losses.append((step, loss))
        num_tokens = int(np.count_nonzero(batches.segments))
        rate = num_tokens / (time.monotonic() - began)
        bar.set_postfix(loss=f"{loss:.3f}", tokens_per_s=round(rate), refresh=False)
        bar.update()
        if bar.disable and step % -(-self._recipe.steps // _MAX_LINES) == 0:
            self._tell(
                f"step {step} of {self._recipe.steps}: loss {loss:.4f}, gradient "
                f"{float(report.gradient_norm):.3f}, {rate:.0f} tokens/s"
            )

    def _evaluate(self, step: int) -> None:
        """Over the held-out examples, if there are any."""
        recipe, total, num_learned = self._recipe, 0.0, 0
        for rows in packing.once(
            self._task.held_out, row_tokens=recipe.row_tokens, num_rows=recipe.batch_size
        ):
            loss, count = eval_step(self._task.model, self.state.deltas, rows, scale=recipe.scale)
            total += float(loss)
            num_learned += int(count)
        if num_learned:
            self.history.held_out.append((step, total / num_learned))
            self._tell(f"step {step}: held-out loss {total / num_learned:.4f}")

    def _save(self) -> None:
        self._checkpoints.save(self.state, {**self._identity, "history": self.history.to_json()})
        self._plot()

    def _plot(self) -> None:
        title = f"{self._output.directory.name}: LoRA on {self._task.base_model}"
        (self._output.directory / PLOT).write_text(self.history.plot(title), encoding="utf-8")

    def _write(self) -> None:
        model = self._task.model
        adapter = to_peft(
            self.state.deltas,
            model.spec,
            model.options,
            self._recipe,
            base_model=self._task.base_model,
            dtype=self._output.dtype,
        )
        write_adapter(self._output.directory, adapter)
        self._plot()

    def _description(self) -> str:
        task, recipe = self._task, self._recipe
        num_tokens = sum(len(example.token_ids) for example in task.examples)
        num_learned = sum(int(example.is_learned[1:].sum()) for example in task.examples)
        num_rows = sum(1 for _ in packing.pack(task.examples, recipe.row_tokens))
        size = sum(leaf.size for leaf in jax.tree.leaves(self.state.deltas))
        return (
            f"{len(task.examples)} examples ({len(task.held_out)} held out): {num_tokens} tokens, "
            f"{num_learned} learned, {num_rows} rows of {recipe.row_tokens}, "
            f"{recipe.rows_per_step} a step; {size} parameters of rank {recipe.rank} on "
            f"{','.join(recipe.targets)}"
        )

    def _tell(self, line: str) -> None:
        tqdm.write(line, file=sys.stderr)
