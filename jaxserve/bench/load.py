"""Sends a workload to a server and turns what came back into latencies.

Two laws of load: *open* (requests arrive by a Poisson process whether or not the server keeps up)
and *closed* (a fixed number of clients, each sends its next request when the last has ended).
Times of a request count from when it was due, so that a client that falls behind does not hide the
server's queue; `max_lateness_s` tells how far this client itself was behind.

Words: TTFT is to the first token; TPOT is the time a token after the first; ITL is the gap between
events that carry tokens; a request is *good* if it meets the objectives asked for.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxserve.bench import stats
from jaxserve.bench.sse import Response, Target, post_stream
from jaxserve.bench.workload import Request, poisson_arrivals


@dataclass(frozen=True, slots=True, kw_only=True)
class Objectives:
    """What a good request keeps; None asks nothing."""

    ttft_ms: float | None = None
    tpot_ms: float | None = None
    e2e_ms: float | None = None

    def are_met(self, outcome: Outcome) -> bool:
        """Whether a whole request keeps all of them."""
        pairs = (
            (self.ttft_ms, outcome.ttft_s),
            (self.tpot_ms, outcome.tpot_s),
            (self.e2e_ms, outcome.e2e_s),
        )
        return not outcome.error and all(
            limit is None or seconds * 1e3 <= limit for limit, seconds in pairs
        )


@dataclass(slots=True, kw_only=True)
class Outcome:
    """One request's fate, in seconds and tokens.

    Attributes:
        error: a short kind ("status 503", "truncated", …); empty if it came whole.
        gaps_s: between events that carried tokens.
    """

    error: str = ""
    detail: str = ""
    ttft_s: float = 0.0
    tpot_s: float = 0.0
    e2e_s: float = 0.0
    prompt_tokens: int = 0
    output_tokens: int = 0
    gaps_s: list[float] = field(default_factory=list)


@dataclass(slots=True, kw_only=True)
class Run:
    """All outcomes of one load, and how long it took from the first request to the last end."""

    outcomes: list[Outcome]
    seconds: float
    max_lateness_s: float


Send = Callable[[Request], Awaitable[Response]]


async def run_open(send: Send, requests: Sequence[Request], rate: float, seed: int = 0) -> Run:
    """Requests arrive by a Poisson process of `rate` a second."""
    start = time.monotonic()
    lateness = 0.0

    async def one(request: Request, due: float) -> Outcome:
        return judge(request, await send(request), due)

    tasks = []
    for request, at in zip(requests, poisson_arrivals(rate, seed=seed), strict=False):
        await asyncio.sleep(max(0.0, start + at - time.monotonic()))
        lateness = max(lateness, time.monotonic() - start - at)
        tasks.append(asyncio.create_task(one(request, start + at)))
    outcomes = await asyncio.gather(*tasks)
    return Run(outcomes=outcomes, seconds=time.monotonic() - start, max_lateness_s=lateness)


async def run_closed(send: Send, requests: Sequence[Request], concurrency: int) -> Run:
    """`concurrency` clients share the requests."""
    start = time.monotonic()
    outcomes: list[Outcome] = []
    waiting = iter(requests)

    async def client() -> None:
        for request in waiting:
            due = time.monotonic()
            outcomes.append(judge(request, await send(request), due))

    await asyncio.gather(*(client() for _ in range(min(concurrency, len(requests)))))
    return Run(outcomes=outcomes, seconds=time.monotonic() - start, max_lateness_s=0.0)


def sender(target: Target, timeout_s: float, on_done: Callable[[], None]) -> Send:
    """Sends requests to a server; `on_done` is called after each, for a progress line."""

    async def send(request: Request) -> Response:
        try:
            return await post_stream(target, request.path, request.body, timeout_s=timeout_s)
        finally:
            on_done()

    return send


def judge(request: Request, response: Response, due_s: float) -> Outcome:
    """Reads a response: was it whole, and when did its tokens come?

    Args:
        due_s: when the request should have been sent (CLOCK_MONOTONIC).
    """
    if response.status != 200:
        kind = f"status {response.status}" if response.status else "no answer"
        detail = response.error or response.body[:500].decode(errors="replace")
        return Outcome(error=kind, detail=detail)
    outcome = Outcome(e2e_s=response.ended_s - due_s)
    finished = ended = False
    times: list[float] = []
    for at, payload in response.events:
        if payload == b"[DONE]":
            ended = True
            continue
        try:
            event = json.loads(payload)
        except ValueError:
            return Outcome(error="not JSON", detail=payload[:200].decode(errors="replace"))
        if error := event.get("error"):
            return Outcome(error="error event", detail=str(error)[:500])
        if usage := event.get("usage"):
            outcome.prompt_tokens = usage["prompt_tokens"]
            outcome.output_tokens = usage["completion_tokens"]
        for choice in event.get("choices", ()):
            finished |= choice.get("finish_reason") is not None
            if _carries_text(choice):
                times.append(at)
    if not (finished and ended and response.complete):
        missing = "[DONE]" if finished else "finish_reason"
        outcome.error, outcome.detail = "truncated", response.error or f"no {missing}"
        return outcome
    outcome.output_tokens = outcome.output_tokens or len(times)
    if request.output_tokens is not None and outcome.output_tokens != request.output_tokens:
        outcome.error = "truncated"
        outcome.detail = f"{outcome.output_tokens} of {request.output_tokens} tokens"
        return outcome
    first = times[0] if times else response.ended_s  # all of its tokens may have been special ones
    last = times[-1] if times else first
    outcome.ttft_s = first - due_s
    outcome.tpot_s = (last - first) / max(1, outcome.output_tokens - 1)
    outcome.gaps_s = [later - earlier for earlier, later in itertools.pairwise(times)]
    return outcome


def report(run: Run, objectives: Objectives) -> dict[str, Any]:
    """Counts, throughput and percentiles of a run; times in milliseconds."""
    whole = [outcome for outcome in run.outcomes if not outcome.error]
    good = [outcome for outcome in whole if objectives.are_met(outcome)]
    errors = Counter(outcome.error for outcome in run.outcomes if outcome.error)
    truncated = errors.pop("truncated", 0)
    examples = {outcome.error: outcome.detail for outcome in run.outcomes if outcome.error}
    output_tokens = sum(outcome.output_tokens for outcome in whole)

    def milliseconds(values: Sequence[float]) -> dict[str, float]:
        return stats.summary([value * 1e3 for value in values])

    return {
        "requests": len(run.outcomes),
        "whole": len(whole),
        "errors": dict(errors),
        "truncated": truncated,
        "error_examples": examples,
        "seconds": run.seconds,
        "requests_per_s": len(whole) / run.seconds,
        "output_tokens_per_s": output_tokens / run.seconds,
        "prompt_tokens_per_s": sum(o.prompt_tokens for o in whole) / run.seconds,
        "goodput_requests_per_s": len(good) / run.seconds,
        "good_share": len(good) / max(1, len(run.outcomes)),
        "max_lateness_ms": run.max_lateness_s * 1e3,
        "ttft_ms": milliseconds([o.ttft_s for o in whole]),
        "tpot_ms": milliseconds([o.tpot_s for o in whole if o.output_tokens > 1]),
        "itl_ms": milliseconds([gap for o in whole for gap in o.gaps_s]),
        "e2e_ms": milliseconds([o.e2e_s for o in whole]),
    }


def _carries_text(choice: dict[str, Any]) -> bool:
    delta = choice.get("delta") or {}
    return bool(choice.get("text") or delta.get("content") or choice.get("token_ids"))
