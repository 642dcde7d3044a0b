"""Drafts that know what will come: so that any sequence drafts, as well as a test wants it to."""

from __future__ import annotations

from collections.abc import Sequence as Seq

from jaxserve.scheduler.drafts import Drafts
from jaxserve.scheduler.sequence import Sequence

#: Stands where a wrong guess is wanted.
WRONG = 11


class ToldDrafts(Drafts):
    """Guesses a sequence's tokens from a list; every `wrong`-th output is guessed wrong.

    Args:
        outputs: what the sequence will emit.
        wrong: 0: none is.
    """

    def __init__(self, sequence: Sequence, outputs: Seq[int], wrong: int = 0) -> None:
        super().__init__(sequence.token_ids, sequence.prompt_len)
        self._outputs = [
            (WRONG if token != WRONG else WRONG + 1) if wrong and place % wrong == 0 else token
            for place, token in enumerate(outputs, 1)
        ]
        sequence.drafts = self

    @property
    def foretells(self) -> bool:
        """Always."""
        return True

    def accuracy(self, ahead: int = 0) -> float:
        """High."""
        return 0.9

    def guess(self, num: int) -> list[int]:
        """The next outputs."""
        start = len(self._tokens) - self._prompt_len
        guess = self._outputs[start : start + num]
        return guess + [WRONG] * (num - len(guess))

    def take_in(self) -> None:
        """Nothing is to be learned."""
