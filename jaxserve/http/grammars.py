"""Whether grammars are right, found before a request is taken: in processes that can be killed.

Compiling what a client sends may take any time and memory. So it is done first by forks of a child
of this worker's (`grammar_process`), with a limit for both. The engine compiles again only what has
passed here.

Invariants: requests whose grammars are known do not wait for those whose are not, nor small
grammars for large ones. Whoever has waited for half of `patience_s` is told to come back. A
grammar's verdict is the same for everybody, and kept.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections import OrderedDict
from collections.abc import Callable

from jaxserve.config import StructuredConfig
from jaxserve.errors import GrammarError, Overloaded
from jaxserve.http.grammar_child import ChildLost, GrammarChild, Setup, Verdict
from jaxserve.http.turns import Turns
from jaxserve.structured.grammars import check_size
from jaxserve.structured.properties import may_have_more, refuse_large
from jaxserve.types import Grammar, ModelInfo, Vocabulary

#: Grammars that are compiled at once, whatever the cores, and how many cores there are for one.
_MOST_AT_ONCE, _CORES_EACH = 4, 2
#: Characters of a grammar that never waits for larger ones.
_SMALL = 1 << 14
#: Beside waiting and compiling.
_MARGIN_S = 0.5


class GrammarChecker:
    """Checks grammars; owned by the event loop.

    Args:
        vocabulary: makes what the model's tokens say.
        at_once: grammars that are compiled at once; as the cores have it where None.
    """

    def __init__(
        self,
        config: StructuredConfig,
        vocabulary: Callable[[], Vocabulary],
        at_once: int | None = None,
    ) -> None:
        self._config = config
        self._vocabulary = vocabulary
        self._verdicts: OrderedDict[Grammar, str] = OrderedDict()
        self._running: dict[Grammar, asyncio.Task[str]] = {}
        if at_once is None:
            at_once = min(max((os.cpu_count() or 1) // _CORES_EACH, 2), _MOST_AT_ONCE)
        self._turns = Turns(at_once, _SMALL)
        self._counting = asyncio.Lock()  # by one thread, which shares the interpreter with us
        self._child: GrammarChild | None = None
        self._starting: asyncio.Task[GrammarChild] | None = None

    @property
    def patience_s(self) -> float:
        """How long the grammars of one request may take to be refused, at most."""
        return 2 * (self._config.check_timeout_s + _MARGIN_S)

    async def check(self, grammar: Grammar, model: ModelInfo, param: str) -> None:
        """Returns where a grammar is right.

        Args:
            param: the request's field that it comes from, for the error.

        Raises:
            GrammarError: it is wrong, or takes too much.
            Overloaded: others are being checked for too long.
        """
        try:
            check_size(grammar, self._config)
        except GrammarError as error:
            raise GrammarError(f"{param}: {error.message}", param=param) from None
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

    async def ready(self, model: ModelInfo) -> None:
        """Returns when there is a child to ask, whose start is nobody's grammar's fault.

        Raises:
            Overloaded: it does not start.
        """
        await self._started(model)

    async def close(self) -> None:
        """Ends the child."""
        for task in [*self._running.values(), self._starting]:
            if task is not None:
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError, Exception):
                    await task
        if self._child is not None:
            await self._child.close()

    async def _ask(self, grammar: Grammar, model: ModelInfo) -> str:
        """The verdict: what is wrong, in a sentence, or nothing."""
        most = self._config.max_properties
        try:
            if may_have_more(grammar.text, most):
                async with self._counting:
                    await asyncio.to_thread(refuse_large, grammar, most)
        except GrammarError as error:
            return self._kept(grammar, error.message)
        await self._started(model)
        try:
            async with asyncio.timeout(self.patience_s / 2):
                await self._turns.acquire(len(grammar.text))
        except TimeoutError:
            raise Overloaded("too many grammars are being checked; try again") from None
        try:
            verdict = await self._verdict(grammar, model)
        finally:
            self._turns.release()
        return self._kept(grammar, verdict.message) if verdict.keep else verdict.message

    def _kept(self, grammar: Grammar, message: str) -> str:
        self._verdicts[grammar] = message
        while len(self._verdicts) > self._config.cached_grammars:
            self._verdicts.popitem(last=False)
        return message

    async def _verdict(self, grammar: Grammar, model: ModelInfo) -> Verdict:
        try:
            return await (await self._started(model)).ask(grammar)
        except ChildLost:  # whatever ended it was not this grammar, which has a fork of its own
            child = await self._started(model)
        except TimeoutError:
            raise _cannot_check() from None
        try:
            return await child.ask(grammar)
        except (ChildLost, TimeoutError):
            raise _cannot_check() from None

    async def _started(self, model: ModelInfo) -> GrammarChild:
        """The child, which is ready to check; one start serves all who wait for it."""
        if self._child is not None and self._child.lives:
            return self._child
        if self._starting is None or self._starting.done():
            self._starting = asyncio.create_task(self._start(model), name="jaxserve grammar start")
        try:
            return await asyncio.shield(self._starting)
        except (ChildLost, TimeoutError):
            raise _cannot_check() from None

    async def _start(self, model: ModelInfo) -> GrammarChild:
        if self._child is not None:
            await self._child.close()
        setup = Setup(
            config=self._config,
            vocabulary=self._vocabulary(),
            vocab_size=model.vocab_size,
            eos_token_ids=model.eos_token_ids,
        )
        self._child = await GrammarChild.start(setup)
        return self._child


def _cannot_check() -> Overloaded:
    return Overloaded("grammars cannot be checked at the moment")
