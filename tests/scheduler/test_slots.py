"""Who holds a slot, in which order they would lose it."""

from __future__ import annotations

import random

import pytest

from jaxserve.config import SchedulerConfig
from jaxserve.scheduler.accounts import Accounts, Meter
from jaxserve.scheduler.pages import PageTable
from jaxserve.scheduler.sequence import Sequence
from jaxserve.scheduler.slots import SlotTable
from jaxserve.types import SamplingParams

ACCOUNTS = Accounts(SchedulerConfig())


def sequence_of(level: int, arrival: int) -> Sequence:
    """A sequence that may take a slot."""
    return Sequence(
        key=("client", arrival),
        token_ids=[1],
        prompt_len=1,
        sampling=SamplingParams(max_tokens=1, seed=0),
        choice=0,
        level=level,
        arrival=arrival,
        stop_token_ids=frozenset(),
        table=PageTable([], []),
        account=ACCOUNTS.account(level, "", 1.0),
    )


@pytest.mark.parametrize("seed", range(5))
def test_the_worst_level_first_and_in_it_who_came_last(seed: int):
    chance = random.Random(seed)
    slots = SlotTable(20, Meter(ACCOUNTS, 1000))
    waiting = [sequence_of(chance.choice([-10, 0, 10]), arrival) for arrival in range(200)]
    chance.shuffle(waiting)
    holding: list[Sequence] = []
    for _ in range(300):
        if waiting and slots.num_free and chance.random() < 0.6:
            holding.append(waiting.pop())
            slots.take(holding[-1])
        elif holding:
            slots.leave(holding.pop(chance.randrange(len(holding))))
        exempt = set(chance.sample(holding, len(holding) // 4))
        above = chance.choice([float("-inf"), -10, 0, 10])
        expected = [s for s in holding if s not in exempt and s.level > above]
        expected.sort(key=lambda s: s.rank, reverse=True)
        assert list(slots.worst_first(exempt, above=above)) == expected
        levels = {s.level for s in holding}
        assert slots.holders.keys() == levels and slots.num_taken == len(holding)
        assert slots.worst_level == max(levels, default=float("-inf"))
