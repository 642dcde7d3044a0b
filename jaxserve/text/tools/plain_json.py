"""Calls as bare JSON: the message is an object for each call, or a list of them.

    {"name": "get_weather", "arguments": {"city": "Paris"}}

A message that begins in another way is text to its end.
"""

from __future__ import annotations

from jaxserve.text.source import Waiting
from jaxserve.text.tools.notation import Form, Notation
from jaxserve.text.tools.reader import Reader

#: What may stand between two calls, beside white space.
_SEPARATORS = (";", ",")
#: How a message begins that is calls.
BARE = r'\s*\[?\s*\{\s*"name"'


class BareReader(Reader):
    """Reads calls at the message's beginning."""

    def _read(self) -> Waiting[None]:
        self._space = yield from self._source.spaces()
        yield from self._bare_calls()
        yield from self._text_until([])

    def _bare_calls(self) -> Waiting[None]:
        """Objects, as long as there are any; what is none is left."""
        self._source.mark()
        if (yield from self._objects()):
            yield from self._more_calls()
        else:
            self._source.back()

    def _more_calls(self) -> Waiting[None]:
        """Further objects, behind at least one."""
        source = self._source
        while True:
            source.mark()
            yield from source.spaces()
            for separator in _SEPARATORS:
                if (yield from source.literal(separator)):
                    yield from source.spaces()
                    break
            if not (yield from self._objects()):
                source.back()
                return


JSON = Notation(
    name="json",
    reader=BareReader,
    forms=(Form(open='{"name": "NAME", "arguments": ', close="}", between="\n", bare=BARE),),
)
