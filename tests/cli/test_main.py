"""Arguments, exit statuses, and what is said when something is wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from jaxserve import cli
from jaxserve.config import Config
from jaxserve.errors import ConfigError, DeviceFailure, InvalidRequest, JaxserveError, WeightsError
from tests.cli.conftest import Run, wanted
from tests.models.loading import ORACLE


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[Config]:
    """What `serve` was called with, instead of serving."""
    configs: list[Config] = []

    def serve(config: Config) -> int:
        configs.append(config)
        return 7

    monkeypatch.setattr("jaxserve.http.serve.serve", serve)
    return configs


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], {}),
        (["serve"], {}),
        (["--port", "9"], {"http.port": 9}),
        (["serve", "--host", "::1", "--port=0"], {"http.host": "::1", "http.port": 0}),
        (["--set", "cache.page_size=8", "--set", "cache.num_pages=9"],
         {"cache.page_size": 8, "cache.num_pages": 9}),
        (["--model", "a", "--set", "model.path=b"], {"model.path": "a"}),
    ],
)  # fmt: skip
def test_without_a_subcommand_it_serves(
    run: Run, served: list[Config], words: list[str], expected: dict[str, Any]
) -> None:
    ended = run(*words)
    assert ended.status == 7 and ended.out == ""
    (config,) = served
    for path, value in expected.items():
        section, key = path.split(".")
        assert getattr(getattr(config, section), key) == value
        assert f"  {key}: " in ended.err


def test_a_file_of_settings_comes_before_those_of_the_command_line(
    run: Run, served: list[Config], tmp_path: Path
) -> None:
    (tmp_path / "c.yaml").write_text("http: {port: 1, host: example}\n")
    run("--config", tmp_path / "c.yaml", "--port", 2)
    assert (served[0].http.host, served[0].http.port) == ("example", 2)


def test_a_token_is_not_printed(run: Run, served: list[Config]) -> None:
    ended = run("--set", "model.token=hf_secret")
    assert served[0].model.token == "hf_secret" and "hf_secret" not in ended.err


def test_bench_takes_all_that_follows(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    words: list[list[str]] = []

    def bench(argv: list[str]) -> int:
        words.append(argv)
        return 3

    monkeypatch.setattr("jaxserve.bench.cli.run", bench)
    assert run("bench", "engine", "--rows", "1,2").status == 3
    assert words == [["engine", "--rows", "1,2"]]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["frob"], "invalid choice: 'frob'"),
        (["--frob"], "serve takes no '--frob'"),
        (["generate", "--frob", "x"], "generate takes no '--frob'; python -m jaxserve generate"),
        (["chat", "hello"], "chat takes no 'hello'"),
        (["generate", "--temperature", "hot", "x"], "--temperature: invalid float value: 'hot'"),
        (["generate", "--max-tokens", "1.5", "x"], "--max-tokens: invalid int value: '1.5'"),
        (["serve", "--port"], "--port: expected one argument"),
        (["serve", "--port", "web"], "http.port takes an integer, got 'web'"),
        (["serve", "--port", "99999"], "http.port must be between 0 and 65535, got 99999"),
        (["convert", "a"], "the following arguments are required: target"),
        (["convert", "a", "b", "--dtype", "int4"], "--dtype: invalid choice: 'int4'"),
        (["generate", "x", "--set", "cache.page_sise=8"], "the nearest is 'cache.page_size'"),
        (["generate", "x", "--set", "cache"], "--set takes section.key=value, got 'cache'"),
        (["generate", "x", "--config", "/no/file.yaml"], "/no/file.yaml"),
    ],
)  # fmt: skip
def test_wrong_use_is_one_sentence_and_2(run: Run, words: list[str], sentence: str) -> None:
    ended = run(*words)
    assert (ended.status, ended.out) == (2, "")
    assert ended.err.startswith("jaxserve: ") and ended.err.count("\n") == 1
    assert sentence in ended.err


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (ConfigError("no"), 2, "jaxserve: no\n"),
        (WeightsError("broken"), 1, "jaxserve: broken\n"),
        (InvalidRequest("wrong"), 1, "jaxserve: wrong\n"),
        (DeviceFailure("dead"), 1, "jaxserve: dead\n"),
        (JaxserveError("several\n  lines:\n    ^"), 1, "jaxserve: several lines: ^\n"),
        (KeyboardInterrupt(), 130, ""),
        (PermissionError(13, "Permission denied", "/x"), 1,
         "jaxserve: cannot read or write /x: Permission denied\n"),
        (TimeoutError("too slow"), 1, "jaxserve: cannot read or write the output: too slow\n"),
    ],
)  # fmt: skip
def test_what_goes_wrong_is_one_sentence(
    run: Run, monkeypatch: pytest.MonkeyPatch, error: BaseException, status: int, said: str
) -> None:
    def fail(config: Config) -> Any:
        raise error

    monkeypatch.setattr(cli, "_open", fail)
    monkeypatch.setattr(cli, "_drop_output", lambda: None)
    for words in (["generate", "x"], ["chat"]):
        assert run(*words) == (status, "", said)


def test_an_error_of_ours_keeps_its_trace(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(config: Config) -> Any:
        raise ZeroDivisionError

    monkeypatch.setattr(cli, "_open", fail)
    with pytest.raises(ZeroDivisionError):
        run("generate", "x")


@pytest.mark.parametrize("words", [["--help"], ["-h"]])
def test_help_names_every_command(
    run: Run, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        run(*words)
    assert ended.value.code == 0
    out = capsys.readouterr().out
    for command in ("serve", "generate", "chat", "bench", "convert", "doctor"):
        assert f"\n    {command} " in out


@pytest.mark.parametrize("words", [["--help"], ["serve", "--set", "no=1"], ["generate", "--help"]])
def test_only_a_command_that_computes_imports_jax(words: list[str]) -> None:
    code = (
        "import contextlib, sys\nfrom jaxserve.cli import main\n"
        f"with contextlib.suppress(SystemExit): main({words!r})\n"
        "assert 'jax' not in sys.modules and 'numpy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_options_are_those_of_a_request(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, dict[str, Any]]] = []

    def answer(llm: object, prompt: str, options: dict[str, Any]) -> int:
        seen.append((prompt, options))
        return 0

    monkeypatch.setattr("jaxserve.cli.generate.answer", answer)
    options = {
        "max_tokens": 3,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "repetition_penalty": 1.2,
        "seed": -4,
    }
    words = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    assert run("generate", "x", *words, "--stop", "a", "--stop", "b c").status == 0
    assert run("generate", "--", "--seed").status == 0
    assert seen == [("x", {**options, "stop": ["a", "b c"]}), ("--seed", {})]


def fake_cli(*words: object, stdout: Any = None, **environment: str) -> subprocess.Popen[Any]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.fakes.cli", *map(str, words)],
        cwd=Path(__file__).parents[2],
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONUNBUFFERED": "", **environment},  # empty is off
        stdout=stdout,
    )


@pytest.fixture
def many(tmp_path: Path) -> Path:
    """Lines whose answers are more than a pipe holds."""
    line = '{"prompt": "x", "seed": 1, "max_tokens": 1000, "ignore_eos": true}\n'
    (tmp_path / "many.jsonl").write_text(line * 100)
    return tmp_path / "many.jsonl"


def test_a_reader_that_has_enough_ends_it_quietly(many: Path) -> None:
    with fake_cli("generate", "--input", many, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline().startswith(b'{"index": 0, "text": "')
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1


def test_ctrl_c_ends_it_quietly_and_leaves_whole_lines(many: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    with fake_cli("generate", "--input", many, "--output", output) as process:
        while not output.exists() or output.stat().st_size == 0:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        assert process.stderr.read() == b""
    assert process.returncode == 130
    *lines, rest = output.read_bytes().split(b"\n")  # str.splitlines knows other ends of lines
    assert rest == b"" and 0 < len(lines) < 100
    assert [json.loads(line)["index"] for line in lines] == list(range(len(lines)))


def test_a_terminal_without_the_characters_shows_others() -> None:
    words = ("generate", "é", "--seed", 4, "--max-tokens", 30)
    with fake_cli(*words, stdout=subprocess.PIPE, PYTHONIOENCODING="ascii") as process:
        out = process.stdout.read().decode("ascii")
        assert process.stderr.read() == b""
    assert process.returncode == 0
    text = wanted("é", seed=4, max_tokens=30)
    assert not text.isascii() and out == text.encode("ascii", "replace").decode() + "\n"


def test_a_closed_output_is_no_error() -> None:
    command = f"exec {sys.executable} -m tests.fakes.cli generate x --max-tokens 5 >&-"
    ended = subprocess.run(command, shell=True, cwd=Path(__file__).parents[2], capture_output=True)
    assert (ended.returncode, ended.stderr) == (0, b"")


@pytest.mark.parametrize("command", ["generate", "convert"])
def test_a_full_disk_is_one_sentence(tmp_path: Path, command: str) -> None:
    words = {"generate": ["x", "--max-tokens=5"], "convert": [ORACLE / "qwen2", tmp_path / "out"]}
    with (
        open("/dev/full", "wb") as full,
        fake_cli(command, *words[command], stdout=full) as process,
    ):
        err = process.stderr.read()
    assert err == b"jaxserve: cannot read or write the output: No space left on device\n"
    assert process.returncode == 1
