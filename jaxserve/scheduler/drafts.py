"""Guesses of a sequence's next tokens, found in its own text: prompt lookup.

Answers often repeat what stands in the prompt or in the answer so far: a quoted passage, a name, a
piece of code. `Drafts` knows where each run of GRAM tokens stood last. If the sequence's end stood
earlier too, what followed there is foretold to follow again, and is followed on for as long as it
does. Looking costs O(1) a token.

Every token that comes is held against what was foretold, drafted or not: so how often guesses hold
is known before one is tried, and while a sequence does not draft. It depends most on how many
tokens in a row have agreed with the earlier place, so it is counted by that.

Invariants: nothing is foretold before all known tokens have been taken in. Whether a guess is right
is decided on the device (`device.acceptance`); a wrong one costs time and nothing else.
"""

from __future__ import annotations

from bisect import bisect_right

#: Tokens that must agree before anything is foretold.
GRAM = 3
#: Runs of agreement at least so long are told apart.
RUNS = (GRAM, 5, 9, 17)
#: By class of run: the share of guesses that are taken to hold as long as nothing is known.
PRIOR = (0.4, 0.65, 0.85, 0.95)
#: So many guesses the prior weighs; and about so many of the latest are remembered.
PRIOR_WEIGHT, MEMORY = 4.0, 32
#: Tokens taken in at a time, of prompt and output: a long text must not hold up the step loop.
PROMPT_SLICE, OUTPUT_SLICE = 2048, 256


class Drafts:
    """Guesses of one sequence.

    Args:
        token_ids: the sequence's known tokens, which only grow.
        prompt_len: how many of them were not generated: those are only looked up.
    """

    __slots__ = (
        "_held",
        "_made",
        "_next",
        "_num_taken",
        "_places",
        "_prompt_len",
        "_run",
        "_tokens",
    )

    def __init__(self, token_ids: list[int], prompt_len: int) -> None:
        self._tokens = token_ids
        self._prompt_len = prompt_len
        self._places: dict[tuple[int, ...], int] = {}  # GRAM tokens → the place after them, at last
        self._num_taken = 0
        self._next = 0  # the place whose token is foretold; 0: none
        self._run = 0  # tokens before it that agree with the sequence's last ones
        self._held = [share * PRIOR_WEIGHT for share in PRIOR]
        self._made = [PRIOR_WEIGHT] * len(PRIOR)

    @property
    def foretells(self) -> bool:
        """Whether there is a guess of the next token."""
        return self._next > 0 and self._num_taken == len(self._tokens)

    def accuracy(self, ahead: int = 0) -> float:
        """How likely a guess holds after `ahead` others that did."""
        kind = bisect_right(RUNS, self._run + ahead) - 1
        return self._held[kind] / self._made[kind]

    def guess(self, num: int) -> list[int]:
        """So many next tokens. Only while it `foretells`."""
        tokens = self._tokens
        guess = tokens[self._next : self._next + num]
        period = len(tokens) - self._next
        while len(guess) < num:  # what followed there is what comes next here: it goes round
            guess.append(guess[-period])
        return guess

    def take_in(self) -> None:
        """Takes note of tokens that have come, at most a slice of them."""
        num_before = self._prompt_len - 1  # of the prompt, but its last token
        if self._num_taken < num_before:
            self._take_prompt(min(self._num_taken + PROMPT_SLICE, num_before))
        if self._num_taken >= num_before:
            end = min(self._num_taken + OUTPUT_SLICE, len(self._tokens))
            for place in range(self._num_taken, end):
                self._take(place)

    def _take_prompt(self, end: int) -> None:
        """Notes the runs that end before `end`."""
        first = max(self._num_taken, GRAM - 1)
        if first < end:
            parts = (self._tokens[first - back : end - back] for back in range(GRAM - 1, -1, -1))
            grams = zip(*parts, strict=True)
            self._places.update(zip(grams, range(first + 1, end + 1), strict=True))
        self._num_taken = end

    def _take(self, place: int) -> None:
        """Holds the token at a place against what was foretold, and notes the run it ends."""
        tokens = self._tokens
        if self._next:
            holds = tokens[self._next] == tokens[place]
            kind = bisect_right(RUNS, self._run) - 1
            self._held[kind] += holds - self._held[kind] / MEMORY
            self._made[kind] += 1 - self._made[kind] / MEMORY
            self._next = self._next + 1 if holds else 0
            self._run = self._run + 1 if holds else 0
        self._num_taken = place + 1
        if place < GRAM - 1:
            return
        gram = tuple(tokens[place - GRAM + 1 : place + 1])
        earlier = self._places.get(gram)
        self._places[gram] = place + 1
        if earlier is not None and not self._next:
            self._next, self._run = earlier, self._agreeing(earlier, place + 1)

    def _agreeing(self, earlier: int, later: int) -> int:
        """How many tokens before two places agree, as far as it matters."""
        tokens, run = self._tokens, GRAM
        most = min(RUNS[-1], earlier)
        while run < most and tokens[earlier - run - 1] == tokens[later - run - 1]:
            run += 1
        return run
