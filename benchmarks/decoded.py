"""What requests take in a turned engine: rows that decode side by side, and one alone."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.turned import Turned
from jaxserve.protocol.messages import TokenEvents
from jaxserve.protocol.status import StepStats
from jaxserve.types import SamplingParams

#: Tokens that each row has before its time counts.
WARM_STEPS = 6


@dataclass(frozen=True)
class Decoded:
    """Nanoseconds of a step, and of CPU time in it."""

    step_ns: float
    cpu_ns: float


@dataclass(frozen=True)
class Completed:
    """One request: seconds after its first token, its tokens, the device calls it took."""

    seconds: float
    tokens: int
    calls: int


def decode(
    engine: Turned, prompts: Sequence[list[int]], samplings: Sequence[SamplingParams]
) -> Decoded:
    """Rows that decode side by side, until each has nearly all tokens that the first one may."""
    ids = [engine.submit(p, s) for p, s in zip(prompts, samplings, strict=True)]
    num_tokens = dict.fromkeys(ids, 0)
    begun_ns = begun_cpu_ns = begun_tokens = 0
    wanted = samplings[0].max_tokens - 8
    while True:
        for message in engine.turn():
            if not isinstance(message, TokenEvents):
                continue
            for number, tokens in zip(message.sequence_ids, message.token_ids, strict=True):
                num_tokens[number] += len(tokens)
            for end in message.finished:
                early = end.error or f"a row ended ({end.reason}) before {wanted} tokens"
                assert num_tokens[end.sequence_id] >= wanted, early
            now_ns, fewest = message.at_ns, min(num_tokens.values())
            if fewest >= WARM_STEPS and not begun_ns:
                begun_ns, begun_tokens = now_ns, sum(num_tokens.values())
                begun_cpu_ns = time.process_time_ns()
            if fewest >= wanted:
                steps = (sum(num_tokens.values()) - begun_tokens) / len(ids)
                cpu_ns = time.process_time_ns() - begun_cpu_ns
                engine.finish(*ids)
                return Decoded((now_ns - begun_ns) / steps, cpu_ns / steps)


def complete(engine: Turned, prompt: list[int], sampling: SamplingParams) -> Completed:
    """One request to its end; the engine has to be asked for statistics."""
    engine.submit(prompt, sampling)
    first_ns = last_ns = num_tokens = num_calls = 0
    while True:
        for message in engine.turn():
            if isinstance(message, StepStats):
                num_calls += 1
            if isinstance(message, TokenEvents):
                if message.token_ids:
                    first_ns, last_ns = first_ns or message.at_ns, message.at_ns
                num_tokens += sum(map(len, message.token_ids))
                if message.finished:
                    assert not message.finished[0].error, message.finished[0].error
                    engine.finish()
                    return Completed((last_ns - first_ns) / 1e9, num_tokens, num_calls)
