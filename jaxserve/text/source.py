"""Text that comes in pieces, for readers that are written as if it were whole.

A reader is a generator over a `Source`: where it needs a character that has not come it yields, and
goes on once there is more, or once nothing more will come. So a notation is written down as plain
recursive descent, and what it gives cannot depend on how the text was cut.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence

type Waiting[T] = Generator[None, None, T]


class Source:
    """See the module.

    Attributes:
        ended: nothing more will come.
    """

    __slots__ = ("_at", "_mark", "_text", "ended")

    def __init__(self) -> None:
        self._text = ""
        self._at = 0
        self._mark: int | None = None
        self.ended = False

    def feed(self, text: str) -> None:
        """More has come."""
        keep = self._at if self._mark is None else self._mark
        self._text = self._text[keep:] + text
        self._at -= keep
        if self._mark is not None:
            self._mark = 0

    def mark(self) -> None:
        """From here on text is kept, so that `back` can return to it."""
        self._mark = self._at

    def back(self) -> None:
        """Returns to the mark, and forgets it."""
        assert self._mark is not None
        self._at, self._mark = self._mark, None

    def forget(self) -> None:
        """The mark is not needed any more."""
        self._mark = None

    @property
    def num_marked(self) -> int:
        """Characters since the mark; 0 without one."""
        return 0 if self._mark is None else self._at - self._mark

    def peek(self) -> Waiting[str]:
        """The next character; empty at the end."""
        while self._at == len(self._text) and not self.ended:
            yield
        return self._text[self._at : self._at + 1]

    def skip(self) -> None:
        """Takes the character that was looked at."""
        self._at += 1

    def rest(self) -> str:
        """All that is there, without taking it."""
        return self._text[self._at :]

    def take(self, num_chars: int) -> str:
        """Takes so many characters, which are there."""
        start, self._at = self._at, self._at + num_chars
        return self._text[start : self._at]

    def spaces(self) -> Waiting[str]:
        """Takes white space."""
        found: list[str] = []
        while (char := (yield from self.peek())).isspace():
            found.append(char)
            self.skip()
        return "".join(found)

    def literal(self, text: str, *, cut: bool = False) -> Waiting[bool]:
        """Takes a literal if it comes next.

        Args:
            cut: the beginning of it will do where the text ends inside.
        """
        while True:
            there = self._text[self._at : self._at + len(text)]
            if there == text or (cut and self.ended and there and text.startswith(there)):
                self._at += len(there)
                return True
            if self.ended or not text.startswith(there):
                return False
            yield

    def find(self, literals: Sequence[str]) -> tuple[str, str]:
        """Takes text up to the first of some literals, and the literal; none may begin another.

        Returns:
            The text that is certain to stand before any of them, and the literal that was found;
            empty if none was, or it may not have come completely.
        """
        rest = self._text[self._at :]
        at, found = len(rest), ""
        for literal in literals:
            place = rest.find(literal)
            if 0 <= place < at:
                at, found = place, literal
        if found:
            self._at += at + len(found)
            return rest[:at], found
        held = 0 if self.ended else _num_held(rest, literals)
        self._at += len(rest) - held
        return rest[: len(rest) - held], ""


def _num_held(text: str, literals: Sequence[str]) -> int:
    """Characters at the end of a text that may begin one of the literals."""
    held = 0
    for literal in literals:
        at = text.find(literal[0], max(0, len(text) - len(literal) + 1))
        while at >= 0:
            if literal.startswith(text[at:]):
                held = max(held, len(text) - at)
                break
            at = text.find(literal[0], at + 1)
    return held
