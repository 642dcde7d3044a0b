"""What the readers of all notations share: text passed on, and calls written as JSON objects.

    {"name": "get_weather", "arguments": {"city": "Paris"}}

A reader is a generator (`source.Source`) that says parts as they become certain. An object is a
call once its name is one of the request's tools and it has arguments; until then it is held, at
most `MAX_HELD` characters, and where it turns out to be something else it is text after all.
"""

from __future__ import annotations

import abc
import json
from collections.abc import Callable, Collection, Sequence
from typing import Any, NoReturn

from jaxserve.text.message import CallEnd, CallStart, CallText, Part, Text
from jaxserve.text.source import Source, Waiting

#: Characters of what may become a call that are held back.
MAX_HELD = 1024

#: Keys of a call's object: of the arguments, and what may stand beside them.
ARGUMENTS = ("arguments", "parameters")
_KEYS = ("name", *ARGUMENTS, "type", "id")
_PUNCTUATION = frozenset('"{}[]\\')


class Reader(abc.ABC):
    """A reader of one message; a notation says in `_read` how it is written.

    Args:
        names: of the tools that may be called.
        new_id: draws a call's id.
    """

    def __init__(self, names: Collection[str], new_id: Callable[[], str]) -> None:
        self._names = names
        self._new_id = new_id
        self._source = Source()
        self._parts: list[Part] = []
        self._space = ""  # after the last text; only shown where more text follows
        self._called = False
        self._run = self._read()

    def add(self, text: str) -> list[Part]:
        """See `CallReader`."""
        self._source.feed(text)
        next(self._run, None)
        return self._said()

    def finish(self) -> list[Part]:
        """See `CallReader`."""
        self._source.ended = True
        for _ in self._run:
            raise AssertionError("a reader waits at the end of its text")
        if self._space and not self._called:
            self._parts.append(Text(self._space))
        return self._said()

    @abc.abstractmethod
    def _read(self) -> Waiting[None]:
        """The notation; ends when the source has."""

    def _said(self) -> list[Part]:
        parts, self._parts = self._parts, []
        return parts

    # ------------------------------------------------------------------------ text

    def _text(self, text: str) -> None:
        """Says text; white space before a call, or after the last one, is not shown."""
        shown = text.rstrip()
        if not shown:
            self._space += text
            return
        self._parts.append(Text(self._space + shown))
        self._space = text[len(shown) :]

    def _text_until(self, literals: Sequence[str]) -> Waiting[str]:
        """Says text up to one of some literals, and takes that; empty at the end."""
        while True:
            text, literal = self._source.find(literals)
            self._text(text)
            if literal or self._source.ended:
                return literal
            yield

    # ------------------------------------------------------------------------ calls

    def _no_call(self, literal: str) -> None:
        """What came behind a literal is no call: it is text, and the literal too.

        The beginning of a call that the message's end has cut is neither: nothing of it is certain.
        """
        if self._source.ended and not self._source.rest():
            self._source.forget()
        else:
            self._source.back()
            self._text(literal)

    def _start(self, name: str) -> None:
        self._space = ""
        self._called = True
        self._parts.append(CallStart(self._new_id(), name))

    def _arguments(self, text: str) -> None:
        self._parts.append(CallText(text))

    def _end(self) -> None:
        self._parts.append(CallEnd())

    def _objects(self) -> Waiting[bool]:
        """A call's object, or a list of them; whether it began with a call.

        What is wrong after the first call has begun is left for whoever reads on.
        """
        source = self._source
        if (yield from source.peek()) != "[":
            return (yield from self._object())
        source.skip()
        yield from source.spaces()
        if not (yield from self._object()):
            return False
        while True:
            yield from source.spaces()
            if (yield from source.peek()) != ",":
                yield from source.literal("]")
                return True
            source.mark()
            source.skip()
            yield from source.spaces()
            if not (yield from self._object()):
                source.back()
                return True

    def _object(self) -> Waiting[bool]:
        """One call's object; whether it was one, or had begun as one.

        The source is marked before it, and no more once a call has begun: where none has, the
        caller goes back.
        """
        source = self._source
        if (yield from source.peek()) != "{":
            return False
        source.skip()
        name = ""
        held: str | None = None
        begun = False
        while True:
            yield from source.spaces()
            key = yield from self._short_string()
            yield from source.spaces()
            if key not in _KEYS or not (yield from source.literal(":")):
                return begun
            if source.num_marked > MAX_HELD:
                return False
            yield from source.spaces()
            if key == "name":
                name = yield from self._short_string()
                if name not in self._names:
                    return begun
            elif key in ARGUMENTS and name and not begun:
                begun = True
                source.forget()
                self._start(name)
                if not (yield from self._call_arguments()):
                    return True
            else:
                value = yield from self._held_value()
                if value is None:
                    return begun
                held = value if key in ARGUMENTS else held
            yield from source.spaces()
            char = yield from source.peek()
            if char == ",":
                source.skip()
                continue
            if char != "}" or not name:
                return begun
            source.skip()
            if begun:
                self._end()
                return True
            return self._whole_call(name, "{}" if held is None else held)

    def _whole_call(self, name: str, arguments: str) -> bool:
        """A call whose arguments were held, because its name came after them."""
        text = whole_arguments(arguments)
        if text is None:
            return False
        self._source.forget()
        self._start(name)
        self._arguments(text)
        self._end()
        return True

    def _call_arguments(self) -> Waiting[bool]:
        """Says arguments as they come; whether they were an object, and whole."""
        pieces: list[str] = []

        def say(text: str) -> None:
            pieces.append(text)
            self._arguments(text)

        streams = (yield from self._source.peek()) == "{"
        whole = yield from self._value(say if streams else pieces.append)
        text = whole_arguments("".join(pieces)) if whole else None
        if text is None:
            return False
        if not streams:
            self._arguments(text)
        return True

    # ------------------------------------------------------------------------ JSON

    def _short_string(self) -> Waiting[str]:
        """A JSON string; empty where there is none, or it is too long for a name."""
        pieces: list[str] = []
        if (yield from self._source.peek()) != '"':
            return ""
        if not (yield from self._value(pieces.append, MAX_HELD)):
            return ""
        value = parse_json("".join(pieces))
        return value if isinstance(value, str) else ""

    def _held_value(self) -> Waiting[str | None]:
        """Any JSON value, as it stands; None where it is broken or too long to be held."""
        pieces: list[str] = []
        whole = yield from self._value(pieces.append, MAX_HELD)
        return "".join(pieces) if whole else None

    def _value(self, say: Callable[[str], None], limit: int | None = None) -> Waiting[bool]:
        """Says a JSON value piece by piece; whether its end has come, within the limit.

        Looks at brackets and strings only: whether it is JSON is for `parse_json`.
        """
        source = self._source
        depth = num_chars = 0
        quoted = escaped = False
        first = yield from source.peek()
        scalar = first not in ('"', "{", "[")
        while True:
            rest = source.rest()
            for index, char in enumerate(rest):
                if escaped:
                    escaped = False
                elif scalar:
                    if char in ",}]" or char.isspace():
                        say(source.take(index))
                        return num_chars + index > 0
                elif char not in _PUNCTUATION:
                    continue
                elif quoted:
                    escaped = char == "\\"
                    quoted = char != '"'
                    if char == '"' and not depth:
                        say(source.take(index + 1))
                        return True
                elif char == '"':
                    quoted = True
                elif char in "{[":
                    depth += 1
                elif char in "}]":
                    depth -= 1
                    if not depth:
                        say(source.take(index + 1))
                        return True
            num_chars += len(rest)
            if rest:
                say(source.take(len(rest)))
            if limit is not None and num_chars > limit:
                return False
            if source.ended:
                return scalar and num_chars > 0
            yield


def parse_json(text: str) -> Any:
    """A JSON value; `...` where it is none, which no JSON value is."""
    try:
        # Numbers are not looked into: their size is the tool's matter.
        return json.loads(text, parse_constant=_refuse, parse_int=str, parse_float=str)
    except (ValueError, RecursionError):
        return ...


def whole_arguments(text: str) -> str | None:
    """Arguments as one JSON object; None where they are not.

    Some models write the object as a JSON string, and null where there are none.
    """
    value = parse_json(text)
    if isinstance(value, str) and text.startswith('"'):
        text = value.strip()
        value = parse_json(text)
    if value is None:
        return "{}"
    return text if isinstance(value, dict) else None


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
