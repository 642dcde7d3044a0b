"""What does holding output to a grammar cost, beside the same rows without one?

Method: one loaded model under engines whose step loops this process turns in its own thread.

*Step time.* A batch of rows that decode free text, and one whose rows all (or of which half) match
JSON schemas that do not end, run eight steps each in turns (`windows`). The ratio of their times is
the median over those pairs, with its bootstrap interval, beside it that of CPU time. Free rows run
`scheduler.decode_steps` steps in one call, as they are served.

*Masks.* Real-world schemas (tests/data/maskbench.jsonl): each valid instance is walked token by
token, and the mask of every place is made by one thread and timed.

*Forced tokens.* One row, alone, fills in a schema of long names, with and without drafts.

*Host.* The same rows over a device that computes nothing and takes an allowed token: CPU time of
the engine's thread a row and step, without grammars, with them, and with free text that is watched
for the opening of a tool's call (`tool_choice: auto`).

Targets: at 32 rows, all constrained, at most 1.02 times the time a token (the high end); 500 µs
for 99 of 100 masks.

    python benchmarks/structured.py [--batches 20] [--tokens 48] [--plot docs/structured.svg]

Ends in one JSON line.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))  # a checkout needs no installation

from benchmarks.decoded import Completed, complete, decode
from benchmarks.no_device import MODEL, AllowedTokens
from benchmarks.turned import Turned
from benchmarks.windows import WINDOW, compare
from jaxserve.bench.plot import grouped_bars
from jaxserve.bench.stats import (
    environment,
    json_line,
    median,
    pair_ratio_interval,
    ratio_interval,
    summary,
    table,
)
from jaxserve.config import Config
from jaxserve.engine.batches import Batches
from jaxserve.engine.load import load_parts
from jaxserve.engine.parts import Parts
from jaxserve.errors import GrammarError
from jaxserve.protocol.messages import GetStatus, UseVocabulary
from jaxserve.settings import load_config
from jaxserve.structured import grammars
from jaxserve.structured.matcher import compile_grammar
from jaxserve.structured.table import token_table
from jaxserve.text.template import load_chat_template
from jaxserve.text.tokenizer import Tokenizer, load_tokenizer
from jaxserve.text.tools.call_grammar import call_grammar
from jaxserve.text.tools.hermes import HERMES
from jaxserve.text.tools.tool import Tool, Toolbox
from jaxserve.text.vocabulary import vocabulary_of
from jaxserve.types import Grammar, ModelInfo, SamplingParams
from jaxserve.weights.sources import resolve
from tests.fakes.batch import DoublingShapes

ROOT = Path(__file__).resolve().parent.parent
SCHEMAS = ROOT / "tests" / "data" / "maskbench.jsonl"
RATIO_LIMIT, MASK_LIMIT_US = 1.02, 500.0
ROWS = (1, 8, 32)
FIELDS = ("name", "city", "occupation", "favourite_colour", "street", "nickname", "pet", "hobby")


def people(index: int) -> Grammar:
    """An array of objects that is longer than any run."""
    item = {
        "type": "object",
        "properties": {
            FIELDS[index % len(FIELDS)]: {"type": "string"},
            "age": {"type": "integer"},
            "married": {"type": "boolean"},
        },
        "additionalProperties": False,
    }
    item["required"] = list(item["properties"])
    schema = {"type": "array", "items": item, "minItems": 1000}
    return grammars.json_schema(schema, whitespace=False)


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--batches", type=int, default=20, help="of each size")
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS))
    parser.add_argument("--shares", type=float, nargs="+", default=[1.0, 0.5])
    parser.add_argument("--plot", default="")
    parser.add_argument("--only", default="", help="steps, masks, forced or host")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE")
    arguments = parser.parse_args()
    settings = ["scheduler.max_rows=32", "cache.prefix=false", *arguments.set]
    config = load_config(settings=settings)
    path = resolve(config.model, config.weights, lambda *_: None)
    tokenizer, template = load_tokenizer(path), load_chat_template(path)
    assert template is not None, f"{path} has no chat template"
    question = [{"role": "user", "content": "Write a list of people as JSON."}]
    prompt = tokenizer.encode(template.render(question), add_special_tokens=False)
    record: dict[str, Any] = {}
    wanted = (arguments.only or "masks host steps forced").split()
    if "masks" in wanted:
        record["masks_us"] = masks(tokenizer, config)
    if "host" in wanted:
        record["host"] = host(config, tokenizer, prompt, arguments.tokens)
    if {"steps", "forced"} & set(wanted):
        parts = load_parts(config, lambda *_: None)
        plain = arm(config, parts, tokenizer, drafts=False)
        if "forced" in wanted:
            arms = {"plain": plain, "drafts": arm(config, parts, tokenizer, drafts=True)}
            record["forced"] = forced(arms, prompt, max(arguments.batches // 2, 3))
        if "steps" in wanted:
            other = arm(config, load_parts(config, lambda *_: None), tokenizer, drafts=False)
            record["steps"] = [
                steps((plain, other), prompt, rows, share, arguments.batches, arguments.tokens)
                for rows in arguments.rows
                for share in arguments.shares
                if rows * share >= 1
            ]
    report(record, arguments.plot)
    print(json_line({"benchmark": "structured", **environment(), "config": config, **record}))


def arm(config: Config, parts: Parts, tokenizer: Tokenizer, *, drafts: bool) -> Turned:
    """An engine that drafts or does not."""
    if not drafts:
        scheduler = dataclasses.replace(config.scheduler, draft_tokens=0)
        config = dataclasses.replace(config, scheduler=scheduler)
    return turned(config, parts, tokenizer)


def turned(config: Config, parts: Parts, tokenizer: Tokenizer) -> Turned:
    """An engine that tells its steps and knows what tokens say."""
    vocabulary = UseVocabulary(vocabulary=vocabulary_of(tokenizer))
    return Turned(config, parts, GetStatus(stats=True), vocabulary)


def steps(
    engines: tuple[Turned, Turned],
    prompt: list[int],
    num_rows: int,
    share: float,
    num_batches: int,
    num_tokens: int,
) -> dict[str, Any]:
    """Windows of one size of batch, of whose rows this share is constrained."""
    on, off = compare(
        engines,
        prompt,
        (_rows(num_rows, share, num_tokens), _rows(num_rows, 0, num_tokens)),
        num_batches=num_batches,
        num_windows=num_tokens // WINDOW,
    )
    return {
        "rows": num_rows,
        "constrained": share,
        "windows": len(on),
        "step_ms": median([d.step_ns for d in on]) / 1e6,
        "step_ms_free": median([d.step_ns for d in off]) / 1e6,
        "ratio": pair_ratio_interval([d.step_ns for d in on], [d.step_ns for d in off]),
        "cpu_ratio": pair_ratio_interval([d.cpu_ns for d in on], [d.cpu_ns for d in off]),
    }


def _rows(num_rows: int, share: float, num_tokens: int) -> list[SamplingParams]:
    """Rows of which this share is constrained, and which go on beyond so many tokens."""
    return [
        SamplingParams(
            max_tokens=num_tokens + 5 * WINDOW,  # begun before the first window
            seed=row,
            temperature=0.7,
            ignore_eos=not (held := row < share * num_rows),
            grammar=people(row) if held else None,
        )
        for row in range(num_rows)
    ]


def masks(tokenizer: Tokenizer, config: Config) -> dict[str, Any]:
    """Microseconds of a mask, and of compiling, over real schemas and their instances."""
    ends = tokenizer.eos_token_ids
    size = tokenizer.vocab_size
    table_ = token_table(vocabulary_of(tokenizer), size, ends)
    mask = np.zeros(-(-size // 32), np.uint32)
    mask_us: list[float] = []
    compile_us: list[float] = []
    for line in SCHEMAS.read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        grammar = grammars.json_schema(entry["schema"])
        begun_ns = time.perf_counter_ns()
        try:
            compiled = compile_grammar(grammar, table_, config.structured, size)
        except GrammarError:
            continue
        compile_us.append((time.perf_counter_ns() - begun_ns) / 1e3)
        for test in entry["tests"]:
            if test["valid"]:
                matcher = compiled.matcher().ll
                text = json.dumps(test["data"], indent=None, ensure_ascii=False)
                for token in tokenizer.encode(text, add_special_tokens=False)[:400]:
                    begun_ns = time.perf_counter_ns()
                    matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
                    mask_us.append((time.perf_counter_ns() - begun_ns) / 1e3)
                    if not matcher.consume_token(token):
                        break
    return {"schemas": len(compile_us), "mask": summary(mask_us), "compile": summary(compile_us)}


def forced(arms: dict[str, Turned], prompt: list[int], num_pairs: int) -> dict[str, Any]:
    """One row that fills in long names, with drafts and without."""
    names = [f"{word}_of_the_applicant_at_the_time" for word in ("residence", "age", "married")]
    kinds: list[dict[str, Any]] = [
        {"enum": ["Paris", "Rome"]},
        {"type": "integer"},
        {"type": "boolean"},
    ]
    schema = {
        "type": "object",
        "properties": dict(zip(names, kinds, strict=True)),
        "required": names,
        "additionalProperties": False,
    }
    grammar = grammars.json_schema(schema, whitespace=False)
    found: dict[str, list[Completed]] = {name: [] for name in arms}
    for number in range(-1, num_pairs):
        sampling = SamplingParams(max_tokens=120, seed=number + 1, temperature=0.7, grammar=grammar)
        for name in arms if number % 2 else reversed(arms):
            run = complete(arms[name], prompt, sampling)
            if number >= 0:
                found[name].append(run)
    return {
        "ratio": ratio_interval(
            [run.seconds / run.tokens for run in found["drafts"]],
            [run.seconds / run.tokens for run in found["plain"]],
        ),
        "calls": {name: median([run.calls for run in runs]) for name, runs in found.items()},
        "tokens": median([run.tokens for run in found["plain"]]),
    }


def host(
    config: Config, tokenizer: Tokenizer, prompt: list[int], num_tokens: int
) -> dict[str, Any]:
    """CPU microseconds a row and step, without a device."""
    model: ModelInfo = dataclasses.replace(
        MODEL, vocab_size=tokenizer.vocab_size, eos_token_ids=tokenizer.eos_token_ids
    )
    scheduler = dataclasses.replace(config.scheduler, draft_tokens=0, decode_steps=1)
    config = dataclasses.replace(config, scheduler=scheduler)
    rows, found = config.scheduler.max_rows, {}
    for name, grammar in _host_arms():
        parts = Parts(
            model=model,
            batch=Batches(DoublingShapes(), rows),
            executor=AllowedTokens(),
            page_size=16,
            num_pages=(4096,),
        )
        engine = turned(config, parts, tokenizer)
        samplings = [
            SamplingParams(
                max_tokens=num_tokens,
                seed=row,
                grammar=grammar(row) if grammar else None,
                ignore_eos=grammar is None,
            )
            for row in range(rows)
        ]
        decode(engine, [prompt] * rows, samplings)
        runs = [decode(engine, [prompt] * rows, samplings) for _ in range(5)]
        found[name] = {
            "cpu_us": min(run.cpu_ns for run in runs) / rows / 1e3,
            "wall_us": min(run.step_ns for run in runs) / rows / 1e3,
        }
    return found


def _host_arms() -> list[tuple[str, Callable[[int], Grammar] | None]]:
    tools = [
        Tool(name=f"tool_{name}", parameters={"type": "object", "properties": {name: {}}})
        for name in FIELDS
    ]
    toolbox = Toolbox(tools=tools, callable=frozenset(tool.name for tool in tools))
    auto = call_grammar(HERMES, toolbox, special_tokens={})
    return [("free", None), ("constrained", people), ("tools, auto", lambda _: auto)]


def report(record: dict[str, Any], plot: str) -> None:
    """Tables, and the plot where it is wanted."""
    if "masks_us" in record:
        found = record["masks_us"]
        header = ["µs", "p50", "p90", "p99", "max", "limit of p99"]
        rows = [
            [f"a {name}", *(f"{found[name][k]:.0f}" for k in ("p50", "p90", "p99", "max")), limit]
            for name, limit in (("mask", f"{MASK_LIMIT_US:.0f}"), ("compile", ""))
        ]
        print(f"{found['schemas']} schemas\n\n{table(header, rows)}\n")
    if "host" in record:
        rows = [
            [name, f"{v['cpu_us']:.1f}", f"{v['wall_us']:.1f}"]
            for name, v in record["host"].items()
        ]
        print(table(["host, a row and step", "CPU µs", "wall µs"], rows) + "\n")
    if "steps" in record:
        header = [
            "rows",
            "constrained",
            "ms a token",
            "free",
            "ratio",
            "95%",
            "CPU ratio",
            "95%",
            "limit",
        ]
        rows = [
            [
                str(r["rows"]),
                f"{r['constrained']:.0%}",
                f"{r['step_ms']:.2f}",
                f"{r['step_ms_free']:.2f}",
                *(x for key in ("ratio", "cpu_ratio") for x in _interval(r[key])),
                f"{RATIO_LIMIT}" if r["rows"] == 32 and r["constrained"] == 1 else "",
            ]
            for r in record["steps"]
        ]
        print(table(header, rows) + "\n")
        if plot:
            groups = [f"{r['rows']} rows, {r['constrained']:.0%}" for r in record["steps"]]
            series = [
                ("constrained", [r["step_ms"] for r in record["steps"]]),
                ("free", [r["step_ms_free"] for r in record["steps"]]),
            ]
            svg = grouped_bars("Time of a token", groups, series, "ms, less is better")
            Path(plot).write_text(svg, encoding="utf-8")
    if "forced" in record:
        found = record["forced"]
        ratio, interval = _interval(found["ratio"])
        calls = found["calls"]
        print(
            f"forced tokens: {found['tokens']:.0f} tokens in {calls['drafts']:.0f} device calls "
            f"with drafts, {calls['plain']:.0f} without; time a token {ratio} ({interval})\n"
        )


def _interval(ratio: tuple[float, float, float]) -> list[str]:
    return [f"{ratio[0]:.3f}", f"{ratio[1]:.3f} to {ratio[2]:.3f}"]


if __name__ == "__main__":
    main()
