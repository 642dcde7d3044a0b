"""Pages that decoding rows get ahead: taken when a step is read, told by the next plan."""

from __future__ import annotations

from jaxserve.config import SchedulerConfig
from jaxserve.scheduler.sequence import Sequence, SequenceState
from jaxserve.types import FinishReason
from tests.scheduler.driver import Driver

CONFIG = SchedulerConfig(max_rows=2, max_step_tokens=16, decode_steps=1, draft_tokens=0)


def rows_before_a_page(prompts: list[int], **driver: int) -> tuple[Driver, list[Sequence]]:
    """Rows of three known tokens or more, after the step that fills their first page of four."""
    driven = Driver(CONFIG, **driver)
    sequences = [driven.submit(prompt, 5)[0] for prompt in prompts]
    driven.turn()
    driven.turn()
    assert [sequence.state for sequence in sequences] == [SequenceState.DECODING] * len(prompts)
    return driven, sequences


def test_a_row_gets_its_next_page_when_the_step_before_is_read():
    driver, (sequence,) = rows_before_a_page([3])
    pages = driver.scheduler.pages
    first, second = sequence.table.pages[0]
    assert pages.num_used == 2
    plan = driver.scheduler.plan()
    assert plan is not None
    assert plan.page_entries == [(0, sequence.slot, 1, second)]
    assert pages.num_used == 2 and sequence.table.pages == [[first, second]]
    following = driver.scheduler.plan()
    assert following is not None and following.page_entries == []


def test_who_leaves_before_the_plan_gives_the_page_back_and_it_is_not_told():
    driver, (gone, stays) = rows_before_a_page([3, 3])
    pages = driver.scheduler.pages
    assert pages.num_used == 4
    driver.cancel(gone)
    assert pages.num_used == 2
    (newcomer,) = driver.submit(2, 20)
    plan = driver.scheduler.plan()
    assert plan is not None and newcomer.slot == gone.slot
    assert sorted(plan.page_entries) == sorted(
        [
            (0, stays.slot, 1, stays.table.pages[0][1]),
            (0, newcomer.slot, 0, newcomer.table.pages[0][0]),
        ]
    )
    assert pages.num_used == 3
    assert gone.reason is FinishReason.CANCELLED


def test_where_not_all_can_have_one_none_is_taken_ahead():
    driver, (first, last) = rows_before_a_page([3, 3], num_pages=4)
    pages = driver.scheduler.pages
    assert pages.num_used == 2
    assert [len(row.table.pages[0]) for row in (first, last)] == [1, 1]
    plan = driver.scheduler.plan()
    assert plan is not None
    entries = [(group, slot, index) for group, slot, index, _ in plan.page_entries]
    assert entries == [(0, first.slot, 1)]  # the last that came is set back for it
    assert last.state is SequenceState.WAITING and pages.num_used == 2


def test_a_row_that_joins_after_the_step_was_read_gets_its_page_in_the_plan():
    driver = Driver(CONFIG)
    (sequence,) = driver.submit(4, 20)
    driver.turn()
    assert driver.scheduler.pages.num_used == 1
    plan = driver.scheduler.plan()  # nothing was read since the prompt was launched
    assert plan is not None
    assert plan.page_entries == [(0, sequence.slot, 1, sequence.table.pages[0][1])]
    assert driver.scheduler.pages.num_used == 2
