"""Compiles grammars beside whoever asks, and keeps what it has compiled.

Compiling lets go of the interpreter, so that the asking thread goes on. A grammar that somebody
compiles is compiled once, however many ask. Owned by one thread, in which all methods are called.

Invariant: a grammar is compiled after the vocabulary has been given (`use`), or refused.
"""

from __future__ import annotations

import queue
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable

from llguidance import LLTokenizer

from jaxserve.config import StructuredConfig
from jaxserve.errors import GrammarError, JaxserveError
from jaxserve.structured.grammars import check_size
from jaxserve.structured.matcher import Compiled, compile_grammar
from jaxserve.structured.table import token_table
from jaxserve.types import Grammar, ModelInfo, Vocabulary

#: A grammar that takes long does not hold up the others.
_NUM_THREADS = 2


class Build:
    """A grammar that is compiled, or being so."""

    def __init__(self) -> None:
        self._done = threading.Event()
        self._outcome: Compiled | GrammarError | None = None

    @property
    def done(self) -> bool:
        """Whether `result` has something to say."""
        return self._done.is_set()

    def result(self) -> Compiled:
        """The compiled grammar, waiting for it.

        Raises:
            GrammarError: it is wrong.
        """
        self._done.wait()
        if isinstance(self._outcome, Compiled):
            return self._outcome
        assert self._outcome is not None
        raise GrammarError(self._outcome.message)  # a new one each time: it will be traced

    def finish(self, make: Callable[[], Compiled]) -> None:
        """Does the work, in any thread."""
        try:
            self._outcome = make()
        except GrammarError as error:
            self._outcome = error
        except Exception as error:  # a fault of the library is this grammar's end, not the thread's
            self._outcome = GrammarError(f"the grammar could not be compiled: {error}")
        self._done.set()


#: Jobs of the threads; None ends one.
_Work = queue.SimpleQueue[Callable[[], None] | None]


class Compiler:
    """Compiled grammars of one model.

    Args:
        model: its vocabulary's size and end tokens.
    """

    def __init__(self, config: StructuredConfig, model: ModelInfo) -> None:
        self._config = config
        self._model = model
        self._table: _Table | None = None
        self._builds: OrderedDict[Grammar, Build] = OrderedDict()
        self._work: _Work = queue.SimpleQueue()

    def use(self, vocabulary: Vocabulary) -> None:
        """Takes the model's vocabulary; a second one is the same."""
        if self._table is None:
            self._table = _Table(vocabulary, self._model)
            self._work.put(self._table.make)
            for _ in range(_NUM_THREADS):
                threading.Thread(
                    target=_run, args=(self._work,), name="jaxserve grammars", daemon=True
                ).start()
            weakref.finalize(self, _end, self._work)

    def start(self, grammar: Grammar) -> Build:
        """Begins to compile a grammar, unless that has been done.

        Raises:
            GrammarError: it is too large, or there is no vocabulary yet.
        """
        build = self._builds.get(grammar)
        if build is not None:
            self._builds.move_to_end(grammar)
            return build
        check_size(grammar, self._config)
        table = self._table
        if table is None:
            raise GrammarError("the client has sent no vocabulary to hold the output to a grammar")
        build = self._builds[grammar] = Build()

        self._work.put(lambda: build.finish(lambda: self._compile(grammar, table)))
        while len(self._builds) > self._config.cached_grammars:
            self._builds.popitem(last=False)
        return build

    def renew(self, compiled: Compiled) -> Compiled:
        """The same grammar, whose outputs share nothing with those that there are; at once.

        Raises:
            GrammarError: it can not be compiled any more.
        """
        assert self._table is not None, "what has been compiled had a table"
        return self._compile(compiled.grammar, self._table)

    def _compile(self, grammar: Grammar, table: _Table) -> Compiled:
        return compile_grammar(grammar, table.get(), self._config, self._model.vocab_size)

    def forget(self, grammar: Grammar) -> None:
        """The next one that asks has the grammar compiled anew.

        Its outputs share a lexer, which stays at the limit that one of them has passed.
        """
        self._builds.pop(grammar, None)


def _run(work: _Work) -> None:
    """What a thread does; it knows no compiler, so that one that nobody needs any more goes."""
    while (job := work.get()) is not None:
        job()
        del job  # which holds its compiler


def _end(work: _Work) -> None:
    """The compiler is gone: its threads end."""
    for _ in range(_NUM_THREADS):
        work.put(None)


class _Table:
    """The token table, made by one of the threads while the others wait for it."""

    def __init__(self, vocabulary: Vocabulary, model: ModelInfo) -> None:
        self._vocabulary = vocabulary
        self._model = model
        self._made = threading.Event()
        self._outcome: LLTokenizer | JaxserveError | None = None

    def make(self) -> None:
        model = self._model
        try:
            self._outcome = token_table(self._vocabulary, model.vocab_size, model.eos_token_ids)
        except Exception as error:
            self._outcome = GrammarError(f"the vocabulary cannot be used for grammars: {error}")
        self._made.set()

    def get(self) -> LLTokenizer:
        self._made.wait()
        if isinstance(self._outcome, LLTokenizer):
            return self._outcome
        assert self._outcome is not None
        raise GrammarError(self._outcome.message)
