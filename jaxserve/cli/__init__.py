"""The command line: `python -m jaxserve COMMAND …`; without one it serves.

Arguments and errors only; each subcommand lives where its work is done and is imported when it is
asked for, so that `--help` is quick and `serve` never imports JAX. Without a subcommand it serves.

Exit status: 0; 1 after an error, or if some lines of a batch failed; 2 after a wrong argument or
setting; 130 after Ctrl-C. An error is one sentence on stderr, never a traceback.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from jaxserve.cli.adapters import ACTIONS
from jaxserve.cli.cost import add_cost
from jaxserve.cli.lora import add_train

if TYPE_CHECKING:
    from jaxserve.config import Config

__all__ = ["main"]

EXIT_WRONG_USE = 2
EXIT_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit status."""
    from jaxserve.errors import ConfigError, JaxserveError

    _prepare_output()
    try:
        status = _run(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
        return status
    except ConfigError as error:
        return _tell(error.message, EXIT_WRONG_USE)
    except JaxserveError as error:
        return _tell(error.message, 1)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # whoever read our output has enough
        _drop_output()
        return 1
    except OSError as error:
        _drop_output()
        where = error.filename or "the output"
        return _tell(f"cannot read or write {where}: {error.strerror or error}", 1)


def _run(words: list[str]) -> int:
    if not words or (words[0].startswith("-") and words[0] not in ("-h", "--help")):
        words.insert(0, "serve")
    if words[0] == "bench":
        from jaxserve.bench.cli import run

        return run(words[1:])
    arguments, unknown = _parser().parse_known_args(words)
    if unknown:
        from jaxserve.errors import ConfigError

        raise ConfigError(
            f"{words[0]} takes no {unknown[0]!r}; python -m jaxserve {words[0]} --help lists what "
            "it takes"
        )
    return arguments.run(arguments)


def _tell(sentence: str, status: int) -> int:
    sys.stderr.write(f"jaxserve: {' '.join(sentence.split())}\n")
    return status


def _prepare_output() -> None:
    """A model says what it likes: a terminal that lacks a character shows "?" in its place."""
    if sys.stdout is None:  # closed by whoever started us
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def _drop_output() -> None:
    """Has Python's own last flush not fail over what could not be written."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


# ---------------------------------------------------------------------------- arguments


class _Parser(argparse.ArgumentParser):
    """Its errors are sentences like all others."""

    def error(self, message: str) -> NoReturn:
        """See `ArgumentParser.error`."""
        from jaxserve.errors import ConfigError

        raise ConfigError(f"{message}; see {self.prog} --help")


def _parser() -> argparse.ArgumentParser:
    top = _Parser(
        prog="python -m jaxserve",
        description="Serve language models with JAX. Without a subcommand: serve.",
        epilog="Every setting: docs/configuration.md. Example: "
        "python -m jaxserve generate 'The sea is' --max-tokens 32",
    )
    kinds = top.add_subparsers(metavar="COMMAND", required=True)
    serve = _command(kinds, "serve", _serve, "serve a model over an OpenAI-compatible HTTP API")
    serve.add_argument("--host", help="address to listen on (http.host)")
    serve.add_argument("--port", help="port to listen on; 0 takes a free one (http.port)")
    generate = _command(kinds, "generate", _generate, "continue prompts, without a server")
    _add_generate(generate)
    chat = _command(kinds, "chat", _chat, "talk to a model in the terminal")
    chat.add_argument("--system", default="", help="text of a system message")
    _add_sampling(chat)
    kinds.add_parser("bench", help="measure the engine or a server: bench --help", add_help=False)
    convert = _command(kinds, "convert", _convert, "write a model as an Orbax checkpoint")
    convert.add_argument("source", help="what model.path takes: a directory, .gguf file, hub id, …")
    convert.add_argument("target", type=Path, help="directory to create")
    convert.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="of the stored matrices (default: each as it is)",
    )
    lora = kinds.add_parser("lora", help="adapters: lora --help")
    of_lora = lora.add_subparsers(metavar="ACTION", required=True)
    train = _command(of_lora, "train", _train, "fine-tune an adapter on the served model")
    add_train(train)
    for name, (summary, add, run) in ACTIONS.items():
        action = of_lora.add_parser(name, help=summary, description=summary.capitalize())
        action.set_defaults(run=run)
        add(action)
    cost = kinds.add_parser("cost", help="what a million tokens cost: cost --help")
    add_cost(cost)
    cost.set_defaults(run=_cost)
    of_slo = kinds.add_parser("slo", help="objectives: slo rules --help").add_subparsers(
        metavar="ACTION", required=True
    )
    _command(of_slo, "rules", _rules, "print Prometheus rules of the configured objectives")
    alerts = kinds.add_parser("alerts", help="who is told what is wrong: alerts test --help")
    of_alerts = alerts.add_subparsers(metavar="ACTION", required=True)
    _command(of_alerts, "test", _test_alerts, "tell all receivers of a test incident")
    doctor = _command(
        kinds, "doctor", _doctor, "this machine, what would be compiled, what would fit"
    )
    doctor.add_argument(
        "--topology",
        metavar="CHIP:AxB",
        help="look at chips that are not here, such as v5e:4x4 or h100:8; --model may then name a "
        "config.json alone",
    )
    return top


def _command(
    kinds: argparse._SubParsersAction[_Parser],
    name: str,
    run: Callable[[argparse.Namespace], int],
    summary: str,
) -> argparse.ArgumentParser:
    """A subcommand with what all take: the configuration."""
    command = kinds.add_parser(name, help=summary, description=summary[0].upper() + summary[1:])
    command.set_defaults(run=run)
    command.add_argument("--config", type=Path, metavar="FILE", help="YAML file of settings")
    command.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="one setting; may be given several times",
    )
    if name != "convert":
        command.add_argument("--model", help="model to use (model.path)")
    return command


def _add_generate(generate: argparse.ArgumentParser) -> None:
    generate.add_argument(
        "prompt",
        nargs="?",
        help="text to continue; stdin (less a last newline) where it is left out",
    )
    generate.add_argument(
        "--input",
        metavar="FILE",
        help='JSON lines to answer ("-" is stdin): each a string, or an object with "prompt" or '
        '"messages" and any option of jaxserve.text.request.Request',
    )
    generate.add_argument(
        "--output", metavar="FILE", help="where the answers to --input go, line by line (stdout)"
    )
    _add_sampling(generate)


def _add_sampling(command: argparse.ArgumentParser) -> None:
    options = command.add_argument_group("how tokens are chosen")
    options.add_argument("--max-tokens", type=int, help="tokens to generate at most")
    options.add_argument("--temperature", type=float, help="0 is greedy (default: 1)")
    options.add_argument("--top-p", type=float, help="smallest set of tokens of this probability")
    options.add_argument("--top-k", type=int, help="this many most likely tokens")
    options.add_argument("--min-p", type=float, help="tokens this likely, relative to the best")
    options.add_argument("--repetition-penalty", type=float, help="above 1: repeat less")
    options.add_argument("--seed", type=int, help="for the same answer again")
    options.add_argument("--stop", action="append", help="string that ends the output; repeatable")


def _options(arguments: argparse.Namespace) -> dict[str, object]:
    """The sampling options that were given."""
    names = (
        "max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "stop"
    )  # fmt: skip
    given = {name: getattr(arguments, name) for name in names}
    return {name: value for name, value in given.items() if value is not None}


def _load_config(arguments: argparse.Namespace) -> Config:
    from jaxserve.settings import load_config

    settings = list(arguments.set)
    for name, key in (("model", "model.path"), ("host", "http.host"), ("port", "http.port")):
        value = getattr(arguments, name, None)
        if value is not None:
            settings.append(f"{key}={value}")
    return load_config(arguments.config, settings)


# ---------------------------------------------------------------------------- subcommands


def _serve(arguments: argparse.Namespace) -> int:
    from jaxserve.settings import describe

    config = _load_config(arguments)
    sys.stderr.write(describe(config))
    from jaxserve.http.serve import serve

    return serve(config)


def _generate(arguments: argparse.Namespace) -> int:
    config = _load_config(arguments)
    from jaxserve.cli import generate
    from jaxserve.errors import ConfigError

    if arguments.input is None:
        if arguments.output is not None:
            raise ConfigError("--output goes with --input; a single answer is written to stdout")
        prompt = arguments.prompt if arguments.prompt is not None else generate.read_prompt()
        with _open(config) as llm:
            return generate.answer(llm, prompt, _options(arguments))
    if arguments.prompt is not None:
        raise ConfigError("give either a prompt or --input")
    lines = generate.open_lines(arguments.input, arguments.output)
    with lines as (source, target), _open(config) as llm:
        return generate.answer_lines(llm, source, target, _options(arguments))


def _chat(arguments: argparse.Namespace) -> int:
    config = _load_config(arguments)
    from jaxserve.cli import chat

    with _open(config) as llm:
        return chat.converse(llm, arguments.system, _options(arguments))


def _test_alerts(arguments: argparse.Namespace) -> int:
    config = _load_config(arguments)
    from jaxserve.cli import alerts

    return alerts.tell_all(config)


def _convert(arguments: argparse.Namespace) -> int:
    arguments.set.append(f"model.path={arguments.source}")
    config = _load_config(arguments)
    from jaxserve.cli import convert

    return convert.convert_model(config, arguments.target, arguments.dtype)


def _train(arguments: argparse.Namespace) -> int:
    config = _load_config(arguments)
    from jaxserve.cli.lora import train_adapter

    return train_adapter(config, arguments)


def _cost(arguments: argparse.Namespace) -> int:
    from jaxserve.cli.cost import report

    return report(arguments)


def _rules(arguments: argparse.Namespace) -> int:
    config = _load_config(arguments)
    from jaxserve.cli.slo import print_rules

    return print_rules(config)


def _doctor(arguments: argparse.Namespace) -> int:
    config = _load_config(arguments)
    from jaxserve.cli import doctor
    from jaxserve.device.chips import parse_slice

    slice = parse_slice(arguments.topology) if arguments.topology else None
    return doctor.examine(config, slice)


def _open(config: Config):
    """The model, in this process."""
    import logging

    level = config.logging.level.upper()
    logging.basicConfig(level="WARNING" if level == "INFO" else level, stream=sys.stderr)
    from jaxserve.offline import LLM

    return LLM(config=config)
