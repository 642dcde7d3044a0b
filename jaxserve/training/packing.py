"""Examples packed into rows of one length, and rows into batches: one shape, one program.

    row 0  │ example 7 ······· │ example 2 ···· │ example 9 ······ │ padding │
    row 1  │ example 4 ······················ │ example 0 ········ │ padding │

Each example is a segment of its row: it attends to itself only, and its positions begin at 0.

Invariant: batch n of a run is a function of the examples, the sizes and the seed, so that a run
that is resumed sees just the batches that it would have seen.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import batched, count

import jax
import numpy as np
from jaxtyping import Array, Bool, Int32

from jaxserve.training.examples import Example

#: Rows that are filled side by side: the next example goes where it leaves least room.
_OPEN_ROWS = 32


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Rows:
    """Rows of S tokens; more axes may stand in front.

    Attributes:
        token_ids: 0 for padding.
        targets: the token that follows in the same example; 0 where none does.
        is_learned: whether the target counts.
        positions: of each token in its example.
        segments: which of the row's examples a token belongs to, from 1; 0 for padding.
    """

    token_ids: Int32[Array, "*A B S"] | Int32[np.ndarray, "*A B S"]
    targets: Int32[Array, "*A B S"] | Int32[np.ndarray, "*A B S"]
    is_learned: Bool[Array, "*A B S"] | Bool[np.ndarray, "*A B S"]
    positions: Int32[Array, "*A B S"] | Int32[np.ndarray, "*A B S"]
    segments: Int32[Array, "*A B S"] | Int32[np.ndarray, "*A B S"]


def pack(examples: Sequence[Example], row_tokens: int) -> Iterator[list[Example]]:
    """The examples, in about their order, as rows that hold at most so many tokens."""
    open_rows: list[list[Example]] = []
    room: list[int] = []
    for example in examples:
        size = len(example.token_ids)
        fitting = [row for row, free in enumerate(room) if free >= size]
        if fitting:
            row = min(fitting, key=lambda row: room[row])
            open_rows[row].append(example)
            room[row] -= size
            continue
        if len(open_rows) == _OPEN_ROWS:
            fullest = room.index(min(room))
            room.pop(fullest)
            yield open_rows.pop(fullest)
        open_rows.append([example])
        room.append(row_tokens - size)
    yield from open_rows


def stack(rows: Sequence[Sequence[Example]], row_tokens: int, num_rows: int) -> Rows:
    """Rows as arrays [B, S], filled up with empty ones."""
    shape = num_rows, row_tokens
    token_ids, targets = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    positions, segments = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    is_learned = np.zeros(shape, np.bool_)
    for place, row in enumerate(rows):
        start = 0
        for segment, example in enumerate(row, 1):
            ids = example.token_ids
            stop = start + len(ids)
            token_ids[place, start:stop] = ids
            targets[place, start : stop - 1] = ids[1:]
            is_learned[place, start : stop - 1] = example.is_learned[1:]
            positions[place, start:stop] = np.arange(len(ids))
            segments[place, start:stop] = segment
            start = stop
    return Rows(
        token_ids=token_ids,
        targets=targets,
        is_learned=is_learned,
        positions=positions,
        segments=segments,
    )


def endless(
    examples: Sequence[Example], *, row_tokens: int, num_rows: int, seed: int, start: int = 0
) -> Iterator[Rows]:
    """Batches [B, S] of an endless run through the examples, shuffled anew in each epoch.

    Args:
        num_rows: B.
        start: batches to leave out, those that were seen already.
    """

    def rows() -> Iterator[list[Example]]:
        for epoch in count():
            order = np.random.default_rng([seed, epoch]).permutation(len(examples))
            yield from pack([examples[i] for i in order], row_tokens)

    for index, batch in enumerate(batched(rows(), num_rows)):
        if index >= start:
            yield stack(batch, row_tokens, num_rows)


def once(examples: Sequence[Example], *, row_tokens: int, num_rows: int) -> Iterator[Rows]:
    """Batches [B, S] that hold each example once, in their order."""
    for batch in batched(pack(examples, row_tokens), num_rows):
        yield stack(batch, row_tokens, num_rows)


def hold_out(
    examples: Sequence[Example], share: float, seed: int
) -> tuple[list[Example], list[Example]]:
    """Those to train on, and the share of them to evaluate on: at least one each, if any.

    Args:
        share: 0 holds out none.
    """
    num_held = min(len(examples) - 1, max(1, round(share * len(examples)))) if share else 0
    order = np.random.default_rng([seed]).permutation(len(examples))
    held = sorted(order[:num_held])
    kept = sorted(order[num_held:])
    return [examples[i] for i in kept], [examples[i] for i in held]
