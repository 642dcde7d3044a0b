"""How the answers to a request are read as messages, and what the model is held to.

Tools that are `strict` are held to their schemas, or the request is refused. Of the others, those
whose schemas cannot be held to may have any JSON object as arguments; their calls are still calls.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace

from jaxserve.errors import GrammarError
from jaxserve.http.frontend import Frontend
from jaxserve.http.sampling import Options
from jaxserve.http.structured import Wanted
from jaxserve.text.tools.tool import Tool, Toolbox
from jaxserve.types import ModelInfo

#: Seconds in which the tools of one request are looked at one by one.
_LOOSEN_S = 2.0
_ANY_OBJECT = {"type": "object"}


async def plan_message(
    frontend: Frontend, model: ModelInfo, options: Options, toolbox: Toolbox, prompt: str
) -> None:
    """Sets a request's readers and grammar.

    Args:
        prompt: as the chat template wrote it.

    Raises:
        GrammarError: what the output is to match cannot be held to.
        InvalidRequest: tools do not go with another grammar of the request.
    """
    dialect = frontend.dialect
    options.reader = dialect.reader(toolbox, prompt)
    if options.reader is not None:
        options.shown_tokens = frozenset(dialect.special_tokens.values())
    await frontend.check_grammar(options.wanted, model)
    content = options.wanted.grammar if options.wanted is not None else None
    param = "tools" if toolbox or options.wanted is None else options.wanted.param
    try:
        grammar = await frontend.grammar(toolbox, prompt, content)
        if grammar is None or grammar is content:
            return
        await frontend.check_grammar(Wanted(grammar, param), model)
    except GrammarError:
        loose = await _loosened(frontend, model, toolbox)
        if loose == toolbox:
            raise
        grammar = await frontend.grammar(loose, prompt, content)
        assert grammar is not None
        await frontend.check_grammar(Wanted(grammar, param), model)
    options.wanted = Wanted(grammar, param)


async def _loosened(frontend: Frontend, model: ModelInfo, toolbox: Toolbox) -> Toolbox:
    """The same tools, any object for those whose schemas cannot be held to.

    Raises:
        GrammarError: a strict tool is among them, or it takes too long to find out.
    """
    try:
        async with asyncio.timeout(_LOOSEN_S):
            tools = [await _held_or_loose(frontend, model, tool) for tool in toolbox.tools]
    except TimeoutError:
        raise GrammarError(
            f"tools cannot be checked within {_LOOSEN_S:g} s; send fewer, or simpler schemas",
            param="tools",
        ) from None
    return replace(toolbox, tools=tools)


async def _held_or_loose(frontend: Frontend, model: ModelInfo, tool: Tool) -> Tool:
    alone = Toolbox(tools=[tool], callable=frozenset({tool.name}), required=True, several=False)
    try:
        grammar = await frontend.grammar(alone, "", None)
        assert grammar is not None
        await frontend.check_grammar(Wanted(grammar, tool.param), model)
    except GrammarError:
        if tool.strict:
            raise
        return replace(tool, parameters=_ANY_OBJECT)
    return tool
