"""`jaxserve bench …`: arguments of the benchmarks. Each ends in one line of JSON on stdout.

Imports a benchmark only when it is asked for: `bench serve` runs without JAX, `bench engine` on a
bare accelerator image without the front end's packages.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from jaxserve.errors import JaxserveError
from jaxserve.settings import load_config


def run(argv: Sequence[str]) -> int:
    """Runs one benchmark.

    Args:
        argv: what follows `jaxserve bench`.

    Returns:
        The exit status: 0, or 1 after an error told in one sentence.
    """
    arguments = parser().parse_args(argv)
    try:
        match arguments.benchmark:
            case "engine":
                from jaxserve.bench import engine

                return engine.main(arguments, load_config(arguments.config, arguments.set))
            case "serve":
                from jaxserve.bench import serve

                return serve.main(arguments)
            case "history":
                from jaxserve.bench import history

                return history.main(arguments)
            case _:
                from jaxserve.bench import compare

                return compare.main(arguments)
    except JaxserveError as error:
        print(f"jaxserve bench: {error.message}", file=sys.stderr)
        return 1


def parser() -> argparse.ArgumentParser:
    """The arguments of all benchmarks."""
    top = argparse.ArgumentParser(prog="jaxserve bench", description="Measure, in one JSON line.")
    kinds = top.add_subparsers(dest="benchmark", required=True)
    _add_engine(kinds.add_parser("engine", help="the engine itself: prefill, decode, MBU, MFU"))
    _add_serve(kinds.add_parser("serve", help="any OpenAI-compatible server under load"))
    _add_compare(kinds.add_parser("compare", help="did it get worse? a verdict, an exit status"))
    _add_history(kinds.add_parser("history", help="where did a row of results change?"))
    return top


def _add_engine(engine: argparse.ArgumentParser) -> None:
    engine.add_argument("--config", type=Path, help="configuration file")
    engine.add_argument(
        "--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="one setting"
    )
    engine.add_argument("--rows", default="1,8,32", help="concurrent sequences (default: 1,8,32)")
    engine.add_argument("--context", type=_positive, default=128, help="prompt before decoding")
    engine.add_argument("--steps", type=_positive, default=32, help="decode steps a sequence")
    engine.add_argument("--prefill", type=_positive, default=512, help="prompt of the prefill case")
    engine.add_argument("--repeats", type=_positive, default=5, help="interleaved repeats")


def _add_serve(serve: argparse.ArgumentParser) -> None:
    serve.add_argument("--url", default="http://127.0.0.1:8000", help="the server's address")
    serve.add_argument("--model", default="", help="the first of /v1/models if not given")
    serve.add_argument("--api-key", default="", help="sent as a bearer token")
    serve.add_argument("--requests", type=_positive, default=100, help="how many are measured")
    serve.add_argument("--warmup", type=int, default=0, help="requests before them")
    load = serve.add_mutually_exclusive_group()
    load.add_argument("--rate", type=_rate, help="open loop: arrivals a second, or inf")
    load.add_argument("--concurrency", type=_positive, default=8, help="closed loop: clients")
    serve.add_argument("--prompt-tokens", default="128", metavar="N|LOW:HIGH")
    serve.add_argument("--output-tokens", default="64", metavar="N|LOW:HIGH")
    serve.add_argument("--vocab-size", type=_positive, default=30_000, help="of prompt token ids")
    serve.add_argument("--dataset", help='JSON lines with "prompt" or "messages" instead')
    serve.add_argument("--seed", type=int, default=0, help="of prompts and arrivals")
    serve.add_argument("--timeout", type=float, default=600.0, help="seconds a request may take")
    serve.add_argument(
        "--read-bytes-per-s", type=float, help="of the server's memory (bench engine), for MBU"
    )
    serve.add_argument(
        "--matmul-flops-per-s", type=float, help="of the server (bench engine), for MFU"
    )
    for name in ("ttft", "tpot", "e2e"):
        serve.add_argument(f"--slo-{name}-ms", type=float, help=f"{name.upper()} that is good")


def _add_compare(compare: argparse.ArgumentParser) -> None:
    compare.add_argument("before", help="file of one or more runs' JSON lines")
    compare.add_argument("after")
    compare.add_argument(
        "--paired", action="store_true", help="the repeats of both were measured in turns"
    )
    compare.add_argument("--alpha", type=_part, default=0.05, help="chance of a false verdict")
    compare.add_argument(
        "--across", default="", metavar="FIELD,…", help="compare although these fields differ"
    )
    _add_judging(compare)


def _add_history(history: argparse.ArgumentParser) -> None:
    history.add_argument("files", nargs="+", help="files of runs' JSON lines, oldest first")
    _add_judging(history)


def _add_judging(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--threshold", type=_part, default=0.03, help="least change that matters (default 0.03)"
    )
    command.add_argument("--json", action="store_true", help="one line of JSON instead of a table")


def _part(text: str) -> float:
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def _rate(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text} is not a rate above 0")
    return value


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
