"""How a model's messages are written and read: its notation of calls, its reasoning, its template.

Made once at start from the chat template and the tokenizer, or as the settings say; the log says
what was chosen. A request's messages are rendered through it, what it may write is held to by its
grammar, and what it writes is read by its readers.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxserve.config import ToolsConfig
from jaxserve.errors import InvalidRequest
from jaxserve.text import reasoning
from jaxserve.text.message import MessageReader
from jaxserve.text.reasoning import ThinkReader
from jaxserve.text.template import ChatTemplate
from jaxserve.text.tokenizer import Tokenizer
from jaxserve.text.tools.call_grammar import call_grammar, thought_grammar
from jaxserve.text.tools.hermes import HERMES
from jaxserve.text.tools.instructions import without_tools
from jaxserve.text.tools.llama3 import LLAMA3
from jaxserve.text.tools.mistral import MISTRAL, MISTRAL_NAMED
from jaxserve.text.tools.notation import Notation
from jaxserve.text.tools.plain_json import JSON
from jaxserve.text.tools.pythonic import PYTHONIC
from jaxserve.text.tools.tool import Toolbox
from jaxserve.types import Grammar

logger = logging.getLogger(__name__)

_BY_NAME = {
    "hermes": HERMES,
    "llama3": LLAMA3,
    "mistral": MISTRAL,
    "pythonic": PYTHONIC,
    "json": JSON,
}
#: What a template of each notation holds; the first that fits is taken.
_SIGNS: tuple[tuple[str, Notation], ...] = (
    ("[func_name1(", PYTHONIC),
    ("<tool_call>", HERMES),
    ("[TOOL_CALLS]", MISTRAL),
    ("<|python_start|>", PYTHONIC),
    ("<|python_tag|>", LLAMA3),
    ("Environment: ipython", LLAMA3),
    ("tool_code", PYTHONIC),
    ("<start_of_turn>", PYTHONIC),  # Gemma
)
_NO_TOOLS = Toolbox()


@dataclass(frozen=True, kw_only=True)
class Dialect:
    """See the module.

    Attributes:
        reasons: the model writes its reasoning in front.
        special_tokens: those texts of notation and reasoning that are special tokens, by their ids.
        native: the chat template knows tools; where not, they are told in plain words.
        system_role: the chat template knows system messages.
    """

    notation: Notation = HERMES
    reasons: bool = False
    special_tokens: Mapping[str, int]
    native: bool = False
    system_role: bool = True

    def render(
        self,
        template: ChatTemplate,
        messages: Sequence[Mapping[str, Any]],
        *,
        toolbox: Toolbox = _NO_TOOLS,
        **kwargs: Any,
    ) -> str:
        """Messages as one prompt (`ChatTemplate.render`), with the tools that may be called.

        Raises:
            InvalidRequest: the template refuses these messages.
        """
        if self.native:
            tools = [tool.document for tool in toolbox.tools] if toolbox else None
            taken = [_native(message, self.notation) for message in messages]
            try:
                return template.render(taken, tools=tools, **kwargs)
            except InvalidRequest:
                if not any(len(message.get("tool_calls", ())) > 1 for message in taken):
                    raise
            return template.render(_one_by_one(taken), tools=tools, **kwargs)
        if toolbox or any(m["role"] == "tool" or "tool_calls" in m for m in messages):
            messages = without_tools(messages, toolbox, self.notation, system_role=self.system_role)
        return template.render(messages, **kwargs)

    def reader(self, toolbox: Toolbox, prompt: str) -> Callable[[], MessageReader] | None:
        """Makes the readers of a request's choices; None where its messages are plain text."""
        if not toolbox and not self.reasons:
            return None
        opened = reasoning.is_open(prompt)

        def make() -> MessageReader:
            notation = self.notation
            calls = notation.reader(toolbox.callable, notation.new_id) if toolbox else None
            thoughts = ThinkReader(opened=opened) if self.reasons else None
            return MessageReader(calls, thoughts, single=not toolbox.several)

        return make

    def grammar(self, toolbox: Toolbox, prompt: str, content: Grammar | None) -> Grammar | None:
        """What the output must match; None where it is free.

        Args:
            content: what its words must match, beside reasoning and calls; in EBNF, the whole
                output.

        Raises:
            InvalidRequest: that is not a JSON schema, and there are tools.
            GrammarError: a tool's schema cannot be written in the notation, or EBNF would have to
                stand behind a thought.
        """
        opened = self.reasons and reasoning.is_open(prompt)
        if not toolbox:
            if content is None or not self.reasons:
                return content
            if content.kind == "ebnf" and not opened:
                return content
            return thought_grammar(content, special_tokens=self.special_tokens, opened=opened)
        if content is not None and content.kind != "json_schema":
            raise InvalidRequest(
                "tools that may be called go with response_format only; leave out tools, or send "
                "tool_choice none",
                param="tools",
            )
        return call_grammar(
            self.notation,
            toolbox,
            special_tokens=self.special_tokens,
            reasons=self.reasons,
            opened=opened,
            content=content,
        )


