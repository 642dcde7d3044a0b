"""The grammar that holds a model to its tools.

It writes words as it likes, but a call that is begun is carried through, with the name of a tool
and arguments that match its schema.

    start: FREE | begin_0 call (between call)* after        tool_choice auto
    start: trigger call (between call)* after               required, or a tool by name

Free text holds no trigger of the notation: where one is complete, a call has to follow, since lazy
terminals end there and win. Calls end the message. Written in Lark as llguidance extends it (lazy
terminals, `&`, `~`, `%json`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from jaxserve.structured.grammars import in_lark
from jaxserve.text.reasoning import CLOSE, OPEN
from jaxserve.text.tools.arguments import json_rule, keyword_rules, quoted
from jaxserve.text.tools.notation import Form, Notation
from jaxserve.text.tools.tool import Tool, Toolbox
from jaxserve.types import Grammar

_ANY = r"(.|\n)*"
_SPACE = r"\s*"


def call_grammar(
    notation: Notation,
    toolbox: Toolbox,
    *,
    special_tokens: Mapping[str, int],
    reasons: bool = False,
    opened: bool = False,
    content: Grammar | None = None,
) -> Grammar:
    """What the output of a request with tools must match.

    Args:
        toolbox: with at least one tool that may be called.
        special_tokens: ids of the notation's markers that are the model's special tokens.
        reasons: the model may reason first; opened: its prompt has begun the thought.
        content: a JSON schema that words must match, which then are all of the message; None for
            any words.

    Raises:
        GrammarError: a schema cannot be written in this notation.
    """
    tools = toolbox.callables
    rules = _Rules(special_tokens)
    thought = rules.thought(opened=opened) if reasons else ""
    for index, tool in enumerate(tools):
        rules.add_arguments(index, tool, keywords=notation.keyword_arguments)
    forms = notation.forms[:1] if toolbox.required else notation.forms
    barred = _bare(forms, tools)
    if reasons and not opened:
        barred.append(_SPACE + _quoted(OPEN))
    options = []
    for number, form in enumerate(forms):
        rest = rules.calls(number, form, tools, several=toolbox.several)
        at_once = toolbox.required or content is not None or not form.trigger
        head = rules.spell(form.trigger) if at_once else rules.begin(number, form.trigger, barred)
        options.append(f"{head} {rest}")
    if not toolbox.required:
        options.append(rules.words(barred, content))
    start = f"start: {thought} ({' | '.join(options)})"
    return Grammar(kind="lark", text="\n".join([start, *rules.lines, ""]))


def thought_grammar(
    content: Grammar, *, special_tokens: Mapping[str, int], opened: bool
) -> Grammar:
    """Content behind reasoning that is free.

    Raises:
        GrammarError: it is in EBNF.
    """
    rules = _Rules(special_tokens)
    thought = rules.thought(opened=opened)
    words = rules.words((), content)
    return Grammar(kind="lark", text="\n".join([f"start: {thought} {words}", *rules.lines, ""]))


class _Rules:
    """Rules and terminals, as they are needed.

    Attributes:
        lines: of Lark.
    """

    def __init__(self, special_tokens: Mapping[str, int]) -> None:
        self.lines: list[str] = []
        self._special_tokens = special_tokens

    def add_arguments(self, index: int, tool: Tool, *, keywords: bool) -> None:
        """arguments_N: what stands between a call's opening and its close."""
        name = f"arguments_{index}"
        if keywords:
            self.lines += keyword_rules(name, tool)
        else:
            self.lines.append(f"{name}: {json_rule(_as_object(tool.schema))}")

    def calls(self, number: int, form: Form, tools: Sequence[Tool], *, several: bool) -> str:
        """The calls of one form, behind its trigger."""
        first, further = f"first_{number}", f"next_{number}"
        openings = [form.before + form.opened(tool.name) for tool in tools]
        self._alternatives(first, [text[len(form.trigger) :] for text in openings], form)
        after = self.spell(form.after)
        if not several:
            return f"{first} {after}"
        openings = [form.between + form.opened(tool.name) for tool in tools]
        self._alternatives(further, openings, form)
        return f"{first} {further}* {after}"

    def _alternatives(self, name: str, openings: Sequence[str], form: Form) -> None:
        close = self.spell(form.close)
        each = [
            f"{self.spell(opening)} arguments_{index} {close}"
            for index, opening in enumerate(openings)
        ]
        self.lines.append(f"{name}: " + " | ".join(each))

    def begin(self, number: int, trigger: str, barred: Sequence[str]) -> str:
        """Free text up to a trigger, and the trigger."""
        pieces = self._pieces(trigger)
        first = pieces[0]
        if isinstance(first, int):
            self.lines.append(f"BEFORE_{number}: {_excluding(barred)}")
            return f"BEFORE_{number} {_spelt(pieces)}"
        name = f"begin_{number}"
        self.lines.append(f"BEGIN_{number}: {_excluding(barred, _ANY + _quoted(first))}")
        self.lines.append(f"{name}[lazy]: BEGIN_{number}")
        return f"{name} {_spelt(pieces[1:])}"

    def words(self, barred: Sequence[str], content: Grammar | None) -> str:
        """A message without calls."""
        if content is not None:
            self.lines.append(f"words: {in_lark(content)}")
            return "words"
        self.lines.append(f"FREE: {_excluding(barred)}")
        return "FREE"

    def thought(self, *, opened: bool) -> str:
        """The reasoning in front."""
        pieces = self._pieces(CLOSE)
        first = pieces[0]
        if isinstance(first, int):
            self.lines.append(f"THOUGHT: /{_ANY}/")
            close = f"THOUGHT <[{first}]>"
        else:
            self.lines.append(f"thought[lazy]: /{_ANY}{_quoted(first)}/")
            close = "thought"
        self.lines.append(r"SPACE: /\s{0,8}/")
        if opened:
            return f"{close} SPACE"
        return f"({self.spell(OPEN)} {close} SPACE)?"

    def spell(self, text: str) -> str:
        """A text, special tokens as such."""
        return _spelt(self._pieces(text))

    def _pieces(self, text: str) -> list[str | int]:
        names = sorted(filter(text.__contains__, self._special_tokens), key=len, reverse=True)
        parts = re.split(f"({'|'.join(map(re.escape, names))})", text) if names else [text]
        return [self._special_tokens.get(part, part) for part in parts if part]


def _as_object(schema: Mapping[str, object]) -> Mapping[str, object]:
    """Arguments are an object, whatever else the schema says."""
    return schema if schema.get("type") == "object" else {"type": "object", **schema}


def _bare(forms: Sequence[Form], tools: Sequence[Tool]) -> list[str]:
    names = "|".join(re.escape(tool.name) for tool in tools)
    return [form.bare.replace("NAMES", names) for form in forms if form.bare]


def _excluding(barred: Sequence[str], wanted: str = _ANY) -> str:
    """A terminal: what is wanted, and does not begin with any of some expressions."""
    return " & ".join([f"/{wanted}/", *(f"~/{expression}{_ANY}/" for expression in barred)])


def _quoted(text: str) -> str:
    """A text as a regular expression between slashes."""
    return re.escape(text).replace("/", r"\/")


def _spelt(pieces: Sequence[str | int]) -> str:
    return " ".join(f"<[{p}]>" if isinstance(p, int) else quoted(p) for p in pieces)
