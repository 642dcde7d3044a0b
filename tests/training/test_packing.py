"""Every token of every example once an epoch, none beyond its row, and the same on every run."""

from __future__ import annotations

from itertools import islice

import jax
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.training.examples import Example
from jaxserve.training.packing import Rows, endless, hold_out, once, pack, stack

ROW = 16


def make(sizes: list[int]) -> list[Example]:
    """Example n's tokens are 100 n, 100 n + 1, …; the first half is not learned."""
    return [
        Example(
            token_ids=np.arange(100 * n, 100 * n + size, dtype=np.int32),
            is_learned=np.arange(size) >= size // 2,
        )
        for n, size in enumerate(sizes, 1)
    ]


def unpacked(rows: Rows) -> list[np.ndarray]:
    """Token ids of each segment."""
    found = []
    for ids, segments in zip(rows.token_ids, rows.segments, strict=True):
        found += [ids[segments == s] for s in range(1, segments.max() + 1)]
    return found


@given(st.lists(st.integers(2, ROW), min_size=1, max_size=120))
def test_each_example_is_in_one_row_once(sizes: list[int]) -> None:
    examples = make(sizes)
    rows = list(pack(examples, ROW))
    assert sorted(id(e) for row in rows for e in row) == sorted(map(id, examples))
    assert all(sum(len(e.token_ids) for e in row) <= ROW for row in rows)
    assert len(rows) <= max(2 * sum(sizes) / ROW, 1) + 32


@given(st.lists(st.integers(2, ROW), min_size=1, max_size=40))
def test_arrays_say_what_the_examples_are(sizes: list[int]) -> None:
    examples = make(sizes)
    batches = list(once(examples, row_tokens=ROW, num_rows=3))
    assert all(batch.token_ids.shape == (3, ROW) for batch in batches)
    segments = sorted((s for b in batches for s in unpacked(b)), key=lambda ids: ids[0])
    for ids, example in zip(segments, examples, strict=True):
        np.testing.assert_array_equal(ids, example.token_ids)
    learned = sum(int(e.is_learned[1:].sum()) for e in examples)
    assert sum(int(b.is_learned.sum()) for b in batches) == learned
    for batch in batches:
        np.testing.assert_array_equal(
            batch.targets[batch.is_learned], batch.token_ids[batch.is_learned] + 1
        )
        live = batch.segments > 0
        np.testing.assert_array_equal(batch.positions[live], batch.token_ids[live] % 100)
        assert not batch.token_ids[~live].any() and not batch.is_learned[~live].any()


def test_two_examples_side_by_side() -> None:
    rows = stack([make([3, 2])], 6, 2)
    assert rows.token_ids.tolist() == [[100, 101, 102, 200, 201, 0], [0] * 6]
    assert rows.targets.tolist() == [[101, 102, 0, 201, 0, 0], [0] * 6]
    assert rows.is_learned.tolist() == [[True, True, False, True, False, False], [False] * 6]
    assert rows.positions.tolist() == [[0, 1, 2, 0, 1, 0], [0] * 6]
    assert rows.segments.tolist() == [[1, 1, 1, 2, 2, 0], [0] * 6]


def test_a_run_that_starts_later_sees_the_same_batches() -> None:
    examples = make([5, 9, 3, 14, 7, 7, 2, 11, 16])

    def run(start: int, seed: int = 4) -> list[Rows]:
        batches = endless(examples, row_tokens=ROW, num_rows=2, seed=seed, start=start)
        return list(islice(batches, 12 - start))

    whole = run(0)
    for start in (1, 5, 11):
        jax.tree.map(np.testing.assert_array_equal, whole[start:], run(start))
    others = run(0, seed=5)
    assert any((a.token_ids != b.token_ids).any() for a, b in zip(whole, others, strict=True))


def test_an_endless_run_holds_each_example_once_an_epoch() -> None:
    examples = make([ROW] * 6)  # a row each
    seen = [
        batch.token_ids[:, 0] // 100
        for batch in islice(endless(examples, row_tokens=ROW, num_rows=2, seed=0), 6)
    ]
    first, second = np.concatenate(seen[:3]), np.concatenate(seen[3:])
    assert sorted(first) == sorted(second) == [1, 2, 3, 4, 5, 6]
    assert first.tolist() != second.tolist()


def test_held_out_examples_are_not_trained_on() -> None:
    examples = make([2] * 20)
    kept, held = hold_out(examples, 0.2, seed=3)
    assert (len(kept), len(held)) == (16, 4)
    assert {id(e) for e in kept} | {id(e) for e in held} == {id(e) for e in examples}
    assert hold_out(examples, 0.0, seed=3) == (examples, [])
    assert [len(part) for part in hold_out(examples, 0.001, seed=3)] == [19, 1]
    assert hold_out(examples, 0.2, seed=4)[1] != held
