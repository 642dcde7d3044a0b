"""From the tokens of one sequence to the text its reader sees.

The engine's tokens come in small groups; `ChoiceText` turns each group into the text that is now
certain. Bytes of a character that is not complete, and text that may be the beginning of a stop
string, wait inside until later tokens, or the end, decide.

Invariants: concatenated deltas do not depend on how the tokens were grouped. Work is amortised
O(1) a token and a character for each stop string, whatever the length of output or stop strings.
"""

from __future__ import annotations

import codecs
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from jaxserve.errors import InvalidRequest
from jaxserve.text.tokenizer import Tokenizer

_NEW_UTF8 = codecs.getincrementaldecoder("utf-8")

#: Tokens of the prompt's end that can hold the beginning of a character (4 bytes at most).
_PROMPT_TAIL = 4


@dataclass(slots=True)
class TextDelta:
    """What some tokens added.

    Attributes:
        text: to be shown; never ends inside a character.
        num_tokens: how many of the given tokens belong to the output: all, unless a stop string
            was completed by an earlier one.
        stopped: whether a stop string has been completed, by these tokens or before.
    """

    text: str = ""
    num_tokens: int = 0
    stopped: bool = False


class ChoiceText:
    """The text of one sequence, as it grows.

    Args:
        prompt_ids: tokens before it: the output continues their text, so that a word's space is
            kept and a character begun in the prompt is completed.
        stop: strings that end the output. If several could, the one completed first does.
        include_stop: whether the stop string itself is part of the text.
        skip_special_tokens: whether control tokens are left out of the text.
        shown: control tokens that are part of the text nevertheless.

    Raises:
        InvalidRequest: a stop string is empty.
    """

    __slots__ = (
        "_buffer",
        "_decoder",
        "_include_stop",
        "_shown",
        "_skip_special_tokens",
        "_stopped",
        "_strip",
        "_tokenizer",
    )

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int],
        *,
        stop: Sequence[str] = (),
        include_stop: bool = False,
        skip_special_tokens: bool = True,
        shown: Collection[int] = (),
    ) -> None:
        if "" in stop:
            raise InvalidRequest("a stop string must have at least one character", param="stop")
        self._tokenizer = tokenizer
        self._include_stop = include_stop
        self._skip_special_tokens = skip_special_tokens
        self._shown = shown
        self._stopped = False
        self._buffer = _StopBuffer(stop) if stop else None
        self._decoder = _NEW_UTF8("replace")
        tail = [token for token in prompt_ids[-_PROMPT_TAIL:] if not tokenizer.is_special(token)]
        self._decoder.decode(b"".join(map(tokenizer.token_bytes, tail)))
        self._strip = tokenizer.strips_first_space and all(map(tokenizer.is_special, prompt_ids))

    def add(self, token_ids: Sequence[int]) -> TextDelta:
        """Takes the next tokens. After a stop string, further tokens are ignored."""
        if self._stopped:
            return TextDelta(stopped=True)
        if self._buffer is None:
            data = b"".join(map(self._bytes, token_ids))
            return TextDelta(self._decoder.decode(data), len(token_ids))
        texts: list[str] = []
        for index, token_id in enumerate(token_ids):
            texts.append(self._watch(self._buffer, self._decoder.decode(self._bytes(token_id))))
            if self._stopped:
                return TextDelta("".join(texts), index + 1, stopped=True)
        return TextDelta("".join(texts), len(token_ids))

    def finish(self) -> TextDelta:
        """The sequence has ended: what was still waiting. Half a character becomes U+FFFD."""
        if self._stopped:
            return TextDelta(stopped=True)
        text = self._decoder.decode(b"", True)
        if self._buffer is not None:
            text = self._watch(self._buffer, text) + self._buffer.release()
        return TextDelta(text, 0, stopped=self._stopped)

    def _bytes(self, token_id: int) -> bytes:
        if (
            self._skip_special_tokens
            and self._tokenizer.is_special(token_id)
            and token_id not in self._shown
        ):
            return b""
        data = self._tokenizer.token_bytes(token_id)
        if self._strip and data:
            self._strip = False
            return data.removeprefix(b" ")
        return data

    def _watch(self, buffer: _StopBuffer, text: str) -> str:
        """Passes text through the buffer and notes whether a stop string was completed."""
        shown, matched = buffer.push(text)
        if matched is None:
            return shown
        self._stopped = True
        return shown + matched if self._include_stop else shown


class _StopBuffer:
    """Holds back the longest end of the text that begins a stop string."""

    __slots__ = ("_num_waiting", "_stops", "_waiting")

    def __init__(self, stop: Sequence[str]) -> None:
        self._stops = [_StopString(text) for text in dict.fromkeys(stop)]
        self._waiting: deque[str] = deque()
        self._num_waiting = 0

    def push(self, text: str) -> tuple[str, str | None]:
        """Takes text in; what may be shown, and the stop string that was completed, if one was.

        After a match nothing is left inside: neither the stop string nor what followed it.
        """
        end = len(text)
        matched: _StopString | None = None
        for stop in self._stops:
            at = stop.push(text, end)
            if at is not None and (
                at < end or matched is None or len(stop.text) > len(matched.text)
            ):
                end, matched = at, stop
        self._waiting.append(text[:end])
        self._num_waiting += end
        if matched is not None:
            shown = self._take(self._num_waiting - len(matched.text))
            self._waiting.clear()
            self._num_waiting = 0
            return shown, matched.text
        return self._take(self._num_waiting - max(stop.num_matched for stop in self._stops)), None

    def release(self) -> str:
        """All that waits."""
        return self._take(self._num_waiting)

    def _take(self, num_chars: int) -> str:
        pieces: list[str] = []
        self._num_waiting -= num_chars
        while num_chars:
            piece = self._waiting.popleft()
            if len(piece) > num_chars:
                self._waiting.appendleft(piece[num_chars:])
                piece = piece[:num_chars]
            num_chars -= len(piece)
            pieces.append(piece)
        return "".join(pieces)


class _StopString:
    """How far the text's end matches one stop string (Knuth, Morris, Pratt 1977).

    The failure table is made only as far as the text has ever matched, so a long stop string costs
    nothing before.

    Attributes:
        num_matched: length of the longest proper prefix of the stop string that the text ends with.
    """

    __slots__ = ("_borders", "num_matched", "text")

    def __init__(self, text: str) -> None:
        self.text = text
        self.num_matched = 0
        self._borders = [0, 0]  # [k]: longest proper prefix of text[:k] that also ends it

    def push(self, text: str, end: int) -> int | None:
        """Takes in text[:end]; the position after the match, or None if there is none."""
        stop, size, borders, matched = self.text, len(self.text), self._borders, self.num_matched
        position = 0
        while position < end:
            if matched == 0:  # skip at C's speed to where a match could begin
                position = text.find(stop[0], position, end)
                if position < 0:
                    break
            char = text[position]
            while matched and stop[matched] != char:
                matched = borders[matched]
            if stop[matched] == char:
                matched += 1
                if matched == size:
                    return position + 1
                if matched == len(borders):
                    self._extend()
            position += 1
        self.num_matched = matched
        return None

    def _extend(self) -> None:
        """Adds the border of one more character of the stop string; amortised O(1)."""
        borders, stop = self._borders, self.text
        char = stop[len(borders) - 1]
        border = borders[-1]
        while border and stop[border] != char:
            border = borders[border]
        borders.append(border + 1 if stop[border] == char else 0)
