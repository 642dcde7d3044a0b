"""How long does planning take, who is served, and how many on time, however many wait?

Method: the real scheduler over a device that only keeps time (a step takes --step-ms and
--token-us for each of its tokens). Arrivals have the shapes of published serving traces: bursts
(gaps between requests are gamma distributed with a coefficient of variation of 3), long-tailed
prompts and answers (log-normal), and a few tenants that send most (Zipf). A warm-up fills the queue
to --waiting; from then on arrivals keep it there until --requests have come. The arms are each
policy of --fairness with a queue of 0, a hundredth of --waiting, and all; those with a shorter
queue end after a tenth of the requests.

    planning    a step's `plan`: the target is p99 < 1 ms, flat in the number waiting
    reading     a step's `commit`; collecting: the garbage collector's part of a step, which
                `engine.garbage` moves to where the host would wait for the device
    fairness    priced tokens that the tenant served most and the one served least got, of the mean
    goodput     requests a simulated second whose first token came within --slo-s

Times are CPU time of the thread, which other work on the machine hardly moves, and the clock's
beside it. `--prefix` gives every prompt tokens of its own and switches the prefix cache on, so that
all pages are named. `--slowest` says what the slowest hundredth of the steps did.

    python benchmarks/scheduler.py [--requests 1000000] [--rows 1024] [--waiting 100000]
                                   [--fairness vtc,fcfs,locality] [--plots docs/scheduling]

Ends in one JSON line.
"""

from __future__ import annotations

import argparse
import gc
import random
import sys
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from itertools import accumulate, product
from pathlib import Path
from typing import Any, TypeVar

sys.path.insert(0, str(Path(__file__).parent.parent))  # a checkout needs no installation

from jaxserve.bench.plot import grouped_bars
from jaxserve.bench.stats import environment, json_line, percentile, table
from jaxserve.config import CacheConfig, SchedulerConfig
from jaxserve.engine.garbage import GarbageCollector
from jaxserve.scheduler.commit import Commit
from jaxserve.scheduler.plan import Plan
from jaxserve.scheduler.scheduler import Scheduler
from jaxserve.scheduler.sequence import Sequence
from jaxserve.types import CacheGroup, ModelInfo, SamplingParams

PAGE_SIZE = 16
NUM_TENANTS = 16
TOKEN = 1
LIMIT_MS = 1.0
MODEL = ModelInfo(
    name="none",
    max_context=1 << 20,
    vocab_size=2,
    eos_token_ids=(0,),
    cache_groups=(CacheGroup(kind="full", layers=(0,), num_kv_heads=1, head_dim=1),),
)
#: What a step did, as `--slowest` tells it.
PARTS = ("joins", "leaves", "pages", "chunks", "chunk tokens", "preempted", "rows")
Result = TypeVar("Result")


@dataclass
class Figures:
    """What one arm measured; times in ms unless the name says otherwise."""

    fairness: str
    waiting: int
    requests: int
    steps: int
    plan_p50: float
    plan_p99: float
    plan_max: float
    plan_clock_p50: float
    plan_clock_p99: float
    plan_clock_max: float
    commit_p50: float
    commit_p99: float
    collect_mean: float
    collect_p99: float
    most_served: float
    least_served: float
    goodput_per_s: float
    took_s: float


@dataclass
class Times:
    """Of one kind of call: CPU milliseconds, and the clock's."""

    cpu: list[float] = field(default_factory=list)
    clock: list[float] = field(default_factory=list)

    def of(self, call: Callable[[], Result]) -> Result:
        """Calls and notes."""
        clock, cpu = time.perf_counter_ns(), time.thread_time_ns()
        result = call()
        self.cpu.append((time.thread_time_ns() - cpu) / 1e6)
        self.clock.append((time.perf_counter_ns() - clock) / 1e6)
        return result


