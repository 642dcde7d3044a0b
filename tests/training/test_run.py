"""Runs: what they write, and that one that was stopped or killed goes on as if it never was."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.errors import ConfigError, InvalidRequest, WeightsError
from jaxserve.formats.peft import read_adapter
from jaxserve.settings import load_config
from jaxserve.training import run as run_module
from jaxserve.training.history import History
from jaxserve.training.recipe import TARGETS, Recipe
from jaxserve.training.run import Output, train
from jaxserve.training.step import begin, eval_step, train_step
from jaxserve.training.task import Task, load_task, train_options
from tests.training.tiny import ANIMALS, RECIPE, config_of, write_data, write_tiny

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def data(model: Path) -> Path:
    return write_data(model.parent / "data.jsonl")


@pytest.fixture(scope="module")
def task(model: Path, data: Path) -> Task:
    return load_task(config_of(model), RECIPE, data)


@pytest.fixture(scope="module")
def whole(task: Task, tmp_path_factory: pytest.TempPathFactory) -> tuple[History, Path]:
    """A run that nothing happened to, and its directory."""
    directory = tmp_path_factory.mktemp("runs") / "whole"
    return train(task, RECIPE, Output(directory=directory)), directory


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


def check_same(history: History, directory: Path, whole: tuple[History, Path]) -> None:
    """Losses and adapter are those of the whole run, to the last bit."""
    assert history.to_json() == whole[0].to_json()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert files(directory)[name] == files(whole[1])[name]


def test_a_run_writes_an_adapter_a_plot_and_checkpoints(whole: tuple[History, Path]) -> None:
    history, directory = whole
    assert [step for step, _ in history.losses] == [1, 2, 3, 4, 5, 6]
    assert history.losses[-1][1] < history.losses[0][1] - 1
    adapter = read_adapter(directory, max_rank=8)
    assert len(adapter.modules) == 6 and adapter.config.base_model == "tiny"
    assert adapter.config.target_modules == ("q_proj", "v_proj")
    module = adapter.modules["model.layers.2.self_attn.v_proj"]
    assert (module.a.shape, module.b.shape, module.scale) == ((8, 64), (32, 8), 2.0)
    assert module.a.dtype == np.float32 and np.abs(module.b).max() > 0.001
    plot = ElementTree.parse(directory / "loss.svg").getroot()
    assert any("LoRA on tiny" in (text.text or "") for text in plot.iter())
    steps = sorted(path.name for path in (directory / "checkpoints").iterdir())
    assert steps == ["4", "6"]


def test_losses_are_those_of_a_loop_without_any_of_this(
    task: Task, whole: tuple[History, Path]
) -> None:
    from jaxserve.training.packing import endless

    state, losses = begin(task.model, RECIPE), []
    for rows in endless(task.examples, row_tokens=64, num_rows=2, seed=0):
        batches = jax.tree.map(lambda x: x[None], rows)
        state, report = train_step(task.model, state, batches, recipe=RECIPE)
        losses.append(float(report.loss))
        if len(losses) == RECIPE.steps:
            break
    assert losses == [loss for _, loss in whole[0].losses]


@pytest.fixture
def stop_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Has Ctrl-C come in the middle of a step."""

    def stop_after(step: int) -> None:
        def stepping(model: Any, state: Any, batches: Any, *, recipe: Recipe) -> Any:
            state, report = train_step(model, state, batches, recipe=recipe)
            if int(state.step) == step:
                signal.raise_signal(signal.SIGINT)
            return state, report

        monkeypatch.setattr(run_module, "train_step", stepping)

    return stop_after


@pytest.mark.parametrize("step", [1, 4])
def test_a_run_that_was_stopped_goes_on_as_if_it_never_was(
    task: Task,
    whole: tuple[History, Path],
    tmp_path: Path,
    stop_after: Callable[[int], None],
    capsys: pytest.CaptureFixture[str],
    step: int,
) -> None:
    directory = tmp_path / "run"
    stop_after(step)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(task, RECIPE, Output(directory=directory))
    assert signal.getsignal(signal.SIGINT) is before
    assert capsys.readouterr().err.endswith(
        f"stopped after step {step}; --resume goes on from there\n"
    )
    assert not (directory / "adapter_config.json").exists()
    assert (directory / "loss.svg").exists()
    check_same(train(task, RECIPE, Output(directory=directory, resume=True)), directory, whole)


def test_ctrl_c_in_the_last_step_is_the_end(
    task: Task, whole: tuple[History, Path], tmp_path: Path, stop_after: Callable[[int], None]
) -> None:
    stop_after(RECIPE.steps)
    check_same(train(task, RECIPE, Output(directory=tmp_path)), tmp_path, whole)


