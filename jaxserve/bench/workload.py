"""What the load generator sends, and when: requests from lengths or a file, arrivals by a law.

A request is the path and the JSON body of one HTTP call, encoded beforehand. Everything random
comes from one seed, so that two servers are given the same load.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One HTTP call.

    Attributes:
        output_tokens: how many must come, where the server was told to ignore its end token;
            None where the model decides.
    """

    path: str
    body: bytes
    output_tokens: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """A number of tokens: always the same, or evenly distributed between two.

    Raises:
        ValueError: from `parse`, of something else than "N" or "LOW:HIGH" with 1 <= LOW <= HIGH.
    """

    low: int
    high: int

    @classmethod
    def parse(cls, text: str) -> Lengths:
        """From "128" or "64:256"."""
        low, colon, high = text.partition(":")
        lengths = cls(low=int(low), high=int(high if colon else low))
        if not 1 <= lengths.low <= lengths.high:
            raise ValueError(f"{text!r} is not N or LOW:HIGH with 1 <= LOW <= HIGH")
        return lengths

    def draw(self, source: random.Random) -> int:
        """One of them."""
        return source.randint(self.low, self.high)


def synthetic_requests(
    *,
    num_requests: int,
    model: str,
    prompt_tokens: Lengths,
    output_tokens: Lengths,
    vocab_size: int,
    seed: int = 0,
) -> list[Request]:
    """Completions of random token ids, of exactly these lengths, streamed and greedy.

    Args:
        vocab_size: token ids are drawn from its upper half, clear of special tokens.
    """
    source = random.Random(seed)
    requests = []
    for _ in range(num_requests):
        length, output = prompt_tokens.draw(source), output_tokens.draw(source)
        prompt = [source.randrange(vocab_size // 2, vocab_size) for _ in range(length)]
        fields = {
            "prompt": prompt,
            "max_tokens": output,
            "ignore_eos": True,
            "temperature": 0,
        }
        requests.append(_request(COMPLETIONS, model, fields, output))
    return requests


def read_requests(
    file: Path, *, num_requests: int, model: str, max_tokens: int | None
) -> list[Request]:
    """Requests from JSON lines, each with "prompt" or "messages" and any other parameters.

    The lines are used again from the first if there are fewer than `num_requests`.

    Args:
        max_tokens: for lines that have none of their own.

    Raises:
        ValueError: the file is empty, or a line is no such object; names the line.
    """
    lines = file.read_text(encoding="utf-8").splitlines()
    fields_list = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{file}, line {number}: {error}") from error
        if not isinstance(fields, dict) or ("prompt" in fields) == ("messages" in fields):
            raise ValueError(f'{file}, line {number}: needs "prompt" or "messages"')
        fields_list.append(fields)
    if not fields_list:
        raise ValueError(f"{file} has no requests")
    requests = []
    for index in range(num_requests):
        fields = dict(fields_list[index % len(fields_list)])
        if max_tokens is not None:
            fields.setdefault("max_tokens", max_tokens)
        exact = fields.get("max_tokens") if fields.get("ignore_eos") else None
        requests.append(
            _request(CHAT if "messages" in fields else COMPLETIONS, model, fields, exact)
        )
    return requests


def poisson_arrivals(rate: float, *, seed: int = 0) -> Iterator[float]:
    """Seconds from the start at which requests arrive, endlessly: a Poisson process.

    Args:
        rate: arrivals a second on average; infinity sends all at once.
    """
    source = random.Random(seed)
    at = 0.0
    while True:
        yield at
        at += 0.0 if rate == float("inf") else source.expovariate(rate)


def _request(path: str, model: str, fields: dict[str, Any], output: int | None) -> Request:
    body = {
        "model": model,
        **fields,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    return Request(path=path, body=json.dumps(body).encode(), output_tokens=output)
