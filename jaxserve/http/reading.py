"""How the answers to a request are read as messages, and what the model is held to."""

from __future__ import annotations

import asyncio

from jaxserve.errors import GrammarError
from jaxserve.http.frontend import INLINE_TOOL_BYTES, Frontend
from jaxserve.http.sampling import Options
from jaxserve.text.held import Check, Held, Holding
from jaxserve.text.tools.tool import Toolbox
from jaxserve.types import ModelInfo


async def plan_message(
    frontend: Frontend, model: ModelInfo, options: Options, toolbox: Toolbox, prompt: str
) -> None:
    """Sets a request's readers and grammar.

    Args:
        prompt: as the chat template wrote it.

    Raises:
        GrammarError: what the output is to match cannot be held to.
        InvalidRequest: tools do not go with another grammar of the request.
        Overloaded: it takes too long to find out.
    """
    dialect = frontend.dialect
    options.reader = dialect.reader(toolbox, prompt)
    if options.reader is not None:
        options.shown_tokens = frozenset(dialect.special_tokens.values())
    holding = Holding(dialect, toolbox, prompt, options.wanted)
    inline = toolbox.num_bytes <= INLINE_TOOL_BYTES

    async def go_on(error: GrammarError | TimeoutError | None = None) -> Check | Held:
        return holding.next(error) if inline else await asyncio.to_thread(holding.next, error)

    step = await go_on()
    if isinstance(step, Check):
        async with frontend.checking_grammars(model):
            while isinstance(step, Check):
                step = await go_on(await _fault(frontend, model, step))
    options.wanted = step.wanted


async def _fault(
    frontend: Frontend, model: ModelInfo, asked: Check
) -> GrammarError | TimeoutError | None:
    """What is wrong with a grammar."""
    wanted, waiting = asked.wanted, asyncio.timeout(asked.limit_s)
    try:
        async with waiting:
            await frontend.grammars.check(wanted.grammar, model, wanted.param)
    except GrammarError as wrong:
        return wrong
    except TimeoutError as late:
        if not waiting.expired():
            raise
        return late
    return None
