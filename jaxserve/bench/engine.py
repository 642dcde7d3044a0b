"""`jaxserve bench engine`: how fast is the engine itself, without HTTP and other processes?

Question: prefill and decode throughput by number of concurrent sequences, and how near that is to
what the machine can do. Method: the real scheduler, batch builder and executor, their loop turned
by this module in one thread. A *decode* case lets `rows` sequences in, waits until each has its
first token, and counts the tokens of the next `steps` decode steps while all of them run. A
*prefill* case is the time from a prompt's arrival to its first token in an idle engine. Cases are
interleaved: each repeat runs every case once, and measures the machine's read bandwidth and
matmul peak. MBU and MFU divide the bytes and FLOPs that the model declares by those. Nothing is
drafted (`scheduler.draft_tokens` is 0): how well random text foretells itself is no property of
the engine; `benchmarks/speculation.py` measures drafts.

Command: `python -m jaxserve bench engine --rows 1,8,32 --repeats 5`
"""

from __future__ import annotations

import argparse
import dataclasses
import resource
import sys
import time
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from jaxserve.bench import stats
from jaxserve.bench.roofline import Roofline
from jaxserve.config import Config
from jaxserve.engine.loop import Engine
from jaxserve.engine.parts import Factory
from jaxserve.engine.process import build_engine
from jaxserve.errors import ConfigError, JaxserveError
from jaxserve.protocol.messages import (
    Cancel,
    ClientMessage,
    EngineMessage,
    GetStatus,
    Submit,
    TokenEvents,
    TokenSegment,
)
from jaxserve.protocol.status import StepStats
from jaxserve.settings import without_secrets
from jaxserve.types import FinishReason, SamplingParams

