"""The parent's end of the child that compiles grammars (`grammar_process`): questions and answers.

Owned by the event loop. Invariant: whoever asks gets an answer, or an error once the child has
gone: then the next one has to be started.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import pickle
import struct
import sys
from dataclasses import dataclass
from typing import Any, NamedTuple

from jaxserve.config import StructuredConfig
from jaxserve.types import Grammar, Vocabulary

#: An answer: the question's number, whether the same grammar has it again, the message's length.
ANSWER = struct.Struct("<Q?I")
#: Before a question: how long its pickle is.
LENGTH = struct.Struct("<I")
#: How long a child may take until it can check: it starts an interpreter and builds a trie.
START_TIMEOUT_S = 60.0
#: Beyond a grammar's own time, how long its answer may take.
_GRACE_S = 1.0


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What a child has to know.

    Attributes:
        vocab_size, eos_token_ids: the model's.
    """

    config: StructuredConfig
    vocabulary: Vocabulary
    vocab_size: int
    eos_token_ids: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Question:
    """Whether a grammar is right; `number` comes back with the answer."""

    number: int
    grammar: Grammar


class ChildLost(Exception):
    """It has ended: another one may be asked."""


class Verdict(NamedTuple):
    """What is wrong with a grammar, in a sentence; empty where nothing is.

    Attributes:
        keep: whether the same grammar would get it again.
    """

    message: str
    keep: bool


class GrammarChild:
    """See the module; made by `start`.

    Attributes:
        pid: of the process.
    """

    def __init__(self, process: asyncio.subprocess.Process, limit_s: float) -> None:
        self._process = process
        self.pid = process.pid
        self._limit_s = limit_s
        self._numbers = itertools.count(1)
        self._asked: dict[int, asyncio.Future[Verdict]] = {}
        self._reader: asyncio.Task[None] | None = None

    @classmethod
    async def start(cls, setup: Setup) -> GrammarChild:
        """One that is ready to check.

        Raises:
            ChildLost: it ended before.
            TimeoutError: it takes too long.
        """
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "jaxserve.http.grammar_process"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        child = cls(process, setup.config.check_timeout_s)
        assert process.stdin is not None
        process.stdin.write(pickle.dumps(setup))
        ready = child._asked[0] = asyncio.get_running_loop().create_future()
        child._reader = asyncio.create_task(child._read(), name="jaxserve grammar child")
        try:
            await asyncio.wait_for(ready, START_TIMEOUT_S)
        except BaseException:
            await child.close()
            raise
        return child

    @property
    def lives(self) -> bool:
        """Whether it can be asked."""
        return self._reader is not None and not self._reader.done()

    async def ask(self, grammar: Grammar) -> Verdict:
        """The verdict on a grammar.

        Raises:
            ChildLost: there is none, since the child ends.
            TimeoutError: nor one in time; the child is ended.
        """
        assert self._process.stdin is not None
        number = next(self._numbers)
        answer = self._asked[number] = asyncio.get_running_loop().create_future()
        question = pickle.dumps(Question(number=number, grammar=grammar))
        try:
            if not self.lives:
                raise ChildLost("it has ended")
            self._process.stdin.write(LENGTH.pack(len(question)) + question)
            return await asyncio.wait_for(answer, self._limit_s + _GRACE_S)
        except TimeoutError:
            await self.close()
            raise
        finally:
            self._asked.pop(number, None)

    async def close(self) -> None:
        """Ends it; those who wait are told."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        await self._process.wait()
        if self._reader is not None:
            await asyncio.wait([self._reader])
        transport: Any = getattr(self._process, "_transport", None)
        if transport is not None:
            transport.close()

    async def _read(self) -> None:
        answers = self._process.stdout
        assert answers is not None
        try:
            while True:
                number, keep, length = ANSWER.unpack(await answers.readexactly(ANSWER.size))
                message = (await answers.readexactly(length)).decode()
                answer = self._asked.get(number)
                if answer is not None and not answer.done():
                    answer.set_result(Verdict(message, keep))
        except (asyncio.IncompleteReadError, OSError):
            pass
        finally:
            for answer in self._asked.values():
                if not answer.done():
                    answer.set_exception(ChildLost("it has ended"))
