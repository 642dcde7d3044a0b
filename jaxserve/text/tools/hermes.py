"""Hermes' notation, which Qwen has too: each call is an object between two tags.

    <tool_call>
    {"name": "get_weather", "arguments": {"city": "Paris"}}
    </tool_call>

A list of objects between the tags will do as well.
"""

from __future__ import annotations

from jaxserve.text.source import Waiting
from jaxserve.text.tools.notation import Form, Notation
from jaxserve.text.tools.reader import Reader

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"


class HermesReader(Reader):
    """See the module."""

    def _read(self) -> Waiting[None]:
        source = self._source
        while (yield from self._text_until([_OPEN])):
            source.mark()
            yield from source.spaces()
            if (yield from self._objects()):
                yield from source.spaces()
                yield from source.literal(_CLOSE, cut=True)
            else:
                self._no_call(_OPEN)


HERMES = Notation(
    name="hermes",
    reader=HermesReader,
    forms=(
        Form(
            open=_OPEN + '\n{"name": "NAME", "arguments": ',
            close="}\n" + _CLOSE,
            between="\n",
            trigger=_OPEN,
        ),
    ),
    markers=(_OPEN, _CLOSE),
)
