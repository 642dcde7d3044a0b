"""`jaxserve generate`: one prompt as text, or JSON lines in and JSON lines out.

Invariants of a batch: every line that is not blank gets exactly one line of output, in the order of
the input, whatever goes wrong; a line that fails has an "error" object and makes the exit status 1.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from jaxserve.errors import ConfigError, DeviceFailure, InvalidRequest, JaxserveError
from jaxserve.http.logprobs import FLOOR
from jaxserve.offline import LLM
from jaxserve.text.answer import Choice, Generation
from jaxserve.text.request import Request, make_request
from jaxserve.types import TokenLogprobs


def read_prompt() -> str:
    """The prompt from stdin, without the newline that ends it (`echo` writes one).

    Raises:
        ConfigError: stdin is a terminal (nobody has given a prompt), closed, or not UTF-8.
    """
    if sys.stdin is not None and sys.stdin.isatty():
        raise ConfigError("generate needs a prompt: as an argument, on stdin, or --input FILE")
    try:
        return _stdin().read().decode().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise ConfigError(f"the prompt on stdin is not UTF-8: {error}") from error


def _stdin() -> IO[bytes]:
    if sys.stdin is None:
        raise ConfigError("there is no standard input to read from; it is closed")
    return sys.stdin.buffer


def answer(llm: LLM, prompt: str, options: Mapping[str, Any]) -> int:
    """Writes one answer to stdout as it comes."""
    for piece in llm.stream(prompt, **options):
        sys.stdout.write(piece.text)
        sys.stdout.flush()
    sys.stdout.write("\n")
    return 0


@contextlib.contextmanager
def open_lines(source: str, target: str | None) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """Both files of a batch; "-" and None are stdin and stdout.

    Raises:
        ConfigError: one cannot be opened, or both are the same.
    """
    with contextlib.ExitStack() as stack:
        try:
            lines = _stdin() if source == "-" else stack.enter_context(Path(source).open("rb"))
            out: IO[bytes] = sys.stdout.buffer
            if target not in (None, "-"):
                _check_not_same(lines, Path(target))
                out = stack.enter_context(Path(target).open("wb"))
        except OSError as error:
            raise ConfigError(f"cannot open {error.filename}: {error.strerror}") from error
        yield lines, out


def _check_not_same(lines: IO[bytes], target: Path) -> None:
    if target.is_file() and os.path.samestat(target.stat(), os.fstat(lines.fileno())):
        raise ConfigError(f"--output {target} would write over --input; give another file")


def answer_lines(llm: LLM, source: IO[bytes], target: IO[bytes], options: Mapping[str, Any]) -> int:
    """Answers a batch; returns the exit status."""
    batch = _Batch(source, options)
    writer = _Writer(target)
    num_tokens = 0
    try:
        with tqdm(total=_count_lines(source), unit="line", disable=None) as bar:
            for index, result in llm.run(batch.requests(writer)):
                line = batch.lines.pop(index)
                writer.put(line.number, line.document(result))
                if isinstance(result, Generation):
                    num_tokens += sum(len(choice.token_ids) for choice in result.choices)
                bar.set_postfix(tokens=num_tokens, failed=writer.num_failed, refresh=False)
                bar.update(writer.num_written - bar.n)
            bar.update(writer.num_written - bar.n)
    except DeviceFailure as error:
        sys.stderr.write(f"jaxserve: {error.message}\n")
        for line in [*batch.lines.values(), *batch.rest()]:
            writer.put(line.number, line.document(error))
    return 1 if writer.num_failed else 0


@dataclasses.dataclass(slots=True)
class _Line:
    """One line that is being answered: its number from 0 among those not blank, and its id."""

    number: int
    id: str | int | None = None

    def document(self, result: Generation | JaxserveError) -> dict[str, Any]:
        """What is written for it."""
        document: dict[str, Any] = {"index": self.number}
        if self.id is not None:
            document["id"] = self.id
        if isinstance(result, JaxserveError):
            error = {"code": result.code, "message": result.message, "param": result.param}
            return document | {"error": error}
        choices = [_choice(choice) for choice in result.choices]
        if len(choices) == 1:
            document |= choices[0]
        else:
            document["choices"] = choices
        if result.prompt_logprobs:
            document["prompt_logprobs"] = list(map(_logprobs, result.prompt_logprobs))
        document["usage"] = {
            "prompt_tokens": len(result.prompt_token_ids),
            "completion_tokens": sum(len(choice.token_ids) for choice in result.choices),
        }
        return document


class _Batch:
    """Reads requests from lines; those that cannot be read are answered at once.

    Attributes:
        lines: by request index, those not answered yet.
    """

    def __init__(self, source: IO[bytes], options: Mapping[str, Any]) -> None:
        self._numbered = enumerate(raw for raw in source if raw.strip())
        self._options = options
        self.lines: dict[int, _Line] = {}

    def requests(self, writer: _Writer) -> Iterator[Request]:
        """Requests, in order; the n-th one's line is lines[n]."""
        index = 0
        for number, raw in self._numbered:
            line = _Line(number)
            try:
                request = self._read(raw, line)
            except InvalidRequest as error:
                writer.put(number, line.document(error))
                continue
            self.lines[index] = line
            index += 1
            yield request

    def rest(self) -> Iterable[_Line]:
        """Lines that were never read as requests."""
        return (_Line(number) for number, _ in self._numbered)

    def _read(self, raw: bytes, line: _Line) -> Request:
        try:
            value = json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise InvalidRequest(f"the line is not valid JSON: {error}") from error
        fields = {"prompt": value} if isinstance(value, str) else value
        if not isinstance(fields, dict):
            kind = type(value).__name__
            raise InvalidRequest(f"a line must be a JSON string or object, not {kind}")
        name = fields.pop("id", None)
        if not isinstance(name, str | int | None):
            kind = type(name).__name__
            raise InvalidRequest(f"id takes a string or an integer, not {kind}", param="id")
        line.id = name
        return make_request(**{**self._options, **fields})


