"""Preempted sequences: do their pages come back from the host, or are their tokens computed again?

Question: on a mixed load that does not fit the page pool, how does `cache.preemption=auto` compare
with "swap" and "recompute", each always? Method: the real engine over one loaded model, its loop
turned in this process. A round is one trace (prompts and outputs of mixed lengths, more sequences
than pages; a quarter of the requests comes at once, the others while those run), from the first
submission to the last token. Each repeat runs the trace once in every mode, in turn, each time
another one first, after a round in each that is not counted. Tokens must be equal in all modes
where `--check` is given (greedy; a real model may differ where two logits are nearly equal).

The target: auto's time is at most 1.05 of the better one's, by the high end of the bootstrap 95%
interval of the ratio of the medians.

    python benchmarks/preemption.py [--repeats 30] [--pages 64] [--requests 24] [--set KEY=VALUE]

`--set model.path=tests/data/oracle/llama3` is the other extreme: a model so small that computing
costs nothing. Ends in one JSON line.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))  # a checkout needs no installation

from jaxserve.bench.engine import CLIENT, BenchServer
from jaxserve.bench.stats import environment, json_line, median, ratio_interval, table
from jaxserve.config import Config
from jaxserve.device.executor import Executor
from jaxserve.device.sharding import make_mesh
from jaxserve.engine.batches import Batches
from jaxserve.engine.load import buckets_for, parts_of
from jaxserve.engine.machine import devices, model_options
from jaxserve.engine.parts import Parts
from jaxserve.engine.process import build_engine
from jaxserve.models.decoder import Decoder
from jaxserve.protocol.messages import GetStatus, Submit, TokenEvents, TokenSegment
from jaxserve.protocol.status import StepStats
from jaxserve.settings import load_config
from jaxserve.types import SamplingParams
from jaxserve.weights.load import load_model
from jaxserve.weights.sources import resolve

MODES = ("swap", "recompute", "auto")
TARGET = 1.05


@dataclasses.dataclass(slots=True, kw_only=True)
class Round:
    """What a trace took, and what preemption did in it."""

    seconds: float = 0.0
    tokens: int = 0
    preemptions: int = 0
    swapped: int = 0
    recomputed: int = 0
    pages_saved: int = 0
    pages_loaded: int = 0
    outputs: dict[int, list[int]] = dataclasses.field(default_factory=dict)


class Bench:
    """Runs traces on one model.

    Args:
        config: of the engine; `cache.preemption` is set for each round.
    """

    def __init__(self, config: Config) -> None:
        found = devices()
        mesh = make_mesh(found, config.parallel)
        platform = found[0].platform
        options = model_options(config.weights, config.kernels, platform, mesh)
        path = resolve(config.model, config.weights, _progress)
        self.config = config
        self.model: Decoder = load_model(path, format=config.model.format, options=options)
        self.parts: Parts = parts_of(config, self.model, mesh, _progress)
        assert isinstance(self.parts.executor, Executor)
        self.executor = self.parts.executor
        self._buckets = buckets_for(config, options, platform)

    def trace(self, num_requests: int, seed: int = 0) -> list[Submit]:
        """Requests of mixed lengths, an eighth of them long."""
        random = np.random.default_rng(seed)
        limit = self.parts.model.max_context
        vocab_size = self.parts.model.vocab_size
        requests = []
        for number in range(num_requests):
            longest = 400 if number % 8 == 3 else 120
            prompt_len = int(random.integers(10, min(longest, limit // 2)))
            max_tokens = int(random.integers(20, min(200, limit - prompt_len)))
            prompt = random.integers(min(vocab_size // 2, 256), vocab_size, prompt_len).tolist()
            requests.append(
                Submit(
                    sequence_ids=[number],
                    prompt=[TokenSegment(token_ids=prompt)],
                    sampling=SamplingParams(
                        max_tokens=max_tokens, seed=number, temperature=0.0, ignore_eos=True
                    ),
                    arrived_ns=1,
                )
            )
        return requests

    def run(self, mode: str, requests: list[Submit]) -> Round:
        """The trace, from its first request to its last token."""
        cache = dataclasses.replace(self.config.cache, preemption=mode)
        parts = dataclasses.replace(
            self.parts, batch=Batches(self._buckets, self.config.scheduler.max_rows)
        )
        server = BenchServer()
        engine = build_engine(dataclasses.replace(self.config, cache=cache), server, parts)
        engine.handle(CLIENT, GetStatus(stats=True))
        first, later = requests[: len(requests) // 4], requests[len(requests) // 4 :]
        found = Round(outputs={request.sequence_ids[0]: [] for request in requests})
        start = time.perf_counter()
        server.inbox += first
        turns = 0
        while later or server.inbox or engine.scheduler.has_work or engine.in_flight is not None:
            turns += 1
            if later and turns % 8 == 0:
                server.inbox.append(later.pop(0))
            engine.receive(0.0)
            engine.step()
        found.seconds = time.perf_counter() - start
        for message in server.outbox:
            if isinstance(message, StepStats):
                found.preemptions += message.preemptions
                found.pages_saved += message.pages_saved
                found.pages_loaded += message.pages_loaded
            elif isinstance(message, TokenEvents):
                _add_events(found, message)
        return found


def _add_events(found: Round, events: TokenEvents) -> None:
    for number, tokens in zip(events.sequence_ids, events.token_ids, strict=True):
        found.outputs[number] += tokens
        found.tokens += len(tokens)
    for end in events.finished:
        if end.error:
            raise SystemExit(f"request {end.sequence_id} failed: {end.error}")
        found.swapped += end.record.swapped_tokens
        found.recomputed += end.record.recomputed_tokens


def _progress(phase: str, done: int, total: int) -> None:
    if done == total:
        print(f"{phase}: {total}", file=sys.stderr)


def main() -> None:
    """Runs all modes and prints a table and a JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--requests", type=int, default=24)
    parser.add_argument("--pages", type=int, default=64, help="of the pool")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--check", action="store_true", help="tokens must be equal in all modes")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    options = parser.parse_args()
    settings = [
        "model.max_context=640",
        f"cache.num_pages={options.pages}",
        "cache.host_bytes=1000000000",
        f"scheduler.max_rows={options.rows}",
        *options.set,
    ]
    bench = Bench(load_config(None, settings, {}))
    requests = bench.trace(options.requests)
    rounds: dict[str, list[Round]] = {mode: [] for mode in MODES}
    for repeat in range(options.repeats + 1):
        for place in range(len(MODES)):
            mode = MODES[(repeat + place) % len(MODES)]
            found = bench.run(mode, requests)
            if repeat:
                rounds[mode].append(found)
        if options.check:
            assert len({str(rounds[m][-1].outputs) for m in MODES if rounds[m]}) <= 1
    report(bench, rounds, options)


