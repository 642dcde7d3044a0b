"""Llama 3's notation: bare objects, perhaps behind a token that says that calls follow.

    <|python_tag|>{"name": "get_weather", "parameters": {"city": "Paris"}}

Without the token, only at the message's beginning.
"""

from __future__ import annotations

from jaxserve.text.source import Waiting
from jaxserve.text.tools.notation import Form, Notation
from jaxserve.text.tools.plain_json import BARE, BareReader

_TAG = "<|python_tag|>"
_OPEN, _CLOSE = '{"name": "NAME", "parameters": ', "}"


class Llama3Reader(BareReader):
    """See the module."""

    def _read(self) -> Waiting[None]:
        source = self._source
        self._space = yield from source.spaces()
        yield from self._bare_calls()
        while (yield from self._text_until([_TAG])):
            source.mark()
            yield from source.spaces()
            if (yield from self._objects()):
                yield from self._more_calls()
            else:
                self._no_call(_TAG)


LLAMA3 = Notation(
    name="llama3",
    reader=Llama3Reader,
    forms=(
        Form(open=_OPEN, close=_CLOSE, between="; ", bare=BARE),
        Form(before=_TAG, open=_OPEN, close=_CLOSE, between="; ", trigger=_TAG),
    ),
    markers=(_TAG,),
)