CLIENT = "bench"


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What is measured: "decode" with `rows` sequences from position `context`, or "prefill" of a
    prompt of `context` tokens."""

    kind: str
    rows: int
    context: int

    @property
    def name(self) -> str:
        """Short name for the table."""
        return f"prefill {self.context}" if self.kind == "prefill" else f"decode {self.rows}"


@dataclass(slots=True, kw_only=True)
class Sample:
    """One run of a case.

    Attributes:
        device_ns: the time the device was busy in it.
        step_ms: wall time of each decode step.
        outputs: all tokens that the first sequence got.
    """

    tokens: int = 0
    seconds: float = 0.0
    flops: int = 0
    bytes: int = 0
    device_ns: int = 0
    step_ms: list[float] = field(default_factory=list)
    outputs: list[int] = field(default_factory=list)

    @property
    def tokens_per_s(self) -> float:
        """Throughput of the run."""
        return self.tokens / self.seconds


class BenchServer:
    """A transport whose one client is this module: messages wait in lists."""

    def __init__(self) -> None:
        self.inbox: list[ClientMessage] = []
        self.outbox: list[EngineMessage] = []

    def receive(self, timeout_s: float) -> list[tuple[Hashable, ClientMessage] | tuple[None, None]]:
        """What the benchmark asked for since the last call; never waits."""
        arrived, self.inbox = self.inbox, []
        return [(CLIENT, message) for message in arrived]

    def send(self, client: Hashable, message: EngineMessage) -> None:
        """Keeps the message."""
        self.outbox.append(message)

    def close(self) -> None:
        """Nothing to let go of."""


class EngineBench:
    """Runs cases on a loaded engine, without a prefix cache: every token is to be computed.

    Args:
        factory: loads the model (`engine.load.load_parts`, or a fake).
    """

    def __init__(self, config: Config, factory: Factory) -> None:
        scheduler = dataclasses.replace(config.scheduler, draft_tokens=0)
        config = dataclasses.replace(config, scheduler=scheduler)
        self.server = BenchServer()
        config = dataclasses.replace(config, cache=dataclasses.replace(config.cache, prefix=False))
        self.config = config
        parts = factory(config, _print_progress)
        self.model = parts.model
        self.engine: Engine = build_engine(config, self.server, parts)
        self.server.inbox.append(GetStatus(stats=True))
        self._random = np.random.default_rng(0)
        self._next_id = 0

    def run(self, case: Case, steps: int, prompts: list[list[int]] | None = None) -> Sample:
        """One run of a case; the engine is idle before and after.

        Args:
            prompts: one for each row, of `case.context` tokens; random ones where None.
        """
        prompts = prompts or self._random_prompts(case)
        if case.kind == "prefill":
            sample = self._prefill(prompts[0])
        else:
            sample = self._decode(prompts, steps)
        self._finish_all()
        return sample

    def _prefill(self, prompt: list[int]) -> Sample:
        start_ns = time.monotonic_ns()
        (sequence_id,) = self._submit([prompt], max_tokens=1)
        sample = Sample(tokens=len(prompt))
        while sample.seconds == 0.0:
            for message in self._turn():
                if isinstance(message, TokenEvents) and sequence_id in message.sequence_ids:
                    sample.seconds = (message.at_ns - start_ns) / 1e9
                    sample.outputs += message.token_ids[0]
                elif isinstance(message, StepStats):
                    _add_work(sample, message)
        return sample

    def _decode(self, prompts: list[list[int]], steps: int) -> Sample:
        # Enough to go on while the last of them are still computing their prompts, and to the end.
        rows, room = len(prompts), self.model.max_context - len(prompts[0])
        sequence_ids = self._submit(prompts, max_tokens=min(room, 2 * steps + 8 * rows + 64))
        waiting = set(sequence_ids)
        sample = Sample()
        start_ns = last_ns = 0
        while sample.tokens < rows * steps:
            for message in self._turn():
                if isinstance(message, TokenEvents):
                    if message.finished:
                        raise ConfigError(
                            f"a sequence ended before {rows} x {steps} tokens were measured: "
                            f"{message.finished[0].error or message.finished[0].reason}"
                        )
                    if sequence_ids[0] in message.sequence_ids:
                        place = message.sequence_ids.index(sequence_ids[0])
                        sample.outputs += message.token_ids[place]
                    if start_ns:
                        brought = sum(map(len, message.token_ids))
                        sample.tokens += brought
                        per_row = max(1, brought // rows)
                        sample.step_ms.append((message.at_ns - last_ns) / 1e6 / per_row)
                        sample.seconds = (message.at_ns - start_ns) / 1e9
                    waiting.difference_update(message.sequence_ids)
                    if not waiting and not start_ns:
                        start_ns = message.at_ns
                    last_ns = message.at_ns
                elif isinstance(message, StepStats) and sample.tokens:
                    _add_work(sample, message)
        return sample

    def _random_prompts(self, case: Case) -> list[list[int]]:
        low = min(self.model.vocab_size // 2, 256)  # special and byte tokens often come first
        shape = (case.rows, case.context)
        return self._random.integers(low, self.model.vocab_size, shape).tolist()

    def _submit(self, prompts: list[list[int]], max_tokens: int) -> list[int]:
        """A greedy sequence for each prompt; returns their ids."""
        sampling = SamplingParams(max_tokens=max_tokens, seed=0, temperature=0.0, ignore_eos=True)
        sequence_ids = list(range(self._next_id, self._next_id + len(prompts)))
        self._next_id += len(prompts)
        for sequence_id, prompt in zip(sequence_ids, prompts, strict=True):
            self.server.inbox.append(
                Submit(
                    sequence_ids=[sequence_id],
                    prompt=[TokenSegment(token_ids=prompt)],
                    sampling=sampling,
                    arrived_ns=time.monotonic_ns(),
                )
            )
        return sequence_ids

    def _turn(self) -> list[EngineMessage]:
        """One turn of the step loop, and what it brought."""
        self.engine.receive(0.0)
        self.engine.step()
        messages, self.server.outbox = self.server.outbox, []
        return messages

    def _finish_all(self) -> None:
        everything = list(range(self._next_id))
        self.server.inbox.append(Cancel(sequence_ids=everything, reason=FinishReason.STOP))
        self._turn()
        while self.engine.in_flight is not None or self.engine.scheduler.has_work:
            self._turn()


def measure(config: Config, factory: Factory, cases: list[Case], steps: int, repeats: int) -> dict:
    """Runs all cases `repeats` times, interleaved, and returns the record for the JSON line."""
    roofline = Roofline()
    started = time.monotonic()
    bench = EngineBench(config, factory)
    load_s = time.monotonic() - started
    for case in cases:
        bench.run(case, steps)
    samples: dict[Case, list[Sample]] = {case: [] for case in cases}
    for _ in range(repeats):
        roofline.measure()
        for case in cases:
            samples[case].append(bench.run(case, steps))
    bandwidth, peak = stats.median(roofline.bandwidths), stats.median(roofline.peaks)
    device = jax.devices()[0]
    return {
        "benchmark": "engine",
        **stats.environment(),
        "jax": jax.__version__,
        "device": f"{jax.device_count()} x {device.device_kind} ({device.platform})",
        "model": bench.model.name,
        "config": without_secrets(bench.config),
        "load_and_compile_s": load_s,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "read_bytes_per_s": bandwidth,
        "matmul_flops_per_s": peak,
        "compiles_after_warmup": bench.engine.executor.compiles_after_warmup,
        "cases": [_report(case, runs, bandwidth, peak) for case, runs in samples.items()],
    }


def main(arguments: argparse.Namespace, config: Config, factory: Factory | None = None) -> int:
    """The subcommand; returns its exit status. `factory` is `engine.load.load_parts` where None."""
    if factory is None:
        from jaxserve.engine.load import load_parts
        from jaxserve.weights.sources import resolve

        path = resolve(config.model, config.weights, _print_progress)
        name = config.model.served_name or config.model.path
        model = dataclasses.replace(config.model, path=str(path), served_name=name)
        config, factory = dataclasses.replace(config, model=model), load_parts
    rows = sorted({int(word) for word in arguments.rows.split(",")})
    if rows[-1] > config.scheduler.max_rows:
        raise ConfigError(
            f"--rows {rows[-1]} is more than scheduler.max_rows ({config.scheduler.max_rows}): "
            f"add --set scheduler.max_rows={rows[-1]}"
        )
    cases = [Case(kind="decode", rows=n, context=arguments.context) for n in rows]
    cases.append(Case(kind="prefill", rows=1, context=arguments.prefill))
    try:
        record = measure(config, factory, cases, arguments.steps, arguments.repeats)
    except JaxserveError as error:
        print(f"jaxserve bench: {error.message}", file=sys.stderr)
        return 1
    print(_render(record), file=sys.stderr)
    print(stats.json_line(record))
    return 0


def _add_work(sample: Sample, message: StepStats) -> None:
    sample.flops += message.flops
    sample.bytes += message.bytes
    sample.device_ns += message.device_ns


def _report(case: Case, runs: list[Sample], bandwidth: float, peak: float) -> dict[str, Any]:
    step_ms = [value for run in runs for value in run.step_ms]
    return {
        "name": case.name,
        "kind": case.kind,
        "rows": case.rows,
        "context": case.context,
        "tokens_per_s": stats.median([run.tokens_per_s for run in runs]),
        "tokens_per_s_runs": [run.tokens_per_s for run in runs],
        "step_ms_p50": stats.percentile(step_ms, 50),
        "step_ms_p99": stats.percentile(step_ms, 99),
        "mbu": stats.median([run.bytes / run.seconds for run in runs]) / bandwidth,
        "mfu": stats.median([run.flops / run.seconds for run in runs]) / peak,
        "device_busy": stats.median([run.device_ns / 1e9 / run.seconds for run in runs]),
    }


def _render(record: dict[str, Any]) -> str:
    rows = [
        [
            case["name"],
            f"{case['tokens_per_s']:.1f}",
            f"{min(case['tokens_per_s_runs']):.1f}-{max(case['tokens_per_s_runs']):.1f}",
            "-" if case["kind"] == "prefill" else f"{case['step_ms_p50']:.1f}",
            "-" if case["kind"] == "prefill" else f"{case['step_ms_p99']:.1f}",
            f"{case['mbu']:.0%}",
            f"{case['mfu']:.0%}",
        ]
        for case in record["cases"]
    ]
    header = ["case", "tokens/s", "range", "step p50 ms", "p99 ms", "MBU", "MFU"]
    limits = (
        f"{record['model']} on {record['device']}; measured limits: "
        f"{record['read_bytes_per_s'] / 1e9:.1f} GB/s read, "
        f"{record['matmul_flops_per_s'] / 1e9:.0f} GFLOP/s"
    )
    return f"{limits}\n{stats.table(header, rows)}"


def _print_progress(phase: str, done: int, total: int) -> None:
    print(
        f"\r{phase} {done}/{total}", end="" if done < total else "\n", file=sys.stderr, flush=True
    )