def report(bench: Bench, rounds: dict[str, list[Round]], options: argparse.Namespace) -> None:
    """The table and the JSON line."""
    seconds = {mode: [one.seconds for one in found] for mode, found in rounds.items()}
    better = min(("swap", "recompute"), key=lambda mode: median(seconds[mode]))
    ratio, low, high = ratio_interval(seconds["auto"], seconds[better])
    header = ["mode", "seconds", "tokens/s", "preemptions", "swapped", "recomputed", "saved pages"]
    rows: list[list[str]] = []
    result: dict[str, Any] = {}
    for mode, found in rounds.items():
        last, time_s = found[-1], median(seconds[mode])
        rows.append(
            [
                mode,
                f"{time_s:.3f}",
                f"{last.tokens / time_s:.1f}",
                str(last.preemptions),
                str(last.swapped),
                str(last.recomputed),
                str(last.pages_saved),
            ]
        )
        result[mode] = {
            "seconds": time_s,
            "tokens": last.tokens,
            "preemptions": last.preemptions,
            "swapped_tokens": last.swapped,
            "recomputed_tokens": last.recomputed,
        }
    print(table(header, rows))
    verdict = "met" if high <= TARGET else "missed"
    print(f"auto / {better}: {ratio:.3f} [{low:.3f}, {high:.3f}], target {TARGET}: {verdict}")
    print(
        json_line(
            {
                "benchmark": "preemption",
                "model": bench.parts.model.name,
                "repeats": options.repeats,
                "requests": options.requests,
                "pages": options.pages,
                "page_ns": [round(ns) for ns in bench.executor.page_ns],
                "ratio": [ratio, low, high],
                "better": better,
                "target": TARGET,
                "modes": result,
                **environment(),
            }
        )
    )


if __name__ == "__main__":
    main()