#: Of a model of which nothing is known: told in plain words, its text left as it is.
PLAIN = Dialect(special_tokens={})


def make_dialect(
    template: ChatTemplate | None, tokenizer: Tokenizer, config: ToolsConfig
) -> Dialect:
    """The dialect of a model, as its template shows it and the settings say."""
    source = template.source + template.tools_source if template is not None else ""
    native = template is not None and template.knows_tools
    notation = _notation(source, config.parser, native)
    reasons = config.reasoning == "think" or (
        config.reasoning == "auto" and reasoning.OPEN in source and reasoning.CLOSE in source
    )
    markers = [*notation.markers, *((reasoning.OPEN, reasoning.CLOSE) if reasons else ())]
    if template is not None:
        logger.info(
            "tool calls: %s notation%s%s",
            notation.name,
            "" if native else " (the chat template knows no tools: they are told in plain words)",
            "; reasoning between <think> and </think>" if reasons else "",
        )
    return Dialect(
        notation=notation,
        reasons=reasons,
        special_tokens=_special_tokens(tokenizer, markers),
        native=native,
        system_role=template is None or _takes_system(template),
    )


def _notation(source: str, parser: str, native: bool) -> Notation:
    notation = _BY_NAME.get(parser)
    if notation is None:
        found = [notation for sign, notation in _SIGNS if sign in source]
        notation = found[0] if found else JSON if native else HERMES
    if notation is MISTRAL and "[ARGS]" in source:
        return MISTRAL_NAMED
    return notation


def _special_tokens(tokenizer: Tokenizer, markers: Sequence[str]) -> dict[str, int]:
    found = {}
    for marker in markers:
        ids = tokenizer.encode(marker, add_special_tokens=False)
        if len(ids) == 1 and tokenizer.is_special(ids[0]):
            found[marker] = ids[0]
    return found


def _takes_system(template: ChatTemplate) -> bool:
    """Tries: templates that know no system messages refuse them."""
    messages = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]
    try:
        template.render(messages)
    except InvalidRequest:
        return False
    return True


def _native(message: Mapping[str, Any], notation: Notation) -> dict[str, Any]:
    """As templates expect it: arguments as an object, ids in the notation's form."""
    taken = dict(message)
    if "tool_call_id" in taken:
        taken["tool_call_id"] = notation.shape_id(taken["tool_call_id"])
    calls = taken.get("tool_calls")
    if calls:
        taken["tool_calls"] = [_native_call(call, notation) for call in calls]
    return taken


def _native_call(call: Mapping[str, Any], notation: Notation) -> dict[str, Any]:
    function = call["function"]
    arguments = function["arguments"]
    try:
        value = json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        value = arguments
    shown = value if isinstance(value, dict) else arguments
    call_id = notation.shape_id(call["id"])
    return {**call, "id": call_id, "function": {**function, "arguments": shown}}


def _one_by_one(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """For templates that take one call a message: each, and then what came of it."""
    single: list[Mapping[str, Any]] = []
    answers = {m["tool_call_id"]: m for m in messages if m["role"] == "tool"}
    placed: set[str] = set()
    for message in messages:
        calls = message.get("tool_calls", ())
        if len(calls) > 1:
            for place, call in enumerate(calls):
                words = message["content"] if place == 0 else ""
                single.append({**message, "content": words, "tool_calls": [call]})
                if call["id"] in answers:
                    placed.add(call["id"])
                    single.append(answers[call["id"]])
        elif message["role"] != "tool" or message["tool_call_id"] not in placed:
            single.append(message)
    return single
