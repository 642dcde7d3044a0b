"""What an assistant's message is made of, and how it is read from text that comes in pieces.

A model writes one text: perhaps its reasoning, then words for the user, then calls of tools in the
notation that it was trained on. `MessageReader` turns that text into `Part`s as soon as they are
certain; joined by `gather` they are the message. Streaming and not are two readers of the same
parts, so they cannot differ.

Invariants: the parts, joined, do not depend on how the text was cut. A call has a `CallEnd` only if
its arguments are one whole JSON object. What only looks like a call is text; so is what is left of
a call that goes wrong.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Text:
    """Words for the user."""

    text: str


@dataclass(frozen=True, slots=True)
class Thought:
    """A piece of the reasoning before the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """A call begins: the tool is certain. All that follows, up to the next one, is of this call."""

    id: str
    name: str


@dataclass(frozen=True, slots=True)
class CallText:
    """A piece of the arguments' JSON."""

    text: str


@dataclass(frozen=True, slots=True)
class CallEnd:
    """The arguments are whole."""


Part = Text | Thought | CallStart | CallText | CallEnd


@dataclass(slots=True)
class Call:
    """One call of a tool.

    Attributes:
        arguments: a JSON object as text; the beginning of one where not `complete`.
    """

    id: str
    name: str
    arguments: str = ""
    complete: bool = False


@dataclass(slots=True)
class Message:
    """A whole message.

    Attributes:
        reasoning: None where there is none.
    """

    text: str = ""
    reasoning: str | None = None
    calls: list[Call] = field(default_factory=list)


class CallReader(Protocol):
    """Finds the calls of one notation in a message's text."""

    def add(self, text: str) -> list[Part]:
        """Takes the next text; what is certain now."""
        ...

    def finish(self) -> list[Part]:
        """The text has ended: what was still waiting."""
        ...


def gather(parts: Iterable[Part]) -> Message:
    """The parts as one message."""
    message = Message()
    texts: list[str] = []
    thoughts: list[str] = []
    arguments: list[list[str]] = []
    for part in parts:
        match part:
            case Text(text):
                texts.append(text)
            case Thought(text):
                thoughts.append(text)
            case CallStart(call_id, name):
                message.calls.append(Call(call_id, name))
                arguments.append([])
            case CallText(text):
                arguments[-1].append(text)
            case CallEnd():
                message.calls[-1].complete = True
    message.text = "".join(texts)
    message.reasoning = "".join(thoughts) if thoughts else None
    for call, pieces in zip(message.calls, arguments, strict=True):
        call.arguments = "".join(pieces)
    return message


def joined(parts: Iterable[Part]) -> list[Part]:
    """The same parts, neighbours of one kind as one."""
    whole: list[Part] = []
    for part in parts:
        last = whole[-1] if whole else None
        match last, part:
            case Text(before), Text(text):
                whole[-1] = Text(before + text)
            case Thought(before), Thought(text):
                whole[-1] = Thought(before + text)
            case CallText(before), CallText(text):
                whole[-1] = CallText(before + text)
            case _:
                whole.append(part)
    return whole


class MessageReader:
    """Reads one message: reasoning, then text and calls.

    Args:
        calls: of the notation in which calls are looked for; None for none.
        thoughts: takes the reasoning out; None where the model does not reason.
        single: the message ends with its first call.

    Attributes:
        done: the one call that there may be is complete; what follows is not wanted.
        num_calls: whole calls so far.
    """

    __slots__ = ("_calls", "_open", "_single", "_thoughts", "done", "num_calls")

    def __init__(
        self, calls: CallReader | None, thoughts: ThoughtReader | None, *, single: bool = False
    ) -> None:
        self._calls = calls
        self._thoughts = thoughts
        self._single = single
        self._open = False
        self.done = False
        self.num_calls = 0

    @property
    def thinking(self) -> bool:
        """Whether the reasoning still goes on."""
        return self._thoughts is not None and self._thoughts.thinking

    @property
    def called(self) -> bool:
        """Whether the message is calls that are all whole."""
        return self.num_calls > 0 and not self._open

    def add(self, text: str) -> list[Part]:
        """Takes the next text; what is certain now. After the end, nothing is."""
        if self.done or not text:
            return []
        if self._thoughts is None:
            return self._counted(self._calls.add(text) if self._calls else [Text(text)])
        return self._counted(self._split(self._thoughts.add(text)))

    def finish(self) -> list[Part]:
        """The text has ended: what was still waiting."""
        if self.done:
            return []
        parts = self._split(self._thoughts.finish()) if self._thoughts else []
        if self._calls is not None:
            parts += self._calls.finish()
        return self._counted(parts)

    def _split(self, parts: list[Part]) -> list[Part]:
        if self._calls is None:
            return parts
        split: list[Part] = []
        for part in parts:
            split += self._calls.add(part.text) if isinstance(part, Text) else [part]
        return split

    def _counted(self, parts: list[Part]) -> list[Part]:
        for index, part in enumerate(parts):
            if isinstance(part, CallStart):
                self._open = True
            elif isinstance(part, CallEnd):
                self._open = False
                self.num_calls += 1
                if self._single:
                    self.done = True
                    return parts[: index + 1]
        return parts


class ThoughtReader(Protocol):
    """Takes reasoning out of a text: its parts are `Thought` and `Text`."""

    @property
    def thinking(self) -> bool: ...

    def add(self, text: str) -> list[Part]:
        """Takes the next text; what is certain now."""
        ...

    def finish(self) -> list[Part]:
        """The text has ended: what was still waiting."""
        ...
