"""Guesses of a sequence's next tokens, found in its own text: prompt lookup.

Answers often repeat what stands in the prompt or in the answer so far: a quoted passage, a name, a
piece of code. `Drafts` knows where each run of GRAM tokens stood last. If the sequence's end stood
earlier too, what followed there is foretold to follow again, and is followed on for as long as it
does. Looking costs O(1) a token.

Every token that comes is held against what was foretold, drafted or not, so how often such guesses
hold is known before one is tried, and again when a sequence has stopped drafting. It depends
most on how many tokens in a row have agreed with the earlier place, so it is counted by that.

Invariants: nothing is foretold before all known tokens have been taken in. Whether a guess is right
is decided by the device (`device.acceptance`); here it only costs or saves time.
"""

from __future__ import annotations

from bisect import bisect_right

#: Tokens that must agree before anything is foretold.
GRAM = 3
#: Runs of agreement at least so long are told apart.
RUNS = (GRAM, 5, 9, 17)
#: By class of run: how many of the guesses are taken to hold as long as nothing is known.
PRIOR = (0.5, 0.7, 0.85, 0.95)
#: So many guesses the prior weighs, and so many of the latest ones are remembered.
PRIOR_WEIGHT, MEMORY = 4.0, 32.0
#: Tokens taken in at a time: a long prompt must not hold up the step loop.
PROMPT_SLICE, OUTPUT_SLICE = 2048, 256


class Drafts:
    """Guesses of one sequence.

    Args:
        token_ids: the sequence's known tokens, which only grow.
        prompt_len: of them, those that were not generated: they are only looked up in.
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
        self._places: dict[tuple[int, ...], int] = {}  # run of GRAM tokens → what followed it last
        self._num_taken = 0
        self._next = 0  # the place whose token is foretold; 0: none
        self._run = 0  # tokens before it that agree with the sequence's last ones
        self._held = [prior * PRIOR_WEIGHT for prior in PRIOR]
        self._made = [PRIOR_WEIGHT] * len(PRIOR)

    @property
    def foretells(self) -> bool:
        """Whether there is a guess of the next token."""
        return self._next > 0 and self._num_taken == len(self._tokens)

    def take_in(self) -> None:
        """Takes note of tokens that have come, at most a slice of them."""
        if self._num_taken < self._prompt_len - 1:
            self._take_prompt(min(self._num_taken + PROMPT_SLICE, self._prompt_len - 1))
        if self._num_taken >= self._prompt_len - 1:
            start = self._num_taken
            for place in range(start, min(start + OUTPUT_SLICE, len(self._tokens))):
                self._take(place)

    def accuracy(self, ahead: int = 0) -> float:
        """How likely the guess after `ahead` right ones holds too."""
        length = bisect_right(RUNS, self._run + ahead) - 1
        return self._held[length] / self._made[length]

    def guess(self, num: int) -> list[int]:
        """The next tokens, as many as are asked for. Only while `foretells`."""
        tokens, place = self._tokens, self._next
        guess = tokens[place : place + num]
        while len(guess) < num:  # it repeats itself
            guess.append(guess[len(guess) - (len(tokens) - place)])
        return guess

    def _take_prompt(self, end: int) -> None:
        """Notes where each run up to a token of the prompt ends; its last token is left to `_take`."""
        first = max(self._num_taken, GRAM - 1)
        if end > first:
            parts = (self._tokens[first - i : end - i] for i in range(GRAM - 1, -1, -1))
            self._places.update(
                zip(zip(*parts, strict=True), range(first + 1, end + 1), strict=True)
            )
        self._num_taken = end

    def _take(self, place: int) -> None:
        tokens = self._tokens
        if self._next:
            held = tokens[self._next] == tokens[place]
            length = bisect_right(RUNS, self._run) - 1
            forget = 1 - 1 / MEMORY
            self._held[length] = self._held[length] * forget + held
            self._made[length] = self._made[length] * forget + 1
            if held:
                self._next += 1
                self._run += 1
            else:
                self._next = self._run = 0
        self._num_taken = place + 1
        if place >= GRAM - 1:
            self._look_up(tuple(tokens[place - GRAM + 1 : place + 1]), place + 1)

    def _look_up(self, gram: tuple[int, ...], after: int) -> None:
        """Notes where a run ends, having looked where it stood before if nothing is foretold."""
        earlier = self._places.get(gram)
        self._places[gram] = after
        if earlier is None or self._next:
            return
        tokens = self._tokens
        run = GRAM
        while (
            run < RUNS[-1]
            and run < earlier
            and tokens[earlier - 1 - run] == tokens[after - 1 - run]
        ):
            run += 1
        self._next, self._run = earlier, run
