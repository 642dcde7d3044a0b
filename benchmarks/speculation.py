"""What does prompt lookup gain where an answer repeats its prompt, and cost where it does not?

Method: one loaded model under two engines, one with drafts and one without, whose step loops this
process turns in its own thread. A pair is one request, alone, at one engine and then at the other,
in turns; its speed is that of the tokens after the first. *Extractive* prompts ask for a passage of
a text word for word, greedily; *free* ones ask for a story, an explanation or a letter, half of
them sampled. The ratio of speeds has its bootstrap interval over the pairs; beside it the ratio of
CPU time a token, which other processes disturb less. A pair's tokens must be equal, except where a
decision is closer than rounding: pairs that differ are counted.

Targets: at least 1.5x on extractive prompts, at least 0.97x on free text (the low ends).

    python benchmarks/speculation.py [--pairs 32] [--tokens 192] [--set weights.quantization=int8]

Ends in one JSON line.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))  # a checkout needs no installation

from benchmarks.turned import Turned
from jaxserve.bench.stats import environment, json_line, median, ratio_interval, table
from jaxserve.config import Config
from jaxserve.engine.load import load_parts
from jaxserve.protocol.messages import GetStatus, TokenEvents
from jaxserve.protocol.status import StepStats
from jaxserve.settings import load_config
from jaxserve.text.template import load_chat_template
from jaxserve.text.tokenizer import load_tokenizer
from jaxserve.types import SamplingParams
from jaxserve.weights.sources import resolve

ROOT = Path(__file__).resolve().parent.parent
TARGETS = {"extractive": 1.5, "free": 0.97}
REPEAT = "Repeat the following text word for word:\n\n"
FREE = (
    "Write a story about a lighthouse keeper.",
    "What is gravity? Explain it to a child.",
    "Give me ten tips for learning to cook.",
    "Describe the history of Rome.",
    "Write a poem about the sea.",
    "How does a computer work?",
    "Write a letter to my boss asking for a holiday.",
    "What would you do if you were a bird?",
)


@dataclass(kw_only=True)
class Run:
    """One request at one engine.

    Attributes:
        seconds: from the first token to the last.
        cpu_seconds: of this process meanwhile, all its threads.
    """

    tokens: list[int] = field(default_factory=list)
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    drafted: int = 0
    accepted: int = 0

    @property
    def tokens_per_s(self) -> float:
        """Of the tokens after the first."""
        return (len(self.tokens) - 1) / self.seconds


def run_alone(engine: Turned, prompt: list[int], sampling: SamplingParams) -> Run:
    """Serves one request, until the engine is idle."""
    engine.submit(prompt, sampling)
    run, first_ns, first_cpu_ns = Run(), 0, 0
    while not engine.is_idle:
        for message in engine.turn():
            if isinstance(message, TokenEvents):
                first_ns = first_ns or message.at_ns
                first_cpu_ns = first_cpu_ns or time.process_time_ns()
                for tokens in message.token_ids:
                    run.tokens += tokens
                    run.seconds = (message.at_ns - first_ns) / 1e9
            elif isinstance(message, StepStats):
                run.drafted += message.draft_tokens
                run.accepted += message.draft_accepted_tokens
    run.cpu_seconds = (time.process_time_ns() - first_cpu_ns) / 1e9
    return run


@dataclass(kw_only=True)
class Pairs:
    """Runs of one kind of prompt, with and without drafts."""

    kind: str
    on: list[Run] = field(default_factory=list)
    off: list[Run] = field(default_factory=list)

    def record(self) -> dict[str, Any]:
        """The figures."""
        pairs = list(zip(self.on, self.off, strict=True))
        ratio, low, high = ratio_interval(
            [run.tokens_per_s for run in self.on], [run.tokens_per_s for run in self.off]
        )
        cpu = ratio_interval(
            [run.cpu_seconds / len(run.tokens) for run in self.off],
            [run.cpu_seconds / len(run.tokens) for run in self.on],
        )
        return {
            "kind": self.kind,
            "pairs": len(pairs),
            "ratio": ratio,
            "low": low,
            "high": high,
            "cpu_ratio": cpu,
            "target": TARGETS[self.kind],
            "met": low >= TARGETS[self.kind],
            "different": sum(on.tokens != off.tokens for on, off in pairs),
            "tokens_per_s_on": median([run.tokens_per_s for run in self.on]),
            "tokens_per_s_off": median([run.tokens_per_s for run in self.off]),
            "drafted": sum(run.drafted for run in self.on),
            "accepted": sum(run.accepted for run in self.on),
            "tokens": sum(len(run.tokens) for run in self.on),
        }


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pairs", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=192)
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE")
    arguments = parser.parse_args()
    config = load_config(settings=["scheduler.max_rows=8", *arguments.set])
    report(config, measure(config, arguments.pairs, arguments.tokens))


def measure(config: Config, num_pairs: int, max_tokens: int) -> list[Pairs]:
    """Runs the pairs, those of all kinds in turns.

    Without a prefix cache: each engine would find pages that the other has written over.
    """
    cache = dataclasses.replace(config.cache, prefix=False)
    config = dataclasses.replace(config, cache=cache)
    path = resolve(config.model, config.weights, lambda *_: None)
    tokenizer, template = load_tokenizer(path), load_chat_template(path)
    assert template is not None, f"{path} has no chat template"
    parts = load_parts(config, lambda *_: None)

    def chat(text: str) -> list[int]:
        rendered = template.render([{"role": "user", "content": text}])
        return tokenizer.encode(rendered, add_special_tokens=False)

    arms = {}
    for name, draft_tokens in (("on", config.scheduler.draft_tokens), ("off", 0)):
        scheduler = dataclasses.replace(config.scheduler, draft_tokens=draft_tokens)
        own = dataclasses.replace(config, scheduler=scheduler)
        arms[name] = Turned(own, parts, GetStatus(stats=True))
    prompts = {
        "extractive": [chat(REPEAT + text) for text in passages()],
        "free": [chat(question) for question in FREE],
    }
    all_pairs = {kind: Pairs(kind=kind) for kind in prompts}
    for number in range(-1, num_pairs):  # the first warms up
        for kind, pairs in all_pairs.items():
            prompt = prompts[kind][number % len(prompts[kind])]
            sampled = kind == "free" and number % 2
            sampling = SamplingParams(
                max_tokens=max_tokens, temperature=0.8 if sampled else 0.0, seed=number + 1
            )
            for name in ("on", "off") if number % 2 else ("off", "on"):
                run = run_alone(arms[name], prompt, sampling)
                if number >= 0:
                    getattr(pairs, name).append(run)
    return list(all_pairs.values())


def passages() -> list[str]:
    """Paragraphs of "Alice in Wonderland", of middle length."""
    text = (ROOT / "tests" / "data" / "alice.txt").read_text(encoding="utf-8")
    paragraphs = (" ".join(part.split()) for part in text.split("\n\n"))
    return [part for part in paragraphs if 300 < len(part) < 1400]


def report(config: Config, all_pairs: list[Pairs]) -> None:
    """The table, and the line."""
    records = [pairs.record() for pairs in all_pairs]
    header = ["prompts", "on / off", "95% interval", "target", "CPU off / on", "95% interval"]
    header += ["tokens/s on", "off", "accepted", "pairs that differ"]
    rows = [
        [
            str(r["kind"]),
            f"{r['ratio']:.2f}",
            f"{r['low']:.2f} to {r['high']:.2f}",
            f"{r['target']}",
            f"{r['cpu_ratio'][0]:.2f}",
            f"{r['cpu_ratio'][1]:.2f} to {r['cpu_ratio'][2]:.2f}",
            f"{r['tokens_per_s_on']:.1f}",
            f"{r['tokens_per_s_off']:.1f}",
            f"{r['accepted']} of {r['drafted']}",
            f"{r['different']} of {r['pairs']}",
        ]
        for r in records
    ]
    print(table(header, rows))
    record = {"benchmark": "speculation", **environment(), "config": config, "cases": records}
    print(json_line(record))


if __name__ == "__main__":
    main()
