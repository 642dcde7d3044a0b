"""Do streams survive the engine's deaths, against the real server and the real openai client?

Method: the server as a user starts it, with two HTTP workers. First, in peace, every prompt is run
once: the reference. Then, for --minutes, --streams clients stream without pause, each the
reference's prompts in a random order; some leave in the middle (--leave), and --kills times the
engine is struck, by SIGKILL and SIGSTOP in turn, spread over the time, each time it serves again.
At the end all streams finish, and:

    tokens      each complete stream has exactly as many as it asked for, by its usage, its token
                ids and its log-probabilities, and ended with a finish reason
    equal       its token ids are the reference's. Where they part, the reference's margin between
                the two best tokens tells a tie in floating point (below --tie) from a mistake
    failed      no stream was refused or ended with an error
    leaked      nothing runs or waits in the engine

    scripts/chaos [--minutes 2] [--streams 20] [--kills 6] [--set key=value ...]

Ends in a verdict and one JSON line; the exit status is 1 if it fails.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import httpx
from openai import APIError, AsyncOpenAI

from jaxserve.bench.stats import environment, json_line, percentile

MODEL = "smollm2-135m-instruct"
SETTINGS = (
    "http.workers=2",
    "http.heartbeat_s=1",
    "scheduler.max_rows=32",
    "scheduler.max_step_tokens=64",
    "model.max_context=512",
    "cache.num_pages=1024",
    "engine.step_deadline_floor_s=3",
)
TOPICS = (
    *("the sea", "bread", "a lighthouse", "prime numbers", "the moon", "a long train journey"),
    *("tea", "winter", "an old clock", "bees", "a river in flood", "maps"),
)
#: A part of the storm that takes longer than this has failed.
PATIENCE_S = 900


@dataclass(frozen=True)
class Task:
    """A prompt and how many tokens it asks for."""

    prompt: str
    max_tokens: int


@dataclass
class Answer:
    """What came of one stream."""

    token_ids: list[int] = field(default_factory=list)
    margins: list[float] = field(default_factory=list)
    finish_reason: str | None = None
    usage_tokens: int = -1
    longest_gap_s: float = 0.0


@dataclass
class Tally:
    """What came of all of them."""

    counts: Counter[str] = field(default_factory=Counter)
    mistakes: list[str] = field(default_factory=list)
    gaps_s: list[float] = field(default_factory=list)
    outages_s: list[float] = field(default_factory=list)

    def wrong(self, what: str) -> None:
        """Something that must not be."""
        self.mistakes.append(what)


class Server:
    """The server, as a process."""

    def __init__(self, settings: list[str], log: Any) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        words = [word for value in (*settings, f"http.port={port}") for word in ("--set", value)]
        self.base = f"http://127.0.0.1:{port}"
        self.process = subprocess.Popen(
            [sys.executable, "-m", "jaxserve", "serve", *words],
            stdout=subprocess.DEVNULL,
            stderr=log,
        )

    async def ready(self) -> None:
        """Waits until /ready says so."""
        deadline_s = time.monotonic() + PATIENCE_S
        async with httpx.AsyncClient(base_url=self.base, timeout=30) as client:
            while True:
                if self.process.poll() is not None:
                    raise SystemExit("chaos: the server has ended; see its log above")
                try:
                    if (await client.get("/ready")).status_code == 200:
                        return
                except httpx.TransportError:
                    pass
                if time.monotonic() > deadline_s:
                    raise SystemExit("chaos: the server does not get ready")
                await asyncio.sleep(0.2)

    async def health(self) -> dict[str, Any]:
        """The engine, as /health has it; it must be 200 throughout."""
        async with httpx.AsyncClient(base_url=self.base, timeout=30) as client:
            answer = await client.get("/health")
            answer.raise_for_status()
            return answer.json()["engines"][0]

    async def gauge(self, name: str) -> float:
        """A sample of /metrics."""
        async with httpx.AsyncClient(base_url=self.base, timeout=30) as client:
            for line in (await client.get("/metrics")).text.splitlines():
                if line.startswith(f"{name} "):
                    return float(line.split()[1])
        raise AssertionError(name)


async def stream(client: AsyncOpenAI, task: Task, leave_after: int | None = None) -> Answer:
    """Streams one answer; leaves after so many tokens, where given."""
    answer = Answer()
    last_s = time.monotonic()
    events = await client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": task.prompt}],
        max_tokens=task.max_tokens,
        temperature=0,
        logprobs=True,
        top_logprobs=2,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True, "return_token_ids": True},
    )
    async with events:
        async for event in events:
            now_s = time.monotonic()
            answer.longest_gap_s = max(answer.longest_gap_s, now_s - last_s)
            last_s = now_s
            if event.usage is not None:
                answer.usage_tokens = event.usage.completion_tokens
            for choice in event.choices:
                answer.token_ids += getattr(choice, "token_ids", None) or []
                for entry in (choice.logprobs.content if choice.logprobs else None) or []:
                    best, second = (top.logprob for top in entry.top_logprobs)
                    answer.margins.append(best - second)
                answer.finish_reason = choice.finish_reason or answer.finish_reason
            if leave_after is not None and len(answer.token_ids) >= leave_after:
                return answer
    return answer


def judge(task: Task, answer: Answer, reference: Answer, tie: float, tally: Tally) -> None:
    """Holds a complete stream against the one in peace."""
    tally.counts["complete"] += 1
    tally.gaps_s.append(answer.longest_gap_s)
    asked = task.max_tokens
    counts = {len(answer.token_ids), len(answer.margins), answer.usage_tokens}
    if counts != {asked} or answer.finish_reason != "length":
        tally.wrong(f"{counts} tokens of {asked}, finish reason {answer.finish_reason}")
    if answer.token_ids == reference.token_ids:
        tally.counts["equal"] += 1
        return
    pairs = zip(answer.token_ids, reference.token_ids, strict=False)
    at = next((i for i, (ours, theirs) in enumerate(pairs) if ours != theirs), 0)
    if reference.margins[at] < tie:
        tally.counts["equal up to a tie"] += 1
    else:
        tally.wrong(f"token {at} of {task.prompt!r} differs, margin {reference.margins[at]:.4f}")


async def visitor(
    client: AsyncOpenAI,
    rng: random.Random,
    references: dict[Task, Answer],
    options: argparse.Namespace,
    end_s: float,
    tally: Tally,
) -> None:
    """Streams without pause until the time is over."""
    tasks = list(references)
    while time.monotonic() < end_s:
        task = rng.choice(tasks)
        leave_after = rng.randrange(1, task.max_tokens) if rng.random() < options.leave else None
        try:
            answer = await stream(client, task, leave_after)
        except (APIError, httpx.TransportError) as error:
            tally.counts["failed"] += 1
            tally.wrong(f"a stream failed: {type(error).__name__}: {error}")
            continue
        if leave_after is None:
            judge(task, answer, references[task], options.tie, tally)
        else:
            tally.counts["left"] += 1


async def strikes(
    server: Server, options: argparse.Namespace, start_s: float, tally: Tally
) -> None:
    """Ends the engine again and again."""
    for strike in range(options.kills):
        at_s = start_s + (strike + 0.5) * 60 * options.minutes / options.kills
        await asyncio.sleep(max(0.0, at_s - time.monotonic()))
        await server.ready()
        await asyncio.sleep(1.0)  # let some tokens come
        number = signal.SIGSTOP if strike % 2 else signal.SIGKILL
        pid = (await server.health())["pid"]
        struck_s = time.monotonic()
        os.kill(pid, number)
        while (await server.health())["pid"] == pid:
            await asyncio.sleep(0.05)
        await server.ready()
        tally.outages_s.append(time.monotonic() - struck_s)
        print(f"{number.name} to pid {pid}: serves again after {tally.outages_s[-1]:.1f} s")


async def storm(server: Server, options: argparse.Namespace) -> Tally:
    """The whole of it."""
    tally = Tally()
    rng = random.Random(options.seed)
    await server.ready()
    client = AsyncOpenAI(
        base_url=f"{server.base}/v1", api_key="none", max_retries=0, timeout=PATIENCE_S
    )
    tasks = [Task(f"Tell me about {topic}.", rng.randrange(40, 161)) for topic in TOPICS]
    answers = await asyncio.gather(*(stream(client, task) for task in tasks))
    references = dict(zip(tasks, answers, strict=True))
    for task in tasks:
        judge(task, references[task], references[task], options.tie, tally)
    tally.counts.clear()
    tally.gaps_s.clear()
    start_s = time.monotonic()
    end_s = start_s + 60 * options.minutes
    visitors = (
        visitor(client, random.Random(f"{options.seed}/{i}"), references, options, end_s, tally)
        for i in range(options.streams)
    )
    await asyncio.gather(strikes(server, options, start_s, tally), *visitors)
    await client.close()
    deadline_s = time.monotonic() + 30
    names = ("jaxserve_running", "jaxserve_waiting")
    while any([await server.gauge(name) for name in names]):
        if time.monotonic() > deadline_s:
            tally.wrong("something still runs in the engine")
            break
        await asyncio.sleep(0.2)
    for name in ("engine_restarts", "requests_replayed", "requests_quarantined"):
        tally.counts[name] = int(await server.gauge(f"jaxserve_{name}_total"))
    if tally.counts["requests_quarantined"]:
        tally.wrong("a request was quarantined")
    return tally


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="scripts/chaos", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--minutes", type=float, default=2.0, help="how long the storm lasts")
    parser.add_argument("--streams", type=int, default=20, help="at once")
    parser.add_argument("--kills", type=int, default=6, help="deaths of the engine")
    parser.add_argument("--leave", type=float, default=0.2, help="share of clients that leave")
    parser.add_argument("--tie", type=float, default=2e-3, help="margin below which tokens tie")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--set", action="append", default=[], metavar="key=value")
    options = parser.parse_args()
    budget = f"engine.max_restarts={options.kills + 2}"
    with tempfile.TemporaryFile("w+") as log:
        server = Server([*SETTINGS, budget, *options.set], log)
        try:
            tally = asyncio.run(storm(server, options))
            server.process.terminate()
            if (status := server.process.wait(PATIENCE_S)) != 0:
                tally.wrong(f"the server ended with status {status}")
        except BaseException:
            log.seek(0)
            sys.stderr.write(log.read()[-5000:])
            raise
        finally:
            if server.process.poll() is None:
                server.process.kill()
                server.process.wait()
        log.seek(0)
        if "Traceback" in (text := log.read()):
            tally.wrong("the server's log has a traceback:\n" + text[-3000:])
    for mistake in tally.mistakes:
        print(f"WRONG: {mistake}")
    counts = {name: tally.counts[name] for name in ("complete", "equal", "left", "failed")}
    print(f"{'FAILED' if tally.mistakes else 'PASSED'}: {counts}")
    record = {
        "benchmark": "chaos",
        "passed": not tally.mistakes,
        "mistakes": len(tally.mistakes),
        **dict(tally.counts),
        "longest_gap_s": {
            "median": round(percentile(tally.gaps_s, 50), 3) if tally.gaps_s else None,
            "max": round(max(tally.gaps_s, default=0.0), 3),
        },
        "outages_s": [round(outage, 2) for outage in tally.outages_s],
        "options": vars(options),
        **environment(),
    }
    print(json_line(record))
    return int(bool(tally.mistakes))


if __name__ == "__main__":
    sys.exit(main())
