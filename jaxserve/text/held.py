"""What a request's outputs are held to: its grammar, with what its tools and reasoning bring.

Tools that are `strict` are held to their schemas, or the request is refused. Of the others, those
whose schemas cannot be held to may have any JSON object as arguments; their calls are still calls.

Whether a grammar is right is for others to find, each in its own way (a process that can be killed,
or right here): `Holding` asks for it and goes on with the answer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace

from jaxserve.errors import GrammarError
from jaxserve.text.asked_grammar import Wanted
from jaxserve.text.dialect import Dialect
from jaxserve.text.tools.tool import Tool, Toolbox

#: Seconds in which the tools of one request are looked at one by one.
_LOOSEN_S = 2.0
_ANY_OBJECT = {"type": "object"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """A question: is this grammar right?

    Attributes:
        limit_s: the answer is not waited for any longer; None for as long as it takes.
    """

    wanted: Wanted
    limit_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """The end: what the output must match; None where it is free."""

    wanted: Wanted | None


class Holding:
    """The way from what a request asks for to its grammar, a question at a time.

    Args:
        toolbox: that it may call from.
        prompt: as the chat template wrote it.
        content: what its words must match; None where they are free.

    `next` gives a question, or the end; it is given what was wrong with the last one's grammar.
    """

    def __init__(
        self, dialect: Dialect, toolbox: Toolbox, prompt: str, content: Wanted | None
    ) -> None:
        self._steps = _steps(dialect, toolbox, prompt, content)

    def next(self, error: GrammarError | TimeoutError | None = None) -> Check | Held:
        """The next question, or the end.

        Raises:
            GrammarError: what the output is to match cannot be held to.
            InvalidRequest: tools do not go with another grammar of the request.
        """
        try:
            return next(self._steps) if error is None else self._steps.throw(error)
        except StopIteration as end:
            return Held(wanted=end.value)


def hold(
    dialect: Dialect,
    toolbox: Toolbox,
    prompt: str,
    content: Wanted | None,
    check: Callable[[Wanted], None],
) -> Wanted | None:
    """`Holding` to its end, where `check` answers at once.

    Args:
        check: raises `GrammarError` where a grammar is wrong.

    Raises:
        GrammarError, InvalidRequest: as `Holding.next`.
    """
    holding = Holding(dialect, toolbox, prompt, content)
    step = holding.next()
    while isinstance(step, Check):
        error = None
        try:
            check(step.wanted)
        except GrammarError as wrong:
            error = wrong
        step = holding.next(error)
    return step.wanted


_Steps = Generator[Check, None, Wanted | None]


def _steps(dialect: Dialect, toolbox: Toolbox, prompt: str, content: Wanted | None) -> _Steps:
    if content is not None:
        yield Check(wanted=content)
    inner = content.grammar if content is not None else None
    param = content.param if content is not None and not toolbox else "tools"
    try:
        grammar = dialect.grammar(toolbox, prompt, inner)
        if grammar is None or grammar is inner:
            return content
        yield Check(wanted=Wanted(grammar, param))
    except GrammarError as error:
        loose = yield from _loosened(dialect, toolbox)
        if loose == toolbox:
            if error.param is None:  # nobody was asked yet
                raise GrammarError(f"{param}: {error.message}", param=param) from None
            raise
        grammar = dialect.grammar(loose, prompt, inner)
        assert grammar is not None
        yield Check(wanted=Wanted(grammar, param))
    return Wanted(grammar, param)


def _loosened(dialect: Dialect, toolbox: Toolbox) -> Generator[Check, None, Toolbox]:
    """The same tools, any object for those whose schemas cannot be held to.

    Raises:
        GrammarError: a strict tool is among them, or it takes too long to find out.
    """
    end_s = time.monotonic() + _LOOSEN_S
    tools = []
    for tool in toolbox.tools:
        left_s = end_s - time.monotonic()
        if left_s <= 0:
            raise _too_long()
        tools.append((yield from _held_or_loose(dialect, tool, left_s)))
    return replace(toolbox, tools=tools)


def _held_or_loose(dialect: Dialect, tool: Tool, left_s: float) -> Generator[Check, None, Tool]:
    alone = Toolbox(tools=[tool], callable=frozenset({tool.name}), required=True, several=False)
    try:
        grammar = dialect.grammar(alone, "", None)
        assert grammar is not None
        yield Check(wanted=Wanted(grammar, tool.param), limit_s=left_s)
    except TimeoutError:
        raise _too_long() from None
    except GrammarError:
        if tool.strict:
            raise
        return replace(tool, parameters=_ANY_OBJECT)
    return tool


def _too_long() -> GrammarError:
    return GrammarError(
        f"tools cannot be checked within {_LOOSEN_S:g} s; send fewer, or simpler schemas",
        param="tools",
    )
