"""Mistral's notation: a token, then a list of objects; in newer models, a name and its arguments.

    [TOOL_CALLS][{"name": "get_weather", "arguments": {"city": "Paris"}}]
    [TOOL_CALLS]get_weather[ARGS]{"city": "Paris"}

Both are read; which one is written depends on the model (`MISTRAL`, `MISTRAL_NAMED`).
"""

from __future__ import annotations

import secrets
import string

from jaxserve.text.source import Waiting
from jaxserve.text.tools.notation import Form, Notation
from jaxserve.text.tools.reader import Reader

_CALLS, _ARGS, _CALL_ID = "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"
_NAME_CHARS = frozenset(string.ascii_letters + string.digits + "_-")
_ID_CHARS = string.ascii_letters + string.digits
_ID_LENGTH = 9


def mistral_id() -> str:
    """A call's id: Mistral's templates refuse any but 9 letters and digits."""
    return "".join(secrets.choice(_ID_CHARS) for _ in range(_ID_LENGTH))


def shortened_id(call_id: str) -> str:
    """The end of an id, in that form."""
    kept = "".join(char for char in call_id if char in _ID_CHARS)
    return kept[-_ID_LENGTH:].rjust(_ID_LENGTH, "0")


class MistralReader(Reader):
    """See the module."""

    def _read(self) -> Waiting[None]:
        source = self._source
        while (yield from self._text_until([_CALLS])):
            source.mark()
            yield from source.spaces()
            begins = yield from source.peek()
            is_call = self._objects() if begins in ("[", "{") else self._named()
            if not (yield from is_call):
                self._no_call(_CALLS)

    def _named(self) -> Waiting[bool]:
        """NAME[ARGS]{…}; whether it was a call, or had begun as one."""
        source = self._source
        name = yield from self._word()
        if name not in self._names:
            return False
        if (yield from source.literal(_CALL_ID, cut=True)):
            yield from self._word()
        yield from source.literal(_ARGS, cut=True)
        yield from source.spaces()
        if (yield from source.peek()) != "{":
            return False
        source.forget()
        self._start(name)
        if (yield from self._call_arguments()):
            self._end()
        return True

    def _word(self) -> Waiting[str]:
        chars: list[str] = []
        source = self._source
        while (char := (yield from source.peek())) in _NAME_CHARS and len(chars) <= 64:
            chars.append(char)
            source.skip()
        return "".join(chars)


MISTRAL = Notation(
    name="mistral",
    reader=MistralReader,
    forms=(
        Form(
            before=_CALLS + "[",
            open='{"name": "NAME", "arguments": ',
            close="}",
            between=", ",
            after="]",
            trigger=_CALLS,
        ),
    ),
    markers=(_CALLS, _ARGS, _CALL_ID),
    new_id=mistral_id,
    shape_id=shortened_id,
)
MISTRAL_NAMED = Notation(
    name="mistral",
    reader=MistralReader,
    forms=(Form(open=f"{_CALLS}NAME{_ARGS}", close="", between="", trigger=_CALLS),),
    markers=(_CALLS, _ARGS, _CALL_ID),
    new_id=mistral_id,
    shape_id=shortened_id,
)
