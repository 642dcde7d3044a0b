"""`lora train`: arguments, what it writes and says, and one sentence where it cannot."""

from __future__ import annotations

import io
import re
import signal
import sys
from pathlib import Path

import pytest

from jaxserve.formats.peft import read_adapter
from tests.cli.conftest import Run, Terminal
from tests.training.tiny import write_data, write_tiny

QUICK = ("--steps", 4, "--row-tokens", 64, "--batch-size", 2, "--warmup-steps", 1, "--rank", 2,
         "--learning-rate", 0.02)  # fmt: skip


@pytest.fixture
def words(tmp_path: Path) -> tuple[object, ...]:
    model = write_tiny(tmp_path / "tiny")
    data = write_data(tmp_path / "data.jsonl")
    return ("lora", "train", "--model", model, "--data", data, "--output", tmp_path / "out", *QUICK)


def test_an_adapter_is_trained(run: Run, words: tuple[object, ...], tmp_path: Path) -> None:
    out = tmp_path / "out"
    ended = run(*words, "--targets", "all", "--dtype", "bfloat16", "--rslora", "--alpha", 4)
    assert (ended.status, ended.out) == (0, f"{out}\n")
    assert "step 4 of 4: loss" in ended.err
    assert "\r" not in ended.err and "%" not in ended.err  # stderr is no terminal
    adapter = read_adapter(out, max_rank=2)
    assert len(adapter.modules) == 7 * 3 and adapter.config.rslora
    module = adapter.modules["model.layers.0.mlp.down_proj"]
    assert module.a.dtype.name == "bfloat16" and module.a.shape == (2, 112)
    again = run(*words, "--targets", "all", "--rslora", "--alpha", 4)
    assert (again.status, again.out) == (2, "")
    assert again.err == (
        f"jaxserve: {out} holds a run already: --resume goes on with it, or give another --output\n"
    )
    assert run(*words, "--targets", "all", "--rslora", "--alpha", 4, "--resume").status == 0


def test_a_terminal_has_a_bar_of_its_steps(
    run: Run, words: tuple[object, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """In place of their lines; what else is said stands on lines of its own."""

    def shown(*more: object) -> list[str]:
        screen = io.BytesIO()
        monkeypatch.setattr(sys, "stderr", Terminal(screen, encoding="utf-8", write_through=True))
        ended = run(*words, *more)
        assert (ended.status, ended.out) == (0, f"{tmp_path / 'out'}\n")
        text = screen.getvalue().decode()
        assert text.startswith("\rloading:   0%|") and "\rloading: 100%|" in text
        assert text.endswith("\n")
        return [re.sub(r".*[\r\x1b]", "", line) for line in text.split("\n")[:-1]]

    *told, bar = shown("--eval-share", 0.25)
    assert told[0].startswith("6 examples (2 held out)")
    assert [line.partition(":")[0] for line in told[1:]] == ["step 0", "step 4"]  # of the held-out
    assert re.fullmatch(r"100%\|.+\| 4/4 \[.*, loss=\d\.\d{3}, tokens_per_s=\d+\]", bar), bar
    *told, bar = shown("--eval-share", 0.25, "--resume")
    assert told[-1] == "goes on after step 4"
    assert re.match(r"100%\|.+\| 4/4 \[", bar), bar


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (10, 9), (11, 10)])
def test_few_steps_shorten_the_warm_up(
    run: Run,
    words: tuple[object, ...],
    monkeypatch: pytest.MonkeyPatch,
    steps: int,
    warmup: int,
) -> None:
    """Where no other is asked for: the default may be more than all steps."""
    from jaxserve.training import run as run_module

    recipes = []
    monkeypatch.setattr(run_module, "train", lambda _, recipe, __: recipes.append(recipe))
    place = words.index("--warmup-steps")
    ended = run(*words[:place], *words[place + 2 :], "--steps", steps)
    assert ended.status == 0, ended.err
    assert [(recipe.steps, recipe.warmup_steps) for recipe in recipes] == [(steps, warmup)]


def test_a_run_of_one_step(run: Run, words: tuple[object, ...], tmp_path: Path) -> None:
    place = words.index("--warmup-steps")
    ended = run(*words[:place], *words[place + 2 :], "--steps", 1)
    assert (ended.status, ended.out) == (0, f"{tmp_path / 'out'}\n"), ended.err
    assert "step 1 of 1: loss" in ended.err
    assert read_adapter(tmp_path / "out", max_rank=2).modules


def test_ctrl_c_is_130_and_leaves_a_checkpoint(
    run: Run, words: tuple[object, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from jaxserve.training import run as run_module

    step = run_module.train_step

    def interrupted(*args: object, **options: object) -> object:
        signal.raise_signal(signal.SIGINT)
        return step(*args, **options)

    monkeypatch.setattr(run_module, "train_step", interrupted)
    ended = run(*words)
    assert (ended.status, ended.out) == (130, "")
    assert ended.err.endswith("stopped after step 1; --resume goes on from there\n")
    assert [path.name for path in (tmp_path / "out" / "checkpoints").iterdir()] == ["1"]


def test_bad_lines_are_one_sentence(run: Run, words: tuple[object, ...], tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text('{"text": "a"}\n{"prompt": "b"}\n')
    ended = run(*words)
    assert (ended.status, ended.out) == (1, "")
    assert ended.err == (
        f'jaxserve: {tmp_path / "data.jsonl"}: line 2: it needs "messages", or "prompt" and '
        '"completion", or "text"\n'
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (("--rank", "0"), "--rank must be between 1 and 1024, got 0"),
        (("--rank", "two"), "argument --rank: invalid int value: 'two'"),
        (("--targets", "q_proj,router"), "--targets takes some of q_proj,k_proj"),
        (("--dtype", "int8"), "argument --dtype: invalid choice: 'int8'"),
        (("--set", "weights.quantization=int8"), "codes have no gradient"),
        (("--frob",), "lora takes no '--frob'"),
    ],
)
def test_wrong_use_is_one_sentence_and_2(
    run: Run, words: tuple[object, ...], more: tuple[str, ...], sentence: str
) -> None:
    ended = run(*words, *more)
    assert (ended.status, ended.out) == (2, "")
    assert ended.err.startswith("jaxserve: ") and ended.err.count("\n") == 1
    assert sentence in ended.err


@pytest.mark.parametrize("words", [("lora",), ("lora", "train"), ("lora", "train", "--data", "x")])
def test_what_is_missing_is_named(run: Run, words: tuple[str, ...]) -> None:
    ended = run(*words)
    assert ended.status == 2 and "the following arguments are required" in ended.err
