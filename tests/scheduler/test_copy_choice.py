"""Which copy of the model a request goes to: its cached prefix against the copies' load."""

from __future__ import annotations

from jaxserve.config import CacheConfig, SchedulerConfig
from jaxserve.scheduler.copies import Schedulers
from jaxserve.types import FinishReason, ModelInfo, SamplingParams
from tests.fakes.executor import FULL

MODEL = ModelInfo(
    name="fake", max_context=256, vocab_size=50, eos_token_ids=(0,), cache_groups=(FULL,)
)
STEM = list(range(1, 13))


class Copies:
    """Three copies of eight rows; a step samples a 7 for every row."""

    def __init__(self, **cache) -> None:
        self.schedulers = Schedulers(
            SchedulerConfig(max_rows=8, max_step_tokens=64, decode_steps=1, max_waiting=100),
            MODEL,
            page_size=4,
            num_pages=[100],
            copies=3,
            cache=CacheConfig(**cache),
        )
        self._slots: list[list[int]] = [[] for _ in range(3)]
        self._number = 0

    def submit(self, prompt: list[int], **who):
        self._number += 1
        sampling = SamplingParams(max_tokens=50, seed=0, ignore_eos=True)
        (sequence,) = self.schedulers.submit([("client", self._number)], prompt, sampling, **who)
        return sequence

    def run(self) -> None:
        """One step."""
        plans = self.schedulers.plan()
        assert plans is not None
        for copy, plan in enumerate(plans):
            if plan is None:
                continue
            decoding = [s for s in self._slots[copy] if s not in plan.decode_leaves]
            self._slots[copy] = decoding + plan.decode_joins
            rows = self._slots[copy] + [chunk.slot for chunk in plan.chunks]
            self.schedulers.commit(copy, rows, [[7] for _ in rows])


def test_a_request_goes_where_its_beginning_is_cached():
    copies = Copies()
    assert [copies.submit([20 + i] * 12).copy for i in range(3)] == [0, 1, 2]
    first = copies.submit([*STEM, 20])
    assert first.copy == 0
    copies.run()
    assert [copies.submit([*STEM, 21]).copy, copies.submit([*STEM[:8], 22]).copy] == [0, 0]
    assert copies.schedulers.num_running == 4


def test_not_where_the_load_is_much_higher():
    """A quarter of eight rows is two sequences more than the least loaded copy has."""
    copies = Copies()
    copies.submit([*STEM, 20])
    copies.run()
    assert [copies.submit([*STEM, i]).copy for i in range(21, 24)] == [0, 0, 1]


def test_whom_it_may_share_with_decides_too():
    copies = Copies()
    copies.submit([*STEM, 20], tenant="a", cache_salt="x")
    copies.run()
    assert copies.submit([*STEM, 21], tenant="b", cache_salt="x").copy == 1
    assert copies.submit([*STEM, 22], tenant="a").copy == 2
    assert copies.submit([*STEM, 23], tenant="a", cache_salt="x").copy == 0


def test_without_a_cache_the_load_decides():
    copies = Copies(prefix=False)
    copies.submit([*STEM, 20])
    copies.run()
    assert [copies.submit([*STEM, i]).copy for i in (21, 22, 23)] == [1, 2, 1]


def test_counts_are_those_of_all_copies():
    copies = Copies()
    sequences = [copies.submit([*STEM, 20])]
    copies.run()
    sequences += [copies.submit([*STEM, i]) for i in (21, 22, 23)]
    copies.run()
    copies.run()
    assert [sequence.copy for sequence in sequences] == [0, 0, 0, 1]
    schedulers = copies.schedulers
    assert (schedulers.prefix_lookup_tokens, schedulers.prefix_hit_tokens) == (4 * 13, 2 * 12)
    for sequence in sequences:
        schedulers.cancel(sequence, FinishReason.CANCELLED)
    assert (schedulers.pages_used, schedulers.pages_cached) == (0, 3 + 3)
