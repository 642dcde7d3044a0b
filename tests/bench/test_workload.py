"""What the load generator sends, and when."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

import pytest

from jaxserve.bench.workload import (
    CHAT,
    COMPLETIONS,
    Lengths,
    poisson_arrivals,
    read_requests,
    synthetic_requests,
)


def test_synthetic_requests_have_the_lengths_asked_for() -> None:
    requests = synthetic_requests(
        num_requests=20,
        model="m",
        prompt_tokens=Lengths.parse("16"),
        output_tokens=Lengths.parse("4:8"),
        vocab_size=100,
        seed=3,
    )
    bodies = [json.loads(request.body) for request in requests]
    assert {len(body["prompt"]) for body in bodies} == {16}
    assert all(50 <= token < 100 for body in bodies for token in body["prompt"])
    assert {body["max_tokens"] for body in bodies} == {4, 5, 6, 7, 8}
    assert [body["max_tokens"] for body in bodies] == [r.output_tokens for r in requests]
    assert all(body["stream"] and body["ignore_eos"] for body in bodies)
    assert {request.path for request in requests} == {COMPLETIONS}
    assert len({request.body for request in requests}) == 20


def test_the_seed_decides() -> None:
    def make(seed: int) -> list[bytes]:
        lengths = Lengths(low=1, high=9)
        requests = synthetic_requests(
            num_requests=5,
            model="m",
            prompt_tokens=lengths,
            output_tokens=lengths,
            vocab_size=1000,
            seed=seed,
        )
        return [request.body for request in requests]

    assert make(1) == make(1)
    assert make(1) != make(2)


@pytest.mark.parametrize("text", ["0", "5:4", "-3", "a", ""])
def test_bad_lengths(text: str) -> None:
    with pytest.raises(ValueError):
        Lengths.parse(text)


def test_lengths_reach_both_ends() -> None:
    source = random.Random(0)
    assert {Lengths.parse("2:4").draw(source) for _ in range(100)} == {2, 3, 4}


def test_requests_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "load.jsonl"
    file.write_text(
        '{"prompt": "a", "max_tokens": 3, "ignore_eos": true}\n\n'
        '{"messages": [{"role": "user", "content": "b"}], "temperature": 0.5}\n'
    )
    requests = read_requests(file, num_requests=3, model="m", max_tokens=9)
    assert [request.path for request in requests] == [COMPLETIONS, CHAT, COMPLETIONS]
    assert [request.output_tokens for request in requests] == [3, None, 3]
    chat = json.loads(requests[1].body)
    assert chat["max_tokens"] == 9
    assert chat["temperature"] == 0.5
    assert chat["stream_options"] == {"include_usage": True}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no requests"),
        ("{}\n", "line 1"),
        ('{"prompt": "a"}\n[1]\n', "line 2"),
        ("{", "line 1"),
    ],
)
def test_bad_files(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "load.jsonl"
    file.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_requests(file, num_requests=1, model="m", max_tokens=None)


def test_poisson_gaps_are_exponential() -> None:
    times = list(itertools.islice(poisson_arrivals(4.0, seed=1), 20_001))
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    mean = sum(gaps) / len(gaps)
    variance = sum((gap - mean) ** 2 for gap in gaps) / len(gaps)
    assert times[0] == 0.0
    assert mean == pytest.approx(1 / 4, rel=0.03)
    assert variance == pytest.approx(1 / 16, rel=0.06)  # an exponential's is its mean squared
    # without memory: as many in the second half of a second as in the first
    assert sum(gap > 0.5 for gap in gaps) / len(gaps) == pytest.approx(0.1353, rel=0.08)


def test_an_infinite_rate_sends_all_at_once() -> None:
    assert list(itertools.islice(poisson_arrivals(float("inf")), 3)) == [0.0, 0.0, 0.0]
