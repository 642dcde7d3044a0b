"""The child that compiles grammars for their sake alone: a hostile one takes nobody with it.

Started by `grammar_child.GrammarChild` as `python -m jaxserve.http.grammar_process`. It makes the
token table once, and has a fork of its own compile each grammar, several at a time if asked so:

    worker ── Question ──▶ this process ── fork ──▶ one grammar, its verdict through a pipe
           ◀── answer ───        │
                                 └ kills it after check_timeout_s

A fork costs milliseconds and shares the table, so that one more is there at once where one was
killed, and what a grammar took is given back with it. Reads pickles from stdin, from its parent
alone: first `Setup`, then one `Question` after another. Writes on stdout `ANSWER`s, each with a
message behind it: empty where all is well; first one for the setup.

Invariants: never imports JAX; single-threaded where it forks; ends with its parent, as the forks do
with it; no fork takes more memory or time than it may.
"""

from __future__ import annotations

import os
import pickle
import resource
import select
import signal
import sys
import time
import traceback
from dataclasses import dataclass, field

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # numpy would have threads, which no fork takes along

from llguidance import LLTokenizer

from jaxserve.errors import GrammarError
from jaxserve.http.grammar_child import ANSWER, LENGTH, Question, Setup
from jaxserve.protocol.parent import follow_parent
from jaxserve.structured.matcher import compile_grammar
from jaxserve.structured.probe import probe
from jaxserve.structured.scrutiny import scrutinise
from jaxserve.structured.table import token_table
from jaxserve.types import Grammar

#: So that the step loop goes before it.
_NICENESS = 10
_READ_BYTES = 1 << 16


@dataclass(kw_only=True)
class _Fork:
    """One grammar that is being compiled."""

    number: int
    pid: int
    pipe: int
    end_s: float
    said: bytearray = field(default_factory=bytearray)


def main() -> None:
    """The child's entry."""
    answers = os.dup(1)
    os.dup2(2, 1)  # what a library prints is no answer
    try:
        setup: Setup = pickle.load(sys.stdin.buffer)
    except (EOFError, pickle.UnpicklingError):
        return  # the parent has gone
    os.nice(_NICENESS)
    num_bytes = setup.config.check_memory_bytes
    resource.setrlimit(resource.RLIMIT_AS, (num_bytes, num_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    table = token_table(setup.vocabulary, setup.vocab_size, setup.eos_token_ids)
    _Child(setup, table, answers).run()


class _Child:
    """The process, once it has its table."""

    def __init__(self, setup: Setup, table: LLTokenizer, answers: int) -> None:
        self._setup = setup
        self._table = table
        self._answers = answers
        self._heard = bytearray()
        self._forks: dict[int, _Fork] = {}  # by pipe
        self._poll = select.poll()

    def run(self) -> None:
        """Answers questions until the parent is gone."""
        self._answer(0, "")
        self._poll.register(0, select.POLLIN)
        while True:
            for pipe, _ in self._poll.poll(self._patience_ms()):
                if pipe:
                    self._listen(self._forks[pipe])
                elif not self._take_questions():
                    return  # its forks see that it is gone
            self._end_late_ones()

    def _take_questions(self) -> bool:
        """Starts what is asked; False where nobody asks any more."""
        piece = os.read(0, _READ_BYTES)
        self._heard += piece
        while len(self._heard) >= LENGTH.size:
            end = LENGTH.size + LENGTH.unpack_from(self._heard)[0]
            if len(self._heard) < end:
                break
            question: Question = pickle.loads(self._heard[LENGTH.size : end])
            del self._heard[:end]
            self._fork(question)
        return bool(piece)

    def _fork(self, question: Question) -> None:
        pipe, end = os.pipe()
        parent = os.getpid()
        pid = os.fork()
        if not pid:
            status = 1
            try:
                follow_parent(parent)
                os.write(end, _verdict(question.grammar, self._table, self._setup).encode())
                status = 0
            except MemoryError:
                pass  # what an end without a word says
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        os.close(end)
        end_s = time.monotonic() + self._setup.config.check_timeout_s
        self._forks[pipe] = _Fork(number=question.number, pid=pid, pipe=pipe, end_s=end_s)
        self._poll.register(pipe, select.POLLIN)

    def _listen(self, fork: _Fork) -> None:
        piece = os.read(fork.pipe, _READ_BYTES)
        fork.said += piece
        if piece:
            return
        if self._bury(fork) == 0:
            self._answer(fork.number, fork.said.decode())
            return
        # Not to be kept: something else may have ended it.
        limit = self._setup.config.check_memory_bytes >> 20
        message = f"it cannot be compiled within {limit} MiB of memory; send a simpler one"
        self._answer(fork.number, message, keep=False)

    def _end_late_ones(self) -> None:
        now_s, limit_s = time.monotonic(), self._setup.config.check_timeout_s
        for fork in [fork for fork in self._forks.values() if fork.end_s <= now_s]:
            os.kill(fork.pid, signal.SIGKILL)
            self._bury(fork)
            message = f"it takes longer than {limit_s:g} s to compile; send a simpler one"
            self._answer(fork.number, message)

    def _bury(self, fork: _Fork) -> int:
        """Its exit status."""
        self._poll.unregister(fork.pipe)
        os.close(fork.pipe)
        del self._forks[fork.pipe]
        return os.waitpid(fork.pid, 0)[1]

    def _patience_ms(self) -> int | None:
        if not self._forks:
            return None
        left_s = min(fork.end_s for fork in self._forks.values()) - time.monotonic()
        return max(int(left_s * 1000) + 1, 0)

    def _answer(self, number: int, message: str, *, keep: bool = True) -> None:
        text = message.encode()
        data = ANSWER.pack(number, keep, len(text)) + text
        while data:
            data = data[os.write(self._answers, data) :]


def _verdict(grammar: Grammar, table: LLTokenizer, setup: Setup) -> str:
    try:
        scrutinise(grammar, setup.config.max_properties)
        compiled = compile_grammar(grammar, table, setup.config, setup.vocab_size)
        probe(compiled, setup.vocab_size)
    except GrammarError as error:
        return error.message or "it is wrong"
    return ""


if __name__ == "__main__":
    main()
