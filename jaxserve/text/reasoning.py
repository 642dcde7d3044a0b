"""Reasoning models write what they think before they answer: `<think>… </think>`.

Some chat templates open the thought in the prompt, so that the text begins inside it. A text that
does not begin with the tag, and was not opened, has no reasoning.
"""

from __future__ import annotations

from jaxserve.text.message import Part, Text, Thought
from jaxserve.text.source import Source, Waiting

OPEN, CLOSE = "<think>", "</think>"


def is_open(prompt: str) -> bool:
    """Whether a prompt ends inside a thought."""
    return prompt.rstrip().endswith(OPEN)


class ThinkReader:
    """Takes the reasoning out of a text. White space around it belongs to nothing.

    Args:
        opened: the text begins inside the thought.

    Attributes:
        thinking: the text stands inside the thought.
    """

    def __init__(self, *, opened: bool = False) -> None:
        self.thinking = opened
        self._source = Source()
        self._parts: list[Part] = []
        self._run = self._read()

    def add(self, text: str) -> list[Part]:
        """See `ThoughtReader`."""
        self._source.feed(text)
        next(self._run, None)
        return self._said()

    def finish(self) -> list[Part]:
        """See `ThoughtReader`."""
        self._source.ended = True
        next(self._run, None)
        return self._said()

    def _said(self) -> list[Part]:
        parts, self._parts = self._parts, []
        return parts

    def _read(self) -> Waiting[None]:
        source = self._source
        space = yield from source.spaces()
        if (yield from source.literal(OPEN)) or self.thinking:
            self.thinking = True
            yield from source.spaces()
            yield from self._thought()
            self.thinking = False
            yield from source.spaces()
        elif space:
            self._parts.append(Text(space))
        while True:
            text = source.take(len(source.rest()))
            if text:
                self._parts.append(Text(text))
            if source.ended:
                return
            yield

    def _thought(self) -> Waiting[None]:
        space = ""  # before the closing tag it is not shown
        while True:
            text, closed = self._source.find((CLOSE,))
            shown = text.rstrip()
            if shown:
                self._parts.append(Thought(space + shown))
                space = text[len(shown) :]
            else:
                space += text
            if closed or self._source.ended:
                return
            yield
