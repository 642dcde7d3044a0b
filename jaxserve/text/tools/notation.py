"""How a model writes calls of tools: one value a notation, one file each.

A notation says how it is read (`reader`), and in which forms it is written. From the forms come the
grammar that holds the model to the tools' schemas (`call_grammar`), the instructions for models
whose chat template knows no tools, and what their earlier calls look like (`instructions`).
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from jaxserve.text.tools.reader import Reader


def openai_id() -> str:
    """A call's id as OpenAI draws them."""
    return "call_" + secrets.token_hex(12)


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """One way of writing calls: before, calls with something between, after.

    Attributes:
        open, close: around one call's arguments; "NAME" in `open` stands for the tool's name.
        trigger: the beginning of `before + open` from which on a call must follow, wherever it
            stands in the text. Empty where calls are only looked for at the message's beginning.
        bare: a regular expression of the message's beginning that must become a call; only where
            there is no trigger. "NAMES" in it stands for the alternatives.
    """

    before: str = ""
    open: str
    close: str
    between: str
    after: str = ""
    trigger: str = ""
    bare: str = ""

    def opened(self, name: str) -> str:
        """What stands before the arguments of a tool's call."""
        return self.open.replace("NAME", name)

    def written(self, calls: Sequence[tuple[str, str]]) -> str:
        """Names and arguments, as the model would have written them."""
        each = [self.opened(name) + arguments + self.close for name, arguments in calls]
        return self.before + self.between.join(each) + self.after


#: Arguments (a JSON object) as the notation writes them.
WriteArguments = Callable[[str], str]


def _as_it_is(text: str) -> str:
    return text


@dataclass(frozen=True, slots=True, kw_only=True)
class Notation:
    """One notation.

    Attributes:
        forms: in which calls come; the first is that of `required`, and of past calls.
        markers: texts of the notation that a model may have as special tokens.
        keyword_arguments: arguments are written as Python's keyword arguments, not as JSON.
        new_id: draws the id of a call.
        shape_id: any id as the model's chat template takes it.
    """

    name: str
    reader: type[Reader]
    forms: tuple[Form, ...]
    markers: tuple[str, ...] = ()
    keyword_arguments: bool = False
    write_arguments: WriteArguments = field(default=_as_it_is)
    new_id: Callable[[], str] = openai_id
    shape_id: Callable[[str], str] = field(default=_as_it_is)

    def written(self, calls: Sequence[tuple[str, str]]) -> str:
        """Past calls: names and arguments (JSON), as the model would have written them."""
        return self.forms[0].written(
            [(name, self.write_arguments(arguments)) for name, arguments in calls]
        )
