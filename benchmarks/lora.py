"""What do LoRA adapters cost: those who do not use them, and those who do?

Method, in one process, arms interleaved: two engines with one model (the embedded one, unless
settings say another), one with slots for adapters and one without. A run decodes `--rows` sequences
side by side; what is compared is CPU time of the process (all threads) a step, since on a shared
machine wall time differs between runs by more than any target (it is told, too). Four arms:

    off         no adapters at all
    base        slots for adapters, used by nobody
    one         all rows with one adapter of rank `--rank`
    mixed       rows dealt out over `--adapters` adapters of that rank, on every linear layer

Targets: `base` loses at most 1% against `off`; `mixed` at most 8% beyond the time in which the
bytes of its adapters can be read, by all cores at the bandwidth measured in the same process.
Ratios are of medians, with bootstrap 95% intervals over the rounds.

Then, with `--registered` adapters over the same slots, requests that pick one at random (by Zipf's
law): how many found theirs in a slot, how many were dropped, and what was compiled: neither.

    python benchmarks/lora.py [--rounds 30] [--rows 32] [--tokens 16] [--plot docs/lora]
        [--set SECTION.KEY=VALUE …]

Ends in one JSON line.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))  # a checkout needs no installation

from jaxserve.bench.plot import grouped_bars
from jaxserve.bench.roofline import Roofline
from jaxserve.bench.stats import environment, json_line, median, ratio_interval, table
from jaxserve.config import Config, LoraConfig
from jaxserve.engine.load import load_parts
from jaxserve.engine.thread import EngineThread
from jaxserve.formats.peft import Adapter, LoraModule, adapter_digest, write_adapter
from jaxserve.formats.peft_config import PeftConfig
from jaxserve.protocol.client import SyncClient
from jaxserve.protocol.messages import AdapterRef
from jaxserve.settings import load_config
from jaxserve.types import SamplingParams

ARMS = ("off", "base", "one", "mixed")
PROMPT_TOKENS = 2
#: A machine that others use, too, may take long for a step.
SILENCE_S = 3600.0


class Arm:
    """An engine in a thread, and its client."""

    def __init__(self, config: Config) -> None:
        self.engine = EngineThread(config, load_parts)
        self.client = SyncClient(self.engine.connect(), silence_s=SILENCE_S)
        self.client.start()
        self.client.ready()

    def decode_s(
        self, adapters: Sequence[AdapterRef | None], num_tokens: int
    ) -> tuple[float, float]:
        """CPU seconds, and those on the clock, of one sequence for each of these."""
        begin, begin_s = time.process_time(), time.monotonic()
        sampling = SamplingParams(max_tokens=num_tokens, seed=0, temperature=0.0, ignore_eos=True)
        streams = [
            self.client.submit([1 + row] * PROMPT_TOKENS, sampling, adapter=adapter)
            for row, adapter in enumerate(adapters)
        ]
        for stream in streams:
            assert sum(len(event.token_ids) for event in stream) == num_tokens
        return time.process_time() - begin, time.monotonic() - begin_s

    def close(self) -> None:
        """Ends the engine."""
        self.client.close()
        self.engine.close()


def make_adapters(
    directory: Path, targets: dict[str, tuple[int, int]], rank: int, number: int
) -> list[AdapterRef]:
    """Random ones on every linear layer, small enough to leave the text a text."""
    rng = np.random.default_rng(0)
    config = PeftConfig(
        rank=rank,
        alpha=float(rank),
        target_modules=tuple(sorted({name.rsplit(".", 1)[-1] for name in targets})),
    )
    shared = {
        name: (rng.normal(size=(rank, inputs)) / np.sqrt(inputs)).astype(np.float32)
        for name, (inputs, _) in targets.items()
    }
    refs = []
    for place in range(number):
        modules = {
            name: LoraModule(
                a=shared[name],
                b=np.full((outputs, rank), 1e-3 * (1 + place / number), np.float32),
                scale=1.0,
            )
            for name, (_, outputs) in targets.items()
        }
        path = directory / str(place)
        write_adapter(path, Adapter(config=config, modules=modules))
        refs.append(AdapterRef(key=adapter_digest(path), path=str(path)))
    return refs


def measure(
    arms: dict[str, Arm], loads: dict[str, list[AdapterRef | None]], rounds: int, num_tokens: int
) -> dict[str, list[tuple[float, float]]]:
    """CPU and other seconds of each round, by arm; the first round warms up."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in ARMS}
    for turn in range(rounds + 1):
        order = ARMS[turn % len(ARMS) :] + ARMS[: turn % len(ARMS)]
        for name in order:
            engine = arms["off" if name == "off" else "on"]
            took_s = engine.decode_s(loads[name], num_tokens)
            if turn:
                seconds[name].append(took_s)
    return seconds


def churn(arm: Arm, refs: list[AdapterRef], num_requests: int, rows: int) -> dict[str, float]:
    """Random traffic over all adapters, so many requests at a time."""
    rng = random.Random(0)
    weights = [1 / (1 + place) for place in range(len(refs))]
    before, begin_s = arm.client.get_status(), time.monotonic()
    sampling = SamplingParams(max_tokens=4, seed=0, temperature=0.0, ignore_eos=True)
    dropped = 0
    for start in range(0, num_requests, rows):
        chosen = rng.choices(refs, weights, k=min(rows, num_requests - start))
        streams = [arm.client.submit([5] * 8, sampling, adapter=ref) for ref in chosen]
        for stream in streams:
            tokens = [token for event in stream for token in event.token_ids]
            dropped += len(tokens) != sampling.max_tokens
    after = arm.client.get_status()
    joins = after.adapter_joins - before.adapter_joins
    return {
        "requests": num_requests,
        "dropped": dropped,
        "compiled": after.compiles_after_warmup - before.compiles_after_warmup,
        "hit_rate": (after.adapter_hits - before.adapter_hits) / max(joins, 1),
        "loads": after.adapter_loads - before.adapter_loads,
        "requests_per_s": num_requests / (time.monotonic() - begin_s),
    }


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--registered", type=int, default=1000)
    parser.add_argument("--requests", type=int, default=400)
    parser.add_argument("--plot", type=Path, help="a directory for lora.svg")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE")
    return parser.parse_args(arguments)


