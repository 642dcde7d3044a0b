"""Calls as Python: a list of them is the whole message, or they stand in a block of code.

    [get_weather(city="Paris"), get_time(zone="CET")]

    ```tool_code
    get_weather(city="Paris")
    ```

Llama 3.2 and 4 and other models write the first, Gemma the second. Arguments have names; their
values are Python's literals or JSON's. They are turned into JSON as they come.
"""

from __future__ import annotations

import json
import re
import string

from jaxserve.text.source import Waiting
from jaxserve.text.tools.notation import Form, Notation
from jaxserve.text.tools.reader import Reader

_BLOCK, _BLOCK_END = "```tool_code", "```"
_WORD_CHARS = frozenset(string.ascii_letters + string.digits + "_-.")
_NUMBER = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?", re.ASCII)
_WORDS = {
    "True": "true",
    "False": "false",
    "None": "null",
    "true": "true",
    "false": "false",
    "null": "null",
}
_ESCAPES = {"n": "\\n", "t": "\\t", "r": "\\r", "b": "\\b", "f": "\\f", "\\": "\\\\", '"': '\\"'}
_ESCAPES |= {"'": "'", "/": "/", "\n": ""}
#: Digits of escapes that give a character's number.
_NUMBERED = {"x": 2, "u": 4, "U": 8}
_CLOSING = {"[": "]", "(": ")", "{": "}"}
MAX_DEPTH = 64
_MAX_WORD = 256


