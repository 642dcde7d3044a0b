"""What does a token cost the host, when the device costs nothing?

Method: this process is the engine (scheduler, batch builder, outbox, ZeroMQ, MessagePack), over a
device that computes nothing and whose step takes a fixed time of sleep, so that readers keep up
as they do with a model. Clients are processes of their own (`EngineClient` on uvloop, one task a
stream). A round is 256 requests at once, from their submission to their ends, requests' own cost
included. CPU time (user and system, all threads) of the engine process is divided by the tokens
emitted, that of the clients by the events they took. Arms are interleaved round by round:

    k1      one decode step a device call, one client
    k1x4    the same, four clients (HTTP workers)
    k4      four decode steps a call, one client
    lora    as k1, with slots for LoRA adapters that nobody uses: at most 1% more than k1

The target is < 8 µs a token in each. Beside them, planning: CPU time of `Scheduler.plan` with 256
running sequences of which four end and four are let in each step, while 0, 100 and 10,000 wait;
interleaved likewise, the target is a flat line.

    python benchmarks/host.py [--rows 256] [--tokens 128] [--rounds 30] [--step-ms 4] [--profile]

Ends in one JSON line.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import json
import pstats
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvloop

sys.path.insert(0, str(Path(__file__).parent.parent))  # a checkout needs no installation

from benchmarks.no_device import MODEL, PAGE_SIZE, NoDevice
from jaxserve.bench.stats import environment, json_line, median, percentile, ratio_interval, table
from jaxserve.config import SchedulerConfig
from jaxserve.engine.adapters import RequestAdapters
from jaxserve.engine.attribution import Attribution, WorkRates
from jaxserve.engine.batches import Batches
from jaxserve.engine.loop import Engine
from jaxserve.lora.host import HostAdapters
from jaxserve.protocol.client import EngineClient, Stream
from jaxserve.protocol.zmq import ZmqClient, ZmqServer
from jaxserve.scheduler.copies import Schedulers
from jaxserve.scheduler.scheduler import Scheduler
from jaxserve.types import SamplingParams
from tests.fakes.batch import DoublingShapes

LIMIT_US = 8.0
PROMPT_LEN = 16


# ---------------------------------------------------------------------------- clients


class Clients:
    """Processes that submit and read."""

    def __init__(self, address: str, num_clients: int) -> None:
        self._processes = [
            subprocess.Popen(
                [sys.executable, __file__, "--client", address, *sys.argv[1:]],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for _ in range(num_clients)
        ]

    def begin(self, num_sequences: int, max_tokens: int) -> None:
        """Has them submit a round, in equal parts."""
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(f"{num_sequences // len(self._processes)} {max_tokens}\n")
            process.stdin.flush()

    def end(self) -> tuple[int, int]:
        """Their CPU nanoseconds and the events they took in the round."""
        cpu_ns = events = 0
        for process in self._processes:
            assert process.stdout is not None
            answer = json.loads(process.stdout.readline())
            cpu_ns += answer["cpu_ns"]
            events += answer["events"]
        return cpu_ns, events

    def close(self) -> None:
        """Ends them."""
        for process in self._processes:
            assert process.stdin is not None and process.stdout is not None
            process.stdin.close()
            process.wait()
            process.stdout.close()


async def client(address: str) -> None:
    """A client process: a round for each line on stdin, its figures on stdout."""
    engine = EngineClient(ZmqClient(address))
    await engine.start()
    await engine.ready()
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        num_sequences, max_tokens = map(int, line.split())
        began_ns = time.process_time_ns()
        sampling = SamplingParams(max_tokens=max_tokens, seed=1, ignore_eos=True)
        streams = [
            engine.submit(range(first, first + PROMPT_LEN), sampling)  # no two begin alike
            for first in range(100, 100 + num_sequences)
        ]
        counts = await asyncio.gather(*map(read, streams))
        assert all(tokens == max_tokens for _, tokens in counts)
        cpu_ns = time.process_time_ns() - began_ns
        print(json.dumps({"cpu_ns": cpu_ns, "events": sum(n for n, _ in counts)}), flush=True)
    await engine.close()


async def read(stream: Stream) -> tuple[int, int]:
    """Events and tokens of a stream."""
    events = tokens = 0
    async for event in stream:
        events += 1
        tokens += len(event.token_ids)
    return events, tokens


# ---------------------------------------------------------------------------- arms


@dataclass
class Arm:
    """One engine and its clients, with the samples so far in µs.

    Attributes:
        engine_us: a token, of the whole round.
        steady_us: a token, of the turns in which every row decodes.
        client_us: an event.
    """

    name: str
    engine: Engine
    clients: Clients
    engine_us: list[float] = field(default_factory=list)
    steady_us: list[float] = field(default_factory=list)
    client_us: list[float] = field(default_factory=list)

    def round(self, rows: int, tokens: int, profile: cProfile.Profile | None = None) -> None:
        """Serves one round and notes its figures."""
        engine = self.engine
        while engine.scheduler.has_work or engine.in_flight:
            engine.step()
        self.clients.begin(rows, tokens)
        while not engine.scheduler.has_work:
            engine.receive(1.0)
        if profile:
            profile.enable()
        began_ns = time.process_time_ns()
        steady_ns = steady_tokens = 0
        while engine.scheduler.has_work:
            turn_ns = time.process_time_ns()
            engine.receive(0.0)
            before = engine.in_flight
            engine.step()
            if before and before.inputs[0].num_decode_rows == rows:
                steady_ns += time.process_time_ns() - turn_ns
                steady_tokens += rows * before.inputs[0].program.decode_steps
        engine_ns = time.process_time_ns() - began_ns
        if profile:
            profile.disable()
        client_ns, events = self.clients.end()
        self.engine_us.append(engine_ns / 1e3 / (rows * tokens))
        self.steady_us.append(steady_ns / 1e3 / max(steady_tokens, 1))
        self.client_us.append(client_ns / 1e3 / events)


def no_adapter(*asked: object) -> Any:
    """Nobody asks for one."""
    raise AssertionError(f"an adapter: {asked}")


def start_arm(
    name: str,
    directory: str,
    rows: int,
    decode_steps: int,
    num_clients: int,
    step_s: float,
    adapter_slots: tuple[int, ...] = (),
) -> Arm:
    """An engine with its clients, connected."""
    config = SchedulerConfig(
        max_rows=rows,
        max_step_tokens=1024,
        decode_steps=decode_steps,
        max_waiting=rows,
        draft_tokens=0,  # tokens repeat themselves here: any draft would be right
    )
    scheduler = Schedulers(
        *(config, MODEL),
        page_size=PAGE_SIZE,
        num_pages=[rows * 256],
        adapter_slots=adapter_slots,
    )
    host = None
    if adapter_slots:
        host = HostAdapters(no_adapter, no_adapter, largest_bytes=1, max_bytes=1)
    address = f"ipc://{directory}/{name}"
    server = ZmqServer(address)
    batch = Batches(DoublingShapes(), rows)
    attribution = Attribution(WorkRates(), rows)
    device = NoDevice(step_s * decode_steps)
    engine = Engine(
        *(MODEL, scheduler, batch, device, server),
        attribution=attribution,
        adapters=RequestAdapters(host),
    )
    return Arm(name, engine, Clients(address, num_clients))


class Planner:
    """A scheduler that is kept at `rows` running and `waiting` waiting sequences."""

    MAX_TOKENS = 64

    def __init__(self, rows: int, waiting: int) -> None:
        config = SchedulerConfig(
            max_rows=rows,
            max_step_tokens=1024,
            decode_steps=1,
            max_waiting=waiting + rows,
            draft_tokens=0,
        )
        self.scheduler = Scheduler(config, MODEL, page_size=PAGE_SIZE, num_pages=[rows * 256])
        self.plan_us: list[float] = []
        self._rows, self._target = rows, waiting
        self._batch = Batches(DoublingShapes(), rows)
        self._number = 0
        for part in range(0, rows, rows // self.MAX_TOKENS):  # their ends are spread over steps
            self._submit(rows // self.MAX_TOKENS, 1 + part * self.MAX_TOKENS // rows)
        self._submit(waiting, self.MAX_TOKENS)
        self.turns(2 * self.MAX_TOKENS)
        self.plan_us.clear()

    def turns(self, num_turns: int) -> None:
        """Plans so often and notes the mean time of a plan."""
        spent_ns = 0
        for _ in range(num_turns):
            missing = self._rows + self._target
            missing -= self.scheduler.num_running + self.scheduler.num_waiting
            self._submit(missing, self.MAX_TOKENS)
            began_ns = time.thread_time_ns()
            plan = self.scheduler.plan()
            spent_ns += time.thread_time_ns() - began_ns
            assert plan is not None
            (inputs,) = self._batch.build([plan])
            live = inputs.num_live_rows
            self.scheduler.commit(inputs.rows[:live].tolist(), [[300] for _ in range(live)])
        self.plan_us.append(spent_ns / 1e3 / num_turns)

    def _submit(self, number: int, max_tokens: int) -> None:
        sampling = SamplingParams(max_tokens=max_tokens, seed=1, ignore_eos=True)
        for _ in range(number):
            self._number += 1
            first = 100 + self._number % 40_000  # no two begin alike
            prompt = list(range(first, first + PROMPT_LEN))
            self.scheduler.submit([("bench", self._number)], prompt, sampling)


def main() -> None:
    """Runs all arms and prints the tables."""
    parser = argparse.ArgumentParser(description="What a token costs the host")
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--step-ms", type=float, default=4.0)
    parser.add_argument("--profile", action="store_true", help="cProfile of the first arm's engine")
    parser.add_argument("--client", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.client and options.profile:
        p = cProfile.Profile()
        p.enable()
        uvloop.run(client(options.client))
        p.disable()
        pstats.Stats(p, stream=sys.stderr).sort_stats("tottime").print_stats(25)
        return
    if options.client:
        uvloop.run(client(options.client))
        return
    with tempfile.TemporaryDirectory() as directory:
        step_s = options.step_ms / 1e3
        arms = [
            start_arm("k1", directory, options.rows, 1, 1, step_s),
            start_arm("k1x4", directory, options.rows, 1, 4, step_s),
            start_arm("k4", directory, options.rows, 4, 1, step_s),
            start_arm("lora", directory, options.rows, 1, 1, step_s, (8,)),
        ]
        planners = {waiting: Planner(options.rows, waiting) for waiting in (0, 100, 10_000)}
        profile = cProfile.Profile() if options.profile else None
        for arm in arms:  # connections, imports
            arm.round(options.rows, options.tokens)
            for samples in (arm.engine_us, arm.steady_us, arm.client_us):
                samples.clear()
        for number in range(options.rounds):
            for arm in arms:
                arm.round(options.rows, options.tokens, None if arm is not arms[0] else profile)
            for planner in planners.values():
                planner.turns(100)
            if sys.stderr.isatty():
                print(f"\rround {number + 1} of {options.rounds}", end="", file=sys.stderr)
        for arm in arms:
            arm.clients.close()
        if profile:
            pstats.Stats(profile).sort_stats("tottime").print_stats(25)
        report(arms, planners, options)


def report(arms: Sequence[Arm], planners: dict[int, Planner], options: argparse.Namespace) -> None:
    """The tables and the JSON line."""
    rows = [
        [
            arm.name,
            *(f"{median(v):.2f}" for v in (arm.engine_us, arm.steady_us)),
            f"{percentile(arm.engine_us, 99):.2f}",
            f"{100 * median(arm.engine_us) / LIMIT_US:.0f}%",
            f"{median(arm.client_us):.2f}",
        ]
        for arm in arms
    ]
    header = ["arm", "engine µs/token", "steady", "p99", "of the limit", "client µs/event"]
    print(table(header, rows))
    named = {arm.name: arm.engine_us for arm in arms}
    lora = ratio_interval(named["lora"], named["k1"])
    print("\nlora / k1: {:.4f} ({:.4f}–{:.4f})\n".format(*lora))
    flat = planners[0].plan_us
    print(
        table(
            ["waiting", "µs/plan", "p99", "to none waiting (95%)"],
            [
                [
                    str(waiting),
                    f"{median(planner.plan_us):.1f}",
                    f"{percentile(planner.plan_us, 99):.1f}",
                    "{:.2f} ({:.2f}–{:.2f})".format(*ratio_interval(planner.plan_us, flat)),
                ]
                for waiting, planner in planners.items()
            ],
        )
    )
    record = {
        "benchmark": "host",
        "rows": options.rows,
        "tokens": options.tokens,
        "rounds": options.rounds,
        "step_ms": options.step_ms,
        "limit_us": LIMIT_US,
        "arms": {
            arm.name: {
                "engine_us_per_token": median(arm.engine_us),
                "engine_us_per_token_p99": percentile(arm.engine_us, 99),
                "steady_us_per_token": median(arm.steady_us),
                "client_us_per_event": median(arm.client_us),
                "client_us_per_event_p99": percentile(arm.client_us, 99),
            }
            for arm in arms
        },
        "lora_ratio": lora,
        "plan_us": {
            str(waiting): {
                "median": median(planner.plan_us),
                "p99": percentile(planner.plan_us, 99),
                "ratio": ratio_interval(planner.plan_us, flat),
            }
            for waiting, planner in planners.items()
        },
        **environment(),
    }
    print(json_line(record))


if __name__ == "__main__":
    main()