class _Writer:
    """Writes documents in the order of their numbers.

    Attributes:
        num_written: so far; num_failed: documents with an error among all that were put.
    """

    def __init__(self, target: IO[bytes]) -> None:
        self._target = target
        self._waiting: dict[int, bytes] = {}
        self.num_written = 0
        self.num_failed = 0

    def put(self, number: int, document: dict[str, Any]) -> None:
        """Takes one document, and writes all that are next."""
        self.num_failed += "error" in document
        try:
            text = json.dumps(document, ensure_ascii=False).encode()
        except UnicodeEncodeError:  # an id with a lone surrogate
            text = json.dumps(document).encode()
        self._waiting[number] = text
        while (line := self._waiting.pop(self.num_written, None)) is not None:
            self._target.write(line + b"\n")
            self.num_written += 1
        self._target.flush()


def _choice(choice: Choice) -> dict[str, Any]:
    document: dict[str, Any] = {"text": choice.text, "finish_reason": choice.finish_reason}
    if choice.reasoning is not None:
        document["reasoning"] = choice.reasoning
    if choice.calls:
        document["calls"] = [dataclasses.asdict(call) for call in choice.calls]
    if choice.logprobs:
        document["logprobs"] = list(map(_logprobs, choice.logprobs))
    return document


def _logprobs(entry: TokenLogprobs) -> dict[str, Any]:
    """JSON has no infinity: a token of probability zero has the floor that the API reports too."""
    top = [(token, max(value, FLOOR)) for token, value in entry.top]
    return {"token_id": entry.token_id, "logprob": max(entry.logprob, FLOOR), "top": top}


def _count_lines(source: IO[bytes]) -> int | None:
    """Lines that are not blank, where the file can be read twice."""
    if not source.seekable():
        return None
    start = source.tell()
    count = sum(1 for raw in source if raw.strip())
    source.seek(start)
    return count