class Simulation:
    """One arm: a scheduler, arrivals, and a clock that the device moves."""

    def __init__(
        self, args: argparse.Namespace, waiting: int, fairness: str, collector: GarbageCollector
    ) -> None:
        self.args = args
        self.fairness = fairness
        self.waiting = waiting
        self.collector = collector
        self.now_ns = 10**9
        self.scheduler = Scheduler(
            SchedulerConfig(
                max_rows=args.rows,
                max_step_tokens=args.step_tokens,
                max_waiting=10_000_000,
                decode_steps=1,
                draft_tokens=0,  # all tokens are alike here: any draft would be right
                fairness=fairness,
            ),
            MODEL,
            page_size=PAGE_SIZE,
            num_pages=[1 + args.rows * args.context // PAGE_SIZE],
            cache=CacheConfig(prefix=args.prefix),
            clock_ns=lambda: self.now_ns,
        )
        self.draw = random.Random(1)
        self.tenants = [f"tenant {n}" for n in range(NUM_TENANTS)]
        self.popularity = list(accumulate(1 / (1 + n) for n in range(NUM_TENANTS)))
        self.sampling = [SamplingParams(max_tokens=n, seed=0) for n in range(args.context)]
        self.num_sent = 0
        self.burst_left = 0
        self.decoding: dict[int, None] = {}
        self.in_flight: deque[tuple[list[int], Plan]] = deque()
        self.tenant_of: dict[Sequence, str] = {}
        self.begun: dict[Sequence, None] = {}  # with a token, not ended
        self.served: Counter[str] = Counter(dict.fromkeys(self.tenants, 0))
        self.on_time = 0
        self.planning, self.reading, self.collecting = Times(), Times(), Times()
        self.parts: list[tuple[int, ...]] = []

    def run(self, num_requests: int) -> Figures:
        """The whole arm."""
        began_s = time.perf_counter()
        while self.num_sent < self.waiting:
            self.send()
        begun_ns, warm_steps = self.now_ns, 2 * self.args.rows // 8
        steps = 0
        while self.num_sent < num_requests and steps < self.args.max_steps:
            if steps == warm_steps:
                self.planning, self.reading, self.collecting = Times(), Times(), Times()
                self.parts.clear()
            self.arrive()
            self.turn()
            steps += 1
        for sequence in self.begun:
            self.serve(sequence)
        mean = max(self.served.total() / NUM_TENANTS, 1.0)
        plan, commit, collect = self.planning, self.reading, self.collecting
        return Figures(
            fairness=self.fairness,
            waiting=self.waiting,
            requests=self.num_sent,
            steps=steps,
            plan_p50=percentile(plan.cpu, 50),
            plan_p99=percentile(plan.cpu, 99),
            plan_max=max(plan.cpu),
            plan_clock_p50=percentile(plan.clock, 50),
            plan_clock_p99=percentile(plan.clock, 99),
            plan_clock_max=max(plan.clock),
            commit_p50=percentile(commit.cpu, 50),
            commit_p99=percentile(commit.cpu, 99),
            collect_mean=sum(collect.cpu) / len(collect.cpu),
            collect_p99=percentile(collect.cpu, 99),
            most_served=max(self.served.values()) / mean,
            least_served=min(self.served.values()) / mean,
            goodput_per_s=self.on_time / ((self.now_ns - begun_ns) / 1e9),
            took_s=time.perf_counter() - began_s,
        )

    def arrive(self) -> None:
        """Bursts that keep as many waiting as the arm wants, about."""
        if self.burst_left <= 0:
            missing = self.waiting + self.args.rows // 8 - self.scheduler.num_waiting
            if missing > 0:
                self.burst_left = max(round(missing * self.draw.gammavariate(1 / 9, 9)), 1)
        for _ in range(min(self.burst_left, 256)):
            self.burst_left -= 1
            self.send()

    def send(self) -> None:
        """One request."""
        args, draw = self.args, self.draw
        prompt_len = min(max(int(draw.lognormvariate(5.0, 1.0)), 4), args.context // 2)
        max_tokens = min(max(int(draw.lognormvariate(4.0, 1.0)), 2), args.context // 2)
        (tenant,) = draw.choices(self.tenants, cum_weights=self.popularity)
        (sequence,) = self.scheduler.submit(
            [("client", self.num_sent)],
            [self.num_sent + TOKEN if args.prefix else TOKEN] * prompt_len,
            self.sampling[max_tokens],
            tenant=tenant,
            priority=0 if draw.random() < 0.95 else -10,
        )
        self.num_sent += 1
        self.tenant_of[sequence] = tenant

    def turn(self) -> None:
        """One step of the engine's loop."""
        preempted = self.scheduler.num_preemptions
        plan = self.planning.of(self.scheduler.plan)
        if plan is not None:
            for slot in plan.decode_leaves:
                del self.decoding[slot]
            self.decoding |= dict.fromkeys(plan.decode_joins)
            num_chunk_tokens = sum(len(chunk.token_ids) for chunk in plan.chunks)
            num_tokens = len(self.decoding) + num_chunk_tokens
            self.now_ns += round(self.args.step_ms * 1e6 + self.args.token_us * 1e3 * num_tokens)
            rows = [*self.decoding, *(chunk.slot for chunk in plan.chunks)]
            self.in_flight.append((rows, plan))
            preempted = self.scheduler.num_preemptions - preempted
            self.parts.append(
                (
                    *(len(plan.joins), len(plan.decode_leaves), len(plan.page_entries)),
                    *(len(plan.chunks), num_chunk_tokens, preempted, len(self.decoding)),
                )
            )
        else:
            self.parts.append((0,) * len(PARTS))
        self.collecting.of(self.collector.launched)
        if len(self.in_flight) > (plan is not None):
            self.read()

    def read(self) -> None:
        """The oldest step's tokens come back."""
        rows, plan = self.in_flight.popleft()
        sampled = [[TOKEN] for _ in rows]
        commit: Commit = self.reading.of(lambda: self.scheduler.commit(rows, sampled))
        for sequence in commit.sequences[-len(plan.chunks) :] if plan.chunks else ():
            if sequence.num_outputs == 1:
                self.begun[sequence] = None
                late_ns = self.now_ns - sequence.queued_ns
                self.on_time += late_ns <= self.args.slo_s * 1e9
        for sequence in commit.finished:
            del self.begun[sequence]
            self.serve(sequence)
            del self.tenant_of[sequence]

    def serve(self, sequence: Sequence) -> None:
        """Counts what a sequence was given, in priced tokens."""
        served = sequence.prompt_len + 2 * sequence.num_outputs
        self.served[self.tenant_of[sequence]] += served


def slowest(simulation: Simulation) -> str:
    """What the steps did on average: all of them, and by how slow their planning was."""
    timed = sorted(zip(simulation.planning.cpu, simulation.parts, strict=True), reverse=True)
    rows = []
    for name, share in (("slowest 0.1%", 0.001), ("1%", 0.01), ("10%", 0.1), ("all", 1.0)):
        taken = timed[: max(round(len(timed) * share), 1)]
        means = [sum(values) / len(taken) for values in zip(*(p for _, p in taken), strict=True)]
        mean_ms = sum(ms for ms, _ in taken) / len(taken)
        rows.append([name, f"{mean_ms:.3f}", *(f"{mean:.1f}" for mean in means)])
    return table(["steps", "plan, ms", *PARTS], rows)


def plot(args: argparse.Namespace, policies: list[str], arms: list[Figures]) -> None:
    """Writes a plot of each figure into a folder."""
    by_policy = [[arm for arm in arms if arm.fairness == policy] for policy in policies]
    groups = [f"{arm.waiting:,} wait" for arm in by_policy[0]]

    def series(*fields: tuple[str, str], of: list[list[Figures]], scale: float = 1.0) -> Any:
        return [
            (f"{own[0].fairness}{name}", [getattr(arm, field) * scale for arm in own])
            for own in of
            for name, field in fields
        ]

    timed = by_policy[:1]
    plots = {
        "planning": (
            f"Planning a step of {args.rows} rows, by sequences waiting",
            series((", p50", "plan_p50"), (", p99", "plan_p99"), of=timed, scale=1e3),
            "µs",
        ),
        "fairness": (
            f"{NUM_TENANTS} tenants, of which few send most: who is served how much",
            series((", most", "most_served"), (", least", "least_served"), of=by_policy, scale=100),
            "priced tokens, % of the mean",
        ),
        "goodput": (
            f"Requests with their first token within {args.slo_s:g} s",
            series(("", "goodput_per_s"), of=by_policy),
            "requests a simulated second",
        ),
    }
    args.plots.mkdir(parents=True, exist_ok=True)
    for name, (title, values, unit) in plots.items():
        svg = grouped_bars(title, groups, values, unit)
        (args.plots / f"{name}.svg").write_text(svg, encoding="utf-8")


def main() -> None:
    """Runs the arms and prints what they measured."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--requests", type=int, default=1_000_000)
    parser.add_argument("--max-steps", type=int, default=10**9, help="end an arm earlier")
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--waiting", type=int, default=100_000)
    parser.add_argument("--step-tokens", type=int, default=4096)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--fairness", default="vtc,fcfs,locality")
    parser.add_argument("--prefix", action="store_true", help="with the prefix cache")
    parser.add_argument("--slowest", action="store_true", help="what the slowest steps did")
    parser.add_argument("--step-ms", type=float, default=15.0)
    parser.add_argument("--token-us", type=float, default=5.0)
    parser.add_argument("--slo-s", type=float, default=10.0)
    parser.add_argument("--plots", type=Path, help="folder to write plots to")
    args = parser.parse_args()
    arms = []
    policies = args.fairness.split(",")
    for policy, waiting in product(policies, (0, args.waiting // 100, args.waiting)):
        # What the arms before have left is not collected while this one is timed.
        simulation = Simulation(args, waiting, policy, GarbageCollector())
        num_requests = args.requests if waiting == args.waiting else args.requests // 10
        arms.append(simulation.run(num_requests))
        print(arms[-1], flush=True)
        if args.slowest:
            print(slowest(simulation), flush=True)
        gc.unfreeze()
    headers = list(asdict(arms[0]))
    cells = [
        [value if isinstance(value, str) else f"{value:.4g}" for value in asdict(arm).values()]
        for arm in arms
    ]
    print(table(headers, cells))
    if args.plots:
        plot(args, policies, arms)
    worst = max(arm.plan_p99 for arm in arms)
    record = {
        "benchmark": "scheduler",
        **environment(),
        **{key: value for key, value in vars(args).items() if key != "plots"},
        "arms": [asdict(arm) for arm in arms],
        "limit_ms": LIMIT_MS,
        "met": worst < LIMIT_MS,
    }
    print(json_line(record))


if __name__ == "__main__":
    main()