def main() -> int:
    """Measures, prints, returns the exit status."""
    args = parse()
    settings = [
        "cache.prefix=false",
        f"cache.memory_bytes={512 << 20}",
        "cache.host_bytes=0",
        f"scheduler.max_rows={args.rows}",
        f"scheduler.max_step_tokens={max(512, args.rows * PROMPT_TOKENS)}",
        "scheduler.draft_tokens=0",
    ]
    config = load_config(settings=[*settings, *args.set])
    lora = LoraConfig(enabled=True, classes=(f"{args.rank}x{args.adapters}",))
    arms = {"off": Arm(config), "on": Arm(dataclasses.replace(config, lora=lora))}
    with tempfile.TemporaryDirectory() as directory:
        model = arms["on"].client.ready().model
        assert model is not None and model.adapters is not None
        refs = make_adapters(Path(directory), model.adapters.targets(), args.rank, args.adapters)
        dealt = [refs[row % args.adapters] for row in range(args.rows)]
        nobody: list[AdapterRef | None] = [None] * args.rows
        loads = {"off": nobody, "base": nobody, "one": [refs[0]] * args.rows, "mixed": dealt}
        adapter_bytes = args.rank * 4 * sum(map(sum, model.adapters.targets().values()))
        roofline = Roofline()
        for _ in range(3):
            roofline.measure()
        before = arms["on"].client.get_status().compiles_after_warmup
        seconds = measure(arms, loads, args.rounds, args.tokens)  # pyright: ignore[reportArgumentType]
        report = told(args, seconds, adapter_bytes, max(roofline.bandwidths))
        if args.registered:
            # Tiny files, of rank 4 on one module, so that a thousand of them fit anywhere.
            few = {n: s for n, s in model.adapters.targets().items() if ".0.self_attn.q_" in n}
            many = make_adapters(Path(directory) / "many", few, 4, args.registered)
            report["churn"] = churn(arms["on"], many, args.requests, args.rows)
            print("\n" + ", ".join(f"{k} {v:g}" for k, v in report["churn"].items()))
        report["compiled"] = arms["on"].client.get_status().compiles_after_warmup - before
    for arm in arms.values():
        arm.close()
    if args.plot is not None:
        args.plot.mkdir(parents=True, exist_ok=True)
        (args.plot / "lora.svg").write_text(plot(args, model.name, report), encoding="utf-8")
    print(
        json_line(
            {"benchmark": "lora", **environment(), "rows": args.rows, "rank": args.rank, **report}
        )
    )
    return 0


def told(
    args: argparse.Namespace,
    seconds: dict[str, list[tuple[float, float]]],
    adapter_bytes: int,
    bytes_per_s: float,
) -> dict:
    """Prints the table; returns the figures."""
    steps, cores = args.tokens, len(os.sched_getaffinity(0))
    read_s = {"one": 1, "mixed": args.adapters}
    figures: dict[str, dict[str, float | bool]] = {}
    rows = []
    for name in ARMS:
        own, off = [cpu for cpu, _ in seconds[name]], [cpu for cpu, _ in seconds["off"]]
        wall_s = median([wall for _, wall in seconds[name]])
        step_ms = 1e3 * median(own) / steps
        bound_ms = 1e3 * cores * read_s.get(name, 0) * adapter_bytes / bytes_per_s
        ratio, low, high = ratio_interval(own, off)
        allowed = [cpu + steps * bound_ms / 1e3 for cpu in off]
        beyond = ratio_interval(own, allowed)
        figures[name] = {
            "tokens_per_s": args.rows * steps / wall_s,
            "step_ms": step_ms,
            "bound_ms": bound_ms,
            "ratio": ratio,
            "low": low,
            "high": high,
            "beyond_bound": beyond[0],
            "beyond_low": beyond[1],
            "beyond_high": beyond[2],
        }
        rows.append(
            [
                name,
                f"{args.rows * steps / wall_s:.0f}",
                f"{step_ms:.1f}",
                f"{bound_ms:.1f}",
                f"{ratio:.3f} ({low:.3f}–{high:.3f})",
                f"{beyond[0]:.3f} ({beyond[1]:.3f}–{beyond[2]:.3f})",
            ]
        )
    header = ["arm", "tokens/s", "step CPU ms", "bytes ms", "time / off", "time / (off + bytes)"]
    print(table(header, rows))
    return {
        "arms": figures,
        "adapter_bytes": adapter_bytes,
        "bytes_per_s": bytes_per_s,
        "base_met": figures["base"]["high"] <= 1.01,
        "mixed_met": figures["mixed"]["beyond_high"] <= 1.08,
    }


def plot(args: argparse.Namespace, model: str, report: dict) -> str:
    """CPU time by arm."""
    return grouped_bars(
        f"{args.rows} sequences decoding side by side, {model} on this CPU",
        ["no adapters", "slots, unused", "1 adapter", f"{args.adapters} adapters"],
        [(f"rank {args.rank}", [report["arms"][name]["step_ms"] for name in ARMS])],
        "CPU time of a decode step, ms, all threads",
    )


if __name__ == "__main__":
    sys.exit(main())
