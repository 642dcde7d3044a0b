"""The masks of a step: for each row that has a grammar, which tokens may come next.

Made by llguidance without the interpreter, while the device runs the step's model: in threads of
its own, or in the caller's where one is wanted. A row whose grammar fails (its fuel is used up,
nothing is left) fails alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt
from llguidance import LLExecutor

from jaxserve.errors import GrammarError
from jaxserve.structured.constraint import Constraint


class MaskedRow(NamedTuple):
    """A row that wants masks.

    Attributes:
        place: of its first mask, for the token after its known ones.
        draft: tokens after those; each has a mask behind the first one.
    """

    constraint: Constraint
    place: int
    draft: list[int]


class MaskMaker:
    """Makes masks.

    Args:
        threads: 1 is the caller's own.
        vocab_size: of the model's logits.
    """

    def __init__(self, threads: int, vocab_size: int) -> None:
        self._threads = threads
        self._num_words = -(-vocab_size // 32)
        self._executor: LLExecutor | None = None  # has threads: made once there is work

    def make(
        self, rows: Sequence[MaskedRow], num_places: int
    ) -> tuple[UInt[np.ndarray, "N W"], list[tuple[int, GrammarError]]]:
        """The masks of a step, and the rows (by index) that cannot go on.

        Where a row has failed, and where none has a mask, every token is allowed.
        """
        masks = np.full((num_places, self._num_words), np.uint32(0xFFFF_FFFF), np.uint32)
        return masks, self.make_into(masks, rows)

    def make_into(
        self, masks: UInt[np.ndarray, "N W"], rows: Sequence[MaskedRow]
    ) -> list[tuple[int, GrammarError]]:
        """As `make`, in place; of masks of other rows nothing is touched."""
        failed: list[tuple[int, GrammarError]] = []
        good: list[int] = []
        for index, row in enumerate(rows):
            try:
                row.constraint.follow()
                good.append(index)
            except GrammarError as error:
                failed.append((index, error))
        self._fill(masks, [rows[index] for index in good])
        for index in good:
            row = rows[index]
            places = slice(row.place, row.place + 1 + len(row.draft))
            try:
                if row.constraint.matcher.ll.is_error():
                    raise row.constraint.matcher.error()
                if row.constraint.refines:
                    for ahead, mask in enumerate(masks[places]):
                        row.constraint.refine(mask, row.draft[:ahead])
            except GrammarError as error:
                failed.append((index, error))
                masks[places] = 0xFFFF_FFFF
        return failed

    def _fill(self, masks: UInt[np.ndarray, "N W"], rows: Sequence[MaskedRow]) -> None:
        at, size, num_places = masks.ctypes.data, masks.strides[0], masks.shape[0]
        plain = [(row.constraint.matcher.ll, row.place) for row in rows if not row.draft]
        if self._threads == 1 and len(plain) == len(rows):
            for matcher, place in plain:
                matcher.unsafe_compute_mask_ptr(at + place * size, size)
            return
        if self._executor is None:
            self._executor = LLExecutor(self._threads)
        where = at, size, num_places
        if plain:
            self._executor.unsafe_compute_mask_ptr(plain, *where)
        drafted = [(row.constraint.matcher.ll, row.place, row.draft) for row in rows if row.draft]
        if drafted:
            self._executor.unsafe_compute_mask_ptr_with_draft_token(drafted, *where)
