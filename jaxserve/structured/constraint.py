"""One sequence held to its grammar: its place there, and what else the request rules out.

The device applies a request's other rules by itself (`sampling.adjust`). Here they are known so
that a row to which they and the grammar leave nothing ends with an error, where the device would
have to choose something.

- End tokens (the model's and the request's stop tokens) come where the grammar may end, and only
  there; where it must end, nothing else does.
- `min_tokens` rules them out at first, so that a grammar which must end before is an error.
- `bad_words` and `allowed_token_ids` restrict what the grammar admits.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from jaxtyping import UInt

from jaxserve.errors import GrammarError
from jaxserve.structured.matcher import Compiled
from jaxserve.types import ModelInfo, SamplingParams


class Constraint:
    """A sequence's grammar.

    Args:
        compiled: the grammar.
        token_ids: the sequence's known tokens, a list that only grows.
        prompt_len: how many of them are no output.

    Attributes:
        compiled: what it is held to.
        refines: whether masks need `refine`.

    Raises:
        GrammarError: the output so far does not fit the grammar.
    """

    def __init__(
        self,
        compiled: Compiled,
        sampling: SamplingParams,
        token_ids: list[int],
        prompt_len: int,
        model: ModelInfo,
    ) -> None:
        self.compiled = compiled
        self.matcher = compiled.matcher()
        self._sampling = sampling
        self._tokens = token_ids
        self._prompt_len = prompt_len
        self._min_len = prompt_len + sampling.min_tokens
        self._natural = token_bits(model.eos_token_ids, model.vocab_size)
        self._ends = self._natural | token_bits(sampling.stop_token_ids, model.vocab_size)
        self._allowed = None
        if sampling.allowed_token_ids is not None:
            self._allowed = token_bits(sampling.allowed_token_ids, model.vocab_size)
        self.refines = bool(
            sampling.stop_token_ids
            or sampling.min_tokens
            or sampling.bad_words
            or self._allowed is not None
        )
        self.follow()

    def renew(self, compiled: Compiled) -> None:
        """Goes on with the grammar compiled anew.

        Raises:
            GrammarError: as `follow`.
        """
        self.compiled = compiled
        self.matcher = compiled.matcher()
        self.follow()

    def follow(self) -> None:
        """Takes in the output tokens that have become known.

        Raises:
            GrammarError: one does not fit, or a limit was passed.
        """
        self.matcher.follow(self._tokens, self._prompt_len)

    def admitted(self, draft: list[int]) -> int:
        """How many of these tokens may follow the known ones, in order."""
        return self.matcher.admitted(draft) if self._follows() else 0

    def forced(self) -> list[int]:
        """Tokens that spell what must follow the known ones."""
        return self.matcher.forced() if self._follows() else []

    def _follows(self) -> bool:
        """Whether it can go on; if not, the next mask says why."""
        try:
            self.follow()
        except GrammarError:
            return False
        return True

    def refine(self, mask: UInt[np.ndarray, "W"], draft: list[int]) -> None:
        """Completes a mask of llguidance's, in place, and sees to it that something is left.

        Args:
            mask: for the token after the known ones and `draft`.

        Raises:
            GrammarError: nothing is.
        """
        if (mask & self._natural).any():
            mask |= self._ends
        else:
            mask &= ~self._ends
        left, sampling = mask.copy(), self._sampling
        if self._allowed is not None:
            left &= self._allowed
        num_known = len(self._tokens) + len(draft)
        if num_known < self._min_len:
            left &= ~self._ends
        for word in sampling.bad_words:
            *before, last = word
            if before == _last([*self._tokens[-len(word) :], *draft], len(before)):
                left[last >> 5] &= ~np.uint32(1 << (last & 31))
        if not left.any():
            raise GrammarError(
                f"the grammar leaves no token to sample after {num_known - self._prompt_len} of "
                "output beside min_tokens, bad_words and allowed_token_ids: loosen one of them"
            )


def token_bits(token_ids: Iterable[int], vocab_size: int) -> UInt[np.ndarray, "W"]:
    """Bit v % 32 of word v // 32 says whether token v is among these."""
    bits = np.zeros(-(-vocab_size // 32), np.uint32)
    ids = np.fromiter(token_ids, np.int64)
    np.bitwise_or.at(bits, ids >> 5, np.uint32(1) << (ids & 31).astype(np.uint32))
    return bits


def _last(tokens: list[int], num: int) -> list[int]:
    return tokens[len(tokens) - num :] if num <= len(tokens) else [-1] * num
