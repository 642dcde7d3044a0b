"""One choice's text, read as a message where a request has tools or its model reasons.

`ChoiceText` makes text of tokens, a `MessageReader` parts of a message of that; here they go on
together, since either may say that the output has ended. Over HTTP and offline alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from jaxserve.text.choice import ChoiceText
from jaxserve.text.message import MessageReader, Part, Text, joined
from jaxserve.types import FinishReason

#: Why a message of calls ends, in OpenAI's word.
TOOL_CALLS = "tool_calls"


class Took(NamedTuple):
    """The tokens of a part: some that showed nothing (a marker, white space), then its own."""

    before: int
    own: int


@dataclass(slots=True)
class ReadDelta:
    """What some tokens added.

    Attributes:
        text, num_tokens, stopped: as of `TextDelta`; stopped also where the message is over.
        parts: what the text brings of the message; none where it is not read.
        part_tokens: the tokens of each part; they may have come with earlier deltas.
        reasoning_tokens: of these tokens, those of the reasoning.
    """

    text: str = ""
    num_tokens: int = 0
    stopped: bool = False
    parts: Sequence[Part] = ()
    part_tokens: Sequence[Took] = ()
    reasoning_tokens: int = 0


class Ending(NamedTuple):
    """The last parts of a choice, with the tokens of each, and why it ended."""

    parts: Sequence[Part]
    part_tokens: Sequence[Took]
    reason: str


class ReadChoice:
    """See the module.

    Args:
        reader: of the message; None where the text is not read.
    """

    __slots__ = ("_reader", "_text", "_untold")

    def __init__(self, text: ChoiceText, reader: MessageReader | None = None) -> None:
        self._text = text
        self._reader = reader
        self._untold: list[int] = []  # characters of each token since the last part

    def add(self, token_ids: Sequence[int]) -> ReadDelta:
        """Takes the next tokens. After the end, further ones are ignored."""
        reader = self._reader
        if reader is None:
            added = self._text.add(token_ids)
            return ReadDelta(added.text, added.num_tokens, added.stopped)
        # Token by token, since a message may end between two, as at a stop string.
        delta = ReadDelta(parts=[], part_tokens=[])
        texts: list[str] = []
        for token_id in token_ids:
            thinks = reader.thinking
            added = self._text.add((token_id,))
            texts.append(added.text)
            delta.num_tokens += added.num_tokens
            self._untold.append(len(added.text))
            self._tell(reader.add(added.text), delta)
            delta.reasoning_tokens += thinks or reader.thinking
            delta.stopped = added.stopped or reader.done
            if delta.stopped:
                break
        delta.text = "".join(texts)
        return delta

    def finish(self) -> ReadDelta:
        """The sequence has ended: what was still waiting."""
        tail = self._text.finish()
        delta = ReadDelta(tail.text, 0, tail.stopped, [], [])
        if self._reader is not None:
            self._tell(self._reader.add(tail.text), delta)
        return delta

    def close(self, parts: Sequence[Part], part_tokens: Sequence[Took], reason: str) -> Ending:
        """The end of a choice, with the parts that still waited.

        Args:
            parts, part_tokens: of its last delta.
            reason: as far as its tokens say. A message of whole calls has a reason of its own.
        """
        reader = self._reader
        if reader is None:
            return Ending(parts, part_tokens, reason)
        delta = ReadDelta(parts=[*parts], part_tokens=[*part_tokens])
        self._tell(reader.finish(), delta)
        if reason == FinishReason.STOP.value and reader.called:
            reason = TOOL_CALLS
        return Ending(*_joined(delta.parts, delta.part_tokens), reason)

    def _tell(self, parts: list[Part], delta: ReadDelta) -> None:
        """Adds parts; the first of them took all tokens since the last one."""
        if not parts:
            return
        own = len(self._untold)
        if isinstance(parts[0], Text):
            own = _num_covering(self._untold, _num_words(parts))
        took = Took(len(self._untold) - own, own)
        delta.parts = [*delta.parts, *parts]
        delta.part_tokens = [*delta.part_tokens, took, *[Took(0, 0)] * (len(parts) - 1)]
        self._untold = []


def _num_words(parts: Sequence[Part]) -> int:
    """Characters of text that these begin with."""
    num_chars = 0
    for part in parts:
        if not isinstance(part, Text):
            break
        num_chars += len(part.text)
    return num_chars


def _num_covering(sizes: Sequence[int], num_chars: int) -> int:
    """How many of these tokens, the last ones, make up so many characters of text.

    With them go those before them that begin their first character.
    """
    num = 0
    while num < len(sizes) and (num_chars > 0 or not sizes[-1 - num]):
        num_chars -= sizes[-1 - num]
        num += 1
    return num


def _joined(
    parts: Sequence[Part], part_tokens: Sequence[Took]
) -> tuple[Sequence[Part], Sequence[Took]]:
    """As `joined`, and the tokens of neighbours added up."""
    whole: list[Part] = []
    sums: list[Took] = []
    for part, took in zip(parts, part_tokens, strict=True):
        *rest, last = joined([*whole[-1:], part])
        if whole and not rest:
            whole[-1] = last
            sums[-1] = Took(sums[-1].before, sums[-1].own + sum(took))
        else:
            whole.append(part)
            sums.append(took)
    return whole, sums
