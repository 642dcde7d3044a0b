"""How long does planning take, who is served, and how many on time, however many wait?

Method: the real scheduler over a device that only keeps time (a step takes --step-ms and
--token-us for each of its tokens). Arrivals have the shapes of published serving traces: bursts
(gaps between requests are gamma distributed with a coefficient of variation of 3), long-tailed
prompts and answers (log-normal), and a few tenants that send most (Zipf). A warm-up fills the queue
to --waiting; from then on arrivals keep it there until --requests have come, and the rest is
served. CPU time of `plan` and of `commit` is measured for each step, with the garbage collector's
young generation only. There are three arms, a queue of 0, a hundredth of --waiting, and all; each
with every policy of --fairness.

    planning    p50 and p99 of a step; the target is p99 < 1 ms, flat in the number waiting
    fairness    priced tokens that the tenant served most and the one served least got, of the mean
    goodput     requests a simulated second whose first token came within --slo-s

    python benchmarks/scheduler.py [--requests 1000000] [--rows 1024] [--waiting 100000]
                                   [--plots docs/scheduling]

Ends in one JSON line.
"""

from __future__ import annotations

import argparse
import gc
import random
import sys
import time
from collections import Counter, deque
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))  # a checkout needs no installation

from jaxserve.bench.plot import grouped_bars
from jaxserve.bench.stats import environment, json_line, percentile, table
from jaxserve.config import CacheConfig, SchedulerConfig
from jaxserve.scheduler.plan import Plan
from jaxserve.scheduler.scheduler import Scheduler
from jaxserve.scheduler.sequence import Sequence
from jaxserve.types import CacheGroup, ModelInfo, SamplingParams

PAGE_SIZE = 16
NUM_TENANTS = 16
LIMIT_MS = 1.0
MODEL = ModelInfo(
    name="none",
    max_context=1 << 20,
    vocab_size=2,
    eos_token_ids=(0,),
    cache_groups=(CacheGroup(kind="full", layers=(0,), num_kv_heads=1, head_dim=1),),
)


@dataclass
class Figures:
    """What one arm measured; times in ms unless the name says otherwise."""

    fairness: str
    waiting: int
    requests: int
    steps: int
    plan_p50: float
    plan_p99: float
    commit_p50: float
    commit_p99: float
    most_served: float
    least_served: float
    goodput_per_s: float


class Simulation:
    """One arm: a scheduler, arrivals, and a clock that the device moves."""

    def __init__(self, args: argparse.Namespace, waiting: int, fairness: str) -> None:
        self.args = args
        self.fairness = fairness
        self.waiting = waiting
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
            cache=CacheConfig(prefix=False),  # all prompts are of the same token
            clock_ns=lambda: self.now_ns,
        )
        self.draw = random.Random(1)
        self.tenants = [f"tenant {n}" for n in range(NUM_TENANTS)]
        self.popularity = [1 / (1 + n) for n in range(NUM_TENANTS)]
        self.num_sent = 0
        self.sender: list[str] = []  # by number of the request
        self.burst_left = 0
        self.decoding: dict[int, None] = {}
        self.in_flight: deque[tuple[list[int], Plan]] = deque()
        self.sent_ns: dict[Sequence, int] = {}
        self.served: Counter[str] = Counter(dict.fromkeys(self.tenants, 0))
        self.on_time = 0
        self.plan_ms: list[float] = []
        self.commit_ms: list[float] = []

    def run(self) -> Figures:
        """The whole arm."""
        while self.num_sent < self.waiting:
            self.send()
        begun_ns, warm_steps = self.now_ns, 2 * self.args.rows // 8
        steps = 0
        while self.num_sent < self.args.requests:
            self.arrive()
            self.turn(measured=steps >= warm_steps)
            steps += 1
            if steps >= self.args.max_steps:
                break
        mean = max(self.served.total() / NUM_TENANTS, 1.0)
        return Figures(
            fairness=self.fairness,
            waiting=self.waiting,
            requests=self.num_sent,
            steps=steps,
            plan_p50=percentile(self.plan_ms, 50),
            plan_p99=percentile(self.plan_ms, 99),
            commit_p50=percentile(self.commit_ms, 50),
            commit_p99=percentile(self.commit_ms, 99),
            most_served=max(self.served.values()) / mean,
            least_served=min(self.served.values()) / mean,
            goodput_per_s=self.on_time / ((self.now_ns - begun_ns) / 1e9),
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
        (tenant,) = draw.choices(self.tenants, self.popularity)
        sequences = self.scheduler.submit(
            [("client", self.num_sent)],
            [1] * prompt_len,
            SamplingParams(max_tokens=max_tokens, seed=0),
            tenant=tenant,
            priority=0 if draw.random() < 0.95 else -10,
        )
        self.num_sent += 1
        self.sender.append(tenant)
        self.sent_ns |= dict.fromkeys(sequences, self.now_ns)

    def turn(self, *, measured: bool) -> None:
        """One step of the engine's loop."""
        before = time.thread_time_ns()
        plan = self.scheduler.plan()
        if measured:
            self.plan_ms.append((time.thread_time_ns() - before) / 1e6)
        if plan is not None:
            for slot in plan.decode_leaves:
                del self.decoding[slot]
            self.decoding |= dict.fromkeys(plan.decode_joins)
            num_tokens = len(self.decoding) + sum(len(chunk.token_ids) for chunk in plan.chunks)
            self.now_ns += round(self.args.step_ms * 1e6 + self.args.token_us * 1e3 * num_tokens)
            rows = [*self.decoding, *(chunk.slot for chunk in plan.chunks)]
            self.in_flight.append((rows, plan))
        if len(self.in_flight) > (plan is not None):
            self.read(measured=measured)

    def read(self, *, measured: bool) -> None:
        """The oldest step's tokens come back."""
        rows, _ = self.in_flight.popleft()
        sampled = [[1] for _ in rows]
        before = time.thread_time_ns()
        commit = self.scheduler.commit(rows, sampled)
        if measured:
            self.commit_ms.append((time.thread_time_ns() - before) / 1e6)
        for sequence in commit.sequences:
            tenant = self.sender[sequence.key[1]]
            self.served[tenant] += 2
            if sequence.num_outputs == 1:
                self.served[tenant] += sequence.prompt_len
                late_ns = self.now_ns - self.sent_ns.pop(sequence)
                self.on_time += late_ns <= self.args.slo_s * 1e9


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
    parser.add_argument("--fairness", default="vtc,fcfs", help="the first one is what is timed")
    parser.add_argument("--step-ms", type=float, default=15.0)
    parser.add_argument("--token-us", type=float, default=5.0)
    parser.add_argument("--slo-s", type=float, default=10.0)
    parser.add_argument("--plots", type=Path, help="folder to write plots to")
    args = parser.parse_args()
    arms = []
    policies = args.fairness.split(",")
    for policy, waiting in product(policies, (0, args.waiting // 100, args.waiting)):
        gc.collect()
        gc.freeze()  # what the arms before have left is not collected while this one is timed
        arms.append(Simulation(args, waiting, policy).run())
        print(arms[-1], flush=True)
    headers = list(asdict(arms[0]))
    cells = [
        [value if isinstance(value, str) else f"{value:.4g}" for value in asdict(arm).values()]
        for arm in arms
    ]
    print(table(headers, cells))
    if args.plots:
        plot(args, policies, arms)
    worst = max(arm.plan_p99 for arm in arms if arm.fairness == policies[0])
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