class PythonicReader(Reader):
    """See the module."""

    def _read(self) -> Waiting[None]:
        source = self._source
        self._space = yield from source.spaces()
        source.mark()
        if not (yield from self._list()):
            source.back()
        while (yield from self._text_until([_BLOCK])):
            source.mark()
            if (yield from self._block()):
                continue
            self._no_call(_BLOCK)

    def _list(self) -> Waiting[bool]:
        """[f(…), g(…)]; whether it was calls, or had begun as one."""
        source = self._source
        if (yield from source.peek()) != "[":
            return False
        source.skip()
        yield from source.spaces()
        if not (yield from self._call()):
            return False
        yield from self._more(",")
        yield from source.spaces()
        yield from source.literal("]")
        return True

    def _block(self) -> Waiting[bool]:
        """Calls up to the end of a block of code, the first of which there must be."""
        source = self._source
        yield from source.spaces()
        if not (yield from self._call()):
            return False
        yield from self._more("")
        yield from source.spaces()
        yield from source.literal(_BLOCK_END, cut=True)
        return True

    def _more(self, separator: str) -> Waiting[None]:
        """Further calls."""
        source = self._source
        while True:
            source.mark()
            yield from source.spaces()
            if separator:
                yield from source.literal(separator)
                yield from source.spaces()
            if not (yield from self._call()):
                source.back()
                return

    def _call(self) -> Waiting[bool]:
        """name(key=value, …); whether it was a call, or had begun as one."""
        source = self._source
        name = yield from self._word()
        if name not in self._names or (yield from source.peek()) != "(":
            return False
        source.skip()
        source.forget()
        self._start(name)
        if (yield from self._keyword_arguments()):
            self._end()
        return True

    def _keyword_arguments(self) -> Waiting[bool]:
        """Says the arguments as a JSON object; whether they are whole."""
        source = self._source
        before = "{"
        while True:
            yield from source.spaces()
            if (yield from source.literal(")")):
                self._arguments("{}" if before == "{" else "}")
                return True
            key = yield from self._word()
            yield from source.spaces()
            if not key or not (yield from source.literal("=")):
                return False
            yield from source.spaces()
            self._arguments(f"{before}{json.dumps(key)}: ")
            before = ", "
            if not (yield from self._literal(0)):
                return False
            yield from source.spaces()
            if not (yield from source.literal(",")) and (yield from source.peek()) != ")":
                return False

    def _literal(self, depth: int) -> Waiting[bool]:
        """Says a Python or JSON value as JSON; whether it is whole."""
        source = self._source
        first = yield from source.peek()
        if first in ("'", '"'):
            source.skip()
            return (yield from self._string(first))
        if first in _CLOSING:
            source.skip()
            return depth < MAX_DEPTH and (yield from self._container(first, depth + 1))
        word = yield from self._word("+")
        json_word = _WORDS.get(word) or (word if _NUMBER.fullmatch(word) else None)
        # At the end of the text, a word may have been cut.
        if json_word is None or not (yield from source.peek()):
            return False
        self._arguments(json_word)
        return True

    def _container(self, opening: str, depth: int) -> Waiting[bool]:
        """The rest of a list, tuple or dictionary."""
        source = self._source
        closing = _CLOSING[opening]
        is_mapping = opening == "{"
        before = "{" if is_mapping else "["
        while True:
            yield from source.spaces()
            if (yield from source.literal(closing)):
                end = "}" if is_mapping else "]"
                self._arguments(end if before == ", " else before + end)
                return True
            self._arguments(before)
            before = ", "
            if is_mapping and not (yield from self._key()):
                return False
            if not (yield from self._literal(depth)):
                return False
            yield from source.spaces()
            if not (yield from source.literal(",")) and (yield from source.peek()) != closing:
                return False

    def _key(self) -> Waiting[bool]:
        """A dictionary's key, which must be a string."""
        source = self._source
        quote = yield from source.peek()
        if quote not in ("'", '"'):
            return False
        source.skip()
        if not (yield from self._string(quote)):
            return False
        yield from source.spaces()
        if not (yield from source.literal(":")):
            return False
        yield from source.spaces()
        self._arguments(": ")
        return True

    def _string(self, quote: str) -> Waiting[bool]:
        """The rest of a string."""
        source = self._source
        self._arguments('"')
        while True:
            text, found = source.find((quote, "\\"))
            if text:
                self._arguments(json.dumps(text, ensure_ascii=False)[1:-1])
            if found == quote:
                self._arguments('"')
                return True
            if found:
                if not (yield from self._escape()):
                    return False
            elif source.ended:
                return False
            else:
                yield

    def _escape(self) -> Waiting[bool]:
        """What follows a backslash; whether it is whole."""
        source = self._source
        char = yield from source.peek()
        if not char:
            return False
        source.skip()
        if char not in _NUMBERED:
            known = _ESCAPES.get(char)
            text = json.dumps("\\" + char)[1:-1] if known is None else known
            if text:
                self._arguments(text)
            return True
        digits: list[str] = []
        for _ in range(_NUMBERED[char]):
            digit = yield from source.peek()
            if digit not in string.hexdigits or not digit:
                return False
            digits.append(digit)
            source.skip()
        number = int("".join(digits), 16)
        if number > 0x10FFFF:
            return False
        self._arguments(f"\\u{number:04x}" if number < 0x10000 else json.dumps(chr(number))[1:-1])
        return True

    def _word(self, more: str = "") -> Waiting[str]:
        """A name, or a number."""
        source = self._source
        chars: list[str] = []
        while (char := (yield from source.peek())) and len(chars) <= _MAX_WORD:
            if char not in _WORD_CHARS and char not in more:
                break
            chars.append(char)
            source.skip()
        return "".join(chars)


def keyword_arguments(arguments: str) -> str:
    """A JSON object as keyword arguments."""
    return ", ".join(f"{key}={value!r}" for key, value in json.loads(arguments).items())


PYTHONIC = Notation(
    name="pythonic",
    reader=PythonicReader,
    forms=(
        Form(
            before="[", open="NAME(", close=")", between=", ", after="]", bare=r"\s*\[\s*(NAMES)\("
        ),
        Form(
            before=f"{_BLOCK}\n",
            open="NAME(",
            close=")",
            between="\n",
            after=f"\n{_BLOCK_END}",
            trigger=_BLOCK,
        ),
    ),
    keyword_arguments=True,
    write_arguments=keyword_arguments,
)