KILLED = """
import os, signal, sys
import orbax.checkpoint as ocp
from jaxserve import cli

# Killed while its third checkpoint is half written.
write, written = ocp.JsonCheckpointHandler.async_save, []

async def save(self, *args, **kwargs):
    written.append(None)
    if len(written) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return await write(self, *args, **kwargs)

ocp.JsonCheckpointHandler.async_save = save
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_as_if_it_never_was(
    task: Task, model: Path, data: Path, whole: tuple[History, Path], tmp_path: Path
) -> None:
    words = ["lora", "train", "--model", model, "--data", data, "--output", tmp_path, "--resume"]
    for name in ("steps", "batch_size", "row_tokens", "learning_rate", "warmup_steps",
                 "checkpoint_every"):  # fmt: skip
        words += [f"--{name.replace('_', '-')}", getattr(RECIPE, name)]
    ended = subprocess.run(
        [sys.executable, "-c", KILLED, *map(str, words)],
        cwd=ROOT,
        capture_output=True,
        env=dict(os.environ),
        text=True,
    )
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert "step 6 of 6" in ended.stderr
    assert len(list((tmp_path / "checkpoints").iterdir())) == 3  # two, and half of one
    assert not (tmp_path / "adapter_config.json").exists()
    history = train(task, RECIPE, Output(directory=tmp_path, resume=True))
    check_same(history, tmp_path, whole)
    steps = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert steps == ["4", "6"]


def test_a_checkpoint_that_cannot_be_written_is_named(
    task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("orbax.checkpoint.CheckpointManager.save", full)
    with pytest.raises(WeightsError, match="cannot write the checkpoint of step 2 in .*No space"):
        train(task, RECIPE, Output(directory=tmp_path))
    assert Output(directory=tmp_path)  # nothing is there to go on with


def test_a_run_that_is_done_is_written_again(
    task: Task, whole: tuple[History, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    history, directory = whole
    before = files(directory)
    (directory / "adapter_config.json").unlink()
    monkeypatch.setattr(run_module, "train_step", None)
    again = train(task, RECIPE, Output(directory=directory, resume=True))
    assert again.to_json() == history.to_json() and files(directory) == before


def test_a_run_does_not_go_on_with_something_else(
    task: Task, whole: tuple[History, Path], model: Path, tmp_path: Path
) -> None:
    _, directory = whole
    with pytest.raises(ConfigError, match="holds a run already: --resume goes on with it"):
        Output(directory=directory)
    output = Output(directory=directory, resume=True)
    others = replace(RECIPE, rank=4, targets=("k_proj",))
    with pytest.raises(ConfigError) as raised:
        train(task, others, output)
    assert "--rank was 8, now 4; --targets was ('q_proj', 'v_proj'), now ('k_proj',). Give" in str(
        raised.value
    )
    for changed, sentence in (
        (replace(task, examples=task.examples[1:]), "the examples are others, or the tokenizer"),
        (replace(task, base_model="big"), "the model was tiny, now big"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            train(changed, RECIPE, output)
    assert output.directory == directory


def test_a_broken_checkpoint_is_named(task: Task, tmp_path: Path) -> None:
    recipe = replace(RECIPE, steps=3, checkpoint_every=0)
    train(task, recipe, Output(directory=tmp_path))
    for path in (tmp_path / "checkpoints" / "3" / "progress").iterdir():
        path.write_bytes(b"")
    with pytest.raises(WeightsError, match="the checkpoint of step 3 in .* cannot be read"):
        train(task, recipe, Output(directory=tmp_path, resume=True))


def test_a_loss_that_is_no_number_ends_the_run(
    task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stepping(model: Any, state: Any, batches: Any, *, recipe: Recipe) -> Any:
        state, report = train_step(model, state, batches, recipe=recipe)
        return state, replace(report, loss=report.loss + jnp.where(state.step == 3, jnp.nan, 0))

    monkeypatch.setattr(run_module, "train_step", stepping)
    with pytest.raises(ConfigError, match=r"the loss is nan at step 3: give a lower --learning-ra"):
        train(task, RECIPE, Output(directory=tmp_path))


def test_accumulated_batches_make_one_large_one(task: Task) -> None:
    from jaxserve.training.packing import once

    (rows,) = once(task.examples * 3, row_tokens=64, num_rows=12)
    reports, states = [], []
    for accumulate in (1, 4):
        recipe = replace(RECIPE, batch_size=12 // accumulate, accumulate=accumulate)
        batches = jax.tree.map(lambda x, a=accumulate: x.reshape(a, -1, 64), rows)
        state = begin(task.model, recipe)
        for _ in range(2):
            state, report = train_step(task.model, state, batches, recipe=recipe)
            reports.append((float(report.loss), float(report.gradient_norm)))
        states.append(state)
    np.testing.assert_allclose(reports[:2], reports[2:], rtol=1e-4)
    deltas = begin(task.model, RECIPE).deltas
    total, count = eval_step(task.model, deltas, rows, scale=RECIPE.scale)
    assert int(count) == 3 * sum(int(e.is_learned[1:].sum()) for e in task.examples)
    assert reports[0][0] == pytest.approx(float(total) / int(count), rel=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4),
        states[0].deltas,
        states[1].deltas,
    )


def test_held_out_examples_are_evaluated_on(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = replace(RECIPE, eval_share=0.25, eval_every=4, dropout=0.1)
    task = load_task(config_of(model), recipe, data)
    assert (len(task.examples), len(task.held_out)) == (6, 2)
    history = train(task, recipe, Output(directory=tmp_path))
    assert [step for step, _ in history.held_out] == [0, 4, 6]
    assert history.held_out[-1][1] < history.held_out[0][1] - 1
    said = capsys.readouterr().err
    assert said.startswith("6 examples (2 held out): 108 tokens, 36 learned, 2 rows of 64")
    assert f"step 4: held-out loss {history.held_out[1][1]:.4f}\n" in said
    other = load_task(config_of(model), RECIPE, data, data)
    assert len(other.examples) == len(other.held_out) == len(ANIMALS)


def test_what_does_not_fit_is_told_before_weights_are_loaded(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jaxserve.training.task.load_model", None)
    one = tmp_path / "one.jsonl"
    one.write_text(json.dumps({"text": "alone"}))
    bad = tmp_path / "bad.jsonl"
    bad.write_text("{}")
    config = config_of(model)
    for arguments, sentence in (
        ((config, replace(RECIPE, row_tokens=512), data), "--row-tokens is 512, but the model was"),
        ((config, replace(RECIPE, eval_share=0.5), one), "holds one example, of which none can"),
        ((config, replace(RECIPE, eval_share=0.5), one, one), "exclude each other"),
        ((config, RECIPE, tmp_path / "none"), "cannot read"),
        ((config, RECIPE, bad), "line 1: it needs"),
    ):
        with pytest.raises((ConfigError, InvalidRequest)) as raised:
            load_task(*arguments)
        assert sentence in raised.value.message


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("weights.quantization=int8", "weights.quantization=int8: codes have no gradient"),
        ("kernels.matmul=cpu", "kernels.matmul=cpu: its products have no gradient"),
        ("kernels.attention=cpu", "kernels.attention=cpu: whole rows are not paged"),
        ("parallel.data=2", "parallel.data=2: training runs on one device"),
        ("weights.dtype=float16", "gradients leave its range; use bfloat16"),
    ],
)
def test_settings_that_training_has_not(setting: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as raised:
        train_options(load_config(settings=[setting], environ={}), "cpu")
    assert sentence in raised.value.message


def test_dtypes_by_platform() -> None:
    config = load_config(environ={})
    assert train_options(config, "cpu").dtype == "float32"
    assert train_options(config, "gpu").dtype == "bfloat16"


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"rank": 0}, "--rank must be between 1 and 1024, got 0"),
        ({"learning_rate": float("nan")}, "--learning-rate must be between"),
        ({"row_tokens": 100}, "--row-tokens must be a multiple of 64, got 100"),
        ({"warmup_steps": 6}, "--warmup-steps=6 must be below --steps=6"),
        ({"targets": ("q_proj", "lm_head")}, "got 'lm_head'"),
        ({"targets": ()}, "--targets takes some of q_proj,"),
    ],
)
def test_a_recipe_in_its_bounds(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as raised:
        replace(RECIPE, **values)
    assert sentence in raised.value.message


def test_scales() -> None:
    assert Recipe(rank=16, alpha=32).scale == 2
    assert Recipe(rank=16, alpha=32, rslora=True).scale == 8


def test_experts_take_no_deltas(tmp_path: Path) -> None:
    mixture = write_tiny(tmp_path / "mixture", "mixtral")
    recipe = replace(RECIPE, targets=TARGETS)
    task = load_task(config_of(mixture), recipe, write_data(tmp_path / "data.jsonl"))
    with pytest.raises(ConfigError, match="--targets has gate_proj, but this model's MLPs are mix"):
        train(task, recipe, Output(directory=tmp_path / "run"))


def test_stored_dtypes(task: Task, tmp_path: Path) -> None:
    recipe = replace(RECIPE, steps=3, checkpoint_every=0)
    train(task, recipe, Output(directory=tmp_path, dtype=np.dtype(np.float16)))
    (module, *_) = read_adapter(tmp_path, max_rank=8).modules.values()
    assert module.a.dtype == np.float16
