"""What crosses between the host and the device in one embedding step, and which programs there are.

Plain numpy on both sides, as in `device.step`: a fake embedder needs no device. Sequences lie one
behind the other along the token axis; there is no state between steps.

Programs, all compiled at start-up: where the attention reads rows as they lie (the native kernel,
or a decoder's own), a few token counts; where it works on a padded grid (XLA), some lengths of row
as well, so that the grid of a step of similar texts is at most about twice its tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Int

from jaxserve.types import POOLINGS

#: `EmbedInput.second_start` of a text that is no pair.
NO_SECOND = 2**31 - 1
#: Token counts of programs grow by this, and so do row lengths of a padded grid.
GROWTH = 4
_FEWEST_TOKENS = 16
_SHORTEST_ROW = 32


@dataclass(frozen=True, slots=True, order=True, kw_only=True)
class EmbedProgram:
    """Shape of one compiled embedding program.

    Attributes:
        num_tokens, num_rows: it is padded to them.
        max_len: tokens a row may have.
    """

    num_tokens: int
    num_rows: int
    max_len: int

    @property
    def decode_steps(self) -> int:
        """As of `device.step.Program`: it is one step."""
        return 1

    @property
    def name(self) -> str:
        """Short name for logs and metrics: `embed_t1024_l256`."""
        return f"embed_t{self.num_tokens}_l{self.max_len}"


@dataclass(slots=True, kw_only=True)
class EmbedInput:
    """One text of a step.

    Attributes:
        second_start: of a pair, where its second text begins; else NO_SECOND.
        pooling: index in `types.POOLINGS`.
    """

    token_ids: list[int]
    second_start: int = NO_SECOND
    pooling: int = POOLINGS.index("mean")


@dataclass(slots=True, kw_only=True)
class EmbedInputs:
    """One step, padded to its program.

    Attributes:
        lengths: of the live rows.
        packed: all that the device is given, as one array.
    """

    program: EmbedProgram
    lengths: list[int]
    packed: Int[np.ndarray, "X"]

    @property
    def num_tokens(self) -> int:
        """Live tokens."""
        return sum(self.lengths)


@dataclass(slots=True, kw_only=True)
class EmbedOutputs:
    """What a step brought.

    Attributes:
        vectors: one a live row; of a cross-encoder its one score.
        device_ns, idle_ns: as `StepStats`.
    """

    vectors: Float32[np.ndarray, "R D"]
    device_ns: int = 0
    idle_ns: int = 0


def packed_size(program: EmbedProgram) -> int:
    """Length of `EmbedInputs.packed`."""
    return program.num_tokens + 3 * program.num_rows + 1


def pack(program: EmbedProgram, texts: Sequence[EmbedInput]) -> EmbedInputs:
    """A step of these texts, which the program must hold."""
    lengths = [len(text.token_ids) for text in texts]
    num_rows, num_live, num_tokens = program.num_rows, len(texts), program.num_tokens
    packed = np.zeros(packed_size(program), np.int32)
    ends = np.cumsum(lengths, dtype=np.int32)
    total = int(ends[-1]) if num_live else 0
    assert (
        total <= num_tokens and num_live <= num_rows and max(lengths, default=0) <= program.max_len
    )
    packed[:total] = [token for text in texts for token in text.token_ids]
    starts = packed[num_tokens : num_tokens + num_rows + 1]
    starts[1:] = total
    starts[1 : 1 + num_live] = ends
    seconds, codes = packed[num_tokens + num_rows + 1 :].reshape(2, num_rows)
    seconds[:] = NO_SECOND
    seconds[:num_live] = [text.second_start for text in texts]
    codes[:num_live] = [text.pooling for text in texts]
    return EmbedInputs(program=program, lengths=lengths, packed=packed)


class EmbedBuckets:
    """The embedding programs of one engine.

    Args:
        max_length: tokens a text may have.
        max_tokens: of a step; at least max_length.
        in_grid: whether attention works on a padded grid.
        batch_invariant: one program for all, so that a text's numbers are always added up in the
            same order.

    Attributes:
        programs: all of them, ascending.
    """

    def __init__(
        self, max_length: int, max_tokens: int, *, in_grid: bool, batch_invariant: bool = False
    ) -> None:
        most = max(max_tokens, max_length)
        lengths, length = {max_length}, _SHORTEST_ROW
        while in_grid and length < max_length:
            lengths.add(length)
            length *= GROWTH
        programs = set()
        for length in lengths:
            size = most
            while size >= length if in_grid else size >= _FEWEST_TOKENS:
                programs.add(self._program(size, length, in_grid=in_grid))
                size //= GROWTH
        if batch_invariant:
            programs = {self._program(most, max_length, in_grid=in_grid)}
        self.programs: tuple[EmbedProgram, ...] = tuple(sorted(programs))

    @staticmethod
    def _program(num_tokens: int, length: int, *, in_grid: bool) -> EmbedProgram:
        # A grid of twice the tokens; else room for texts of four tokens, few of which are shorter.
        num_rows = max(1, 2 * num_tokens // length) if in_grid else max(1, num_tokens // 4)
        return EmbedProgram(num_tokens=num_tokens, num_rows=num_rows, max_len=length)

    def room(self, max_tokens: int) -> StepRoom:
        """An empty step.

        Args:
            max_tokens: of it; a first text that is longer is a step by itself.
        """
        return StepRoom(self, max_tokens)

    def choose(self, lengths: Sequence[int]) -> EmbedProgram:
        """The program with the least padding that holds these texts."""
        rows, total, longest = len(lengths), sum(lengths), max(lengths, default=0)
        found = [p for p in self.programs if _fits(p, rows, total, longest)]
        assert found, f"no program for {rows} texts of {total} tokens, {longest} at most"
        return min(found, key=lambda p: (p.num_tokens, p.num_rows * p.max_len**2))

    def holds(self, rows: int, total: int, longest: int) -> bool:
        """Whether some program holds so many texts of so many tokens."""
        return any(_fits(program, rows, total, longest) for program in self.programs)


class StepRoom:
    """A step that is being filled."""

    def __init__(self, buckets: EmbedBuckets, max_tokens: int) -> None:
        self._buckets = buckets
        self._max_tokens = max_tokens
        self._rows = self._total = self._longest = 0

    def add(self, length: int) -> bool:
        """Whether one more text has room; it is in then."""
        total, longest = self._total + length, max(self._longest, length)
        if self._rows and (
            total > self._max_tokens or not self._buckets.holds(self._rows + 1, total, longest)
        ):
            return False
        self._rows, self._total, self._longest = self._rows + 1, total, longest
        return True


def _fits(program: EmbedProgram, rows: int, total: int, longest: int) -> bool:
    return program.num_rows >= rows and program.num_tokens >= total and program.max_len >= longest
