"""Guesses of a sequence's next tokens where a grammar says what may come, and often what must.

Where there is one way to go on (the names of a schema's properties, the quotes and colons around
them), the tokens that spell it are guessed, however often they have come before. Which tokens spell
a text is the model's choice, so that they are verified like all drafts. Elsewhere the guesses are
those of `Drafts`, up to the first that the grammar forbids: nothing is verified in vain.
"""

from __future__ import annotations

from typing import Protocol

from jaxserve.scheduler.drafts import MEMORY, PRIOR_WEIGHT, Drafts

#: The share of tokens that must come which come as they are spelled here, as long as nothing is
#: known.
FORCED_PRIOR = 0.9


class Guide(Protocol):
    """What a grammar says of a sequence (`structured.constraint.Constraint`)."""

    def forced(self) -> list[int]:
        """Tokens that spell what must follow the known ones."""
        ...

    def admitted(self, draft: list[int]) -> int:
        """How many of these tokens may follow the known ones, in order."""
        ...


class GuidedDrafts(Drafts):
    """Guesses of one sequence that has a grammar.

    Args:
        token_ids, prompt_len: as `Drafts`.
        guide: its grammar.
    """

    __slots__ = ("_forced", "_forced_held", "_forced_made", "_guide", "_num_seen")

    def __init__(self, token_ids: list[int], prompt_len: int, guide: Guide) -> None:
        super().__init__(token_ids, prompt_len)
        self._guide = guide
        self._forced: list[int] = []  # after the first `_num_seen` tokens
        self._num_seen = len(token_ids)
        self._forced_held = FORCED_PRIOR * PRIOR_WEIGHT
        self._forced_made = PRIOR_WEIGHT

    @property
    def foretells(self) -> bool:
        """Whether there is a guess of the next token."""
        return bool(self._forced) or super().foretells

    def accuracy(self, ahead: int = 0) -> float:
        """How likely a guess holds after `ahead` others that did; 0 where there is none."""
        if self._forced:
            share = self._forced_held / self._forced_made
            return share if ahead < len(self._forced) else 0.0
        return super().accuracy(ahead)

    def guess(self, num: int) -> list[int]:
        """At most so many next tokens. Only while it `foretells`."""
        if self._forced:
            return self._forced[:num]
        guess = super().guess(num)
        return guess[: self._guide.admitted(guess)]

    def take_in(self) -> None:
        """Takes note of tokens that have come, and asks what must come next."""
        new = self._tokens[self._num_seen :]
        for come, spelled in zip(new, self._forced, strict=False):
            self._forced_held += (come == spelled) - self._forced_held / MEMORY
            self._forced_made += 1 - self._forced_made / MEMORY
            if come != spelled:
                break
        self._num_seen = len(self._tokens)
        self._forced = self._guide.forced()
        super().take_in()
