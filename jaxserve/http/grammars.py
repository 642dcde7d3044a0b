"""Whether grammars are right, found before a request is taken: in a child that can be killed.

Compiling what a client sends may take any time and memory. So it is done first by a process of
this worker's (`grammar_process`), with a limit for both; one that passes a limit is killed, and the
next one is started. The engine compiles again only what has passed here.

Invariants: requests whose grammars are known do not wait for those whose are not, nor small
grammars for more than one larger. A grammar's verdict is the same for everybody, and kept.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import pickle
import sys
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from jaxserve.config import StructuredConfig
from jaxserve.errors import GrammarError, Overloaded
from jaxserve.http.grammar_process import LENGTH, Setup
from jaxserve.http.turns import Turns
from jaxserve.types import Grammar, ModelInfo, Vocabulary

#: How long a child may take until it can check: it starts an interpreter and builds a trie.
START_TIMEOUT_S = 60.0
#: A request waits for other grammars as long as so many may take to be refused.
_MAX_TURNS = 2


class GrammarChecker:
    """Checks grammars; owned by the event loop.

    Args:
        vocabulary: makes what the model's tokens say.
    """

    def __init__(self, config: StructuredConfig, vocabulary: Callable[[], Vocabulary]) -> None:
        self._config = config
        self._vocabulary = vocabulary
        self._verdicts: OrderedDict[Grammar, str] = OrderedDict()
        self._running: dict[Grammar, asyncio.Task[str]] = {}
        self._turns = Turns()
        self._child: asyncio.subprocess.Process | None = None

    async def check(self, grammar: Grammar, model: ModelInfo, param: str) -> None:
        """Returns where a grammar is right.

        Args:
            param: the request's field that it comes from, for the error.

        Raises:
            GrammarError: it is wrong, or takes too much.
            Overloaded: others are being checked for too long.
        """
        num_bytes = len(grammar.text)
        if num_bytes > self._config.max_grammar_bytes:
            raise GrammarError(
                f"{param} has {num_bytes} characters, the limit is "
                f"{self._config.max_grammar_bytes}; send less",
                param=param,
            )
        verdict = self._verdicts.get(grammar)
        if verdict is None:
            task = self._running.get(grammar)
            if task is None:
                task = asyncio.create_task(self._ask(grammar, model), name="jaxserve grammar")
                self._running[grammar] = task
                task.add_done_callback(lambda _: self._running.pop(grammar, None))
            verdict = await asyncio.shield(task)  # one who leaves does not take it from others
        else:
            self._verdicts.move_to_end(grammar)
        if verdict:
            raise GrammarError(f"{param}: {verdict}", param=param)

    async def close(self) -> None:
        """Ends the child."""
        for task in list(self._running.values()):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await task
        await self._kill()

    async def _ask(self, grammar: Grammar, model: ModelInfo) -> str:
        """The verdict: what is wrong, in a sentence, or nothing."""
        limit_s = self._config.check_timeout_s
        try:
            async with asyncio.timeout(_MAX_TURNS * limit_s + 1.0):
                await self._turns.acquire(len(grammar.text))
        except TimeoutError:
            raise Overloaded("too many grammars are being checked; try again") from None
        try:
            child = await self._started(model)
            assert child.stdin is not None
            try:
                child.stdin.write(pickle.dumps(grammar))
                verdict = await asyncio.wait_for(_answer(child), limit_s)
            except TimeoutError:
                await self._kill()
                verdict = f"it takes longer than {limit_s:g} s to compile; send a simpler one"
            except (asyncio.IncompleteReadError, OSError):
                await self._kill()
                limit = self._config.check_memory_bytes >> 20
                # Not kept: something else may have ended the child.
                return f"it cannot be compiled within {limit} MiB of memory; send a simpler one"
        except BaseException:
            await self._kill()  # its next answer would be taken for another grammar's
            raise
        finally:
            self._turns.release()
        self._verdicts[grammar] = verdict
        while len(self._verdicts) > self._config.cached_grammars:
            self._verdicts.popitem(last=False)
        return verdict

    async def _started(self, model: ModelInfo) -> asyncio.subprocess.Process:
        """The child, which is ready to check."""
        if self._child is not None and self._child.returncode is None:
            return self._child
        setup = Setup(
            config=self._config,
            vocabulary=self._vocabulary(),
            vocab_size=model.vocab_size,
            eos_token_ids=model.eos_token_ids,
        )
        self._child = child = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "jaxserve.http.grammar_process", str(os.getpid())),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        assert child.stdin is not None
        child.stdin.write(pickle.dumps(setup))
        try:
            await asyncio.wait_for(_answer(child), START_TIMEOUT_S)
        except (TimeoutError, asyncio.IncompleteReadError, OSError) as error:
            await self._kill()
            raise Overloaded("grammars cannot be checked at the moment") from error
        return child

    async def _kill(self) -> None:
        child, self._child = self._child, None
        if child is None:
            return
        with contextlib.suppress(ProcessLookupError):
            child.kill()
        await child.wait()
        transport: Any = getattr(child, "_transport", None)
        if transport is not None:
            transport.close()


async def _answer(child: asyncio.subprocess.Process) -> str:
    assert child.stdout is not None
    (length,) = LENGTH.unpack(await child.stdout.readexactly(LENGTH.size))
    return (await child.stdout.readexactly(length)).decode()
