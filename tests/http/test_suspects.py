"""Who is condemned for the engine's deaths: one that kills it alone, and nobody else."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.http.suspects import Suspects, split
from jaxserve.protocol.flight import LastSteps


def keys(numbers: range) -> list[str]:
    """Request keys."""
    return [f"{number + 1:016x}" for number in numbers]


def death(requests: list[str], on_trial: tuple[str, ...] = (), trials_done: int = 0) -> LastSteps:
    """Of a serving engine."""
    return LastSteps(
        requests=frozenset(requests),
        on_trial=frozenset(on_trial),
        trials_done=trials_done,
        serving=True,
    )


def lives_until_found(suspects: Suspects, crowd: list[str], killer: str) -> int:
    """Engine lives until the killer is quarantined, when it dies with everybody that runs."""
    for life in range(1, 100):
        beside: list[str] = []
        for done, trial in enumerate(suspects.trials):
            if killer in trial:
                suspects.judge(death([*trial, *beside], trial, done))
                break
            beside += trial  # has stood its trial, and runs on
        else:
            suspects.judge(death(crowd, (), len(suspects.trials)))
        if killer in suspects.quarantined:
            return life
    raise AssertionError("it is never found")


@pytest.mark.parametrize(("size", "most"), [(1, 3), (2, 4), (4, 4), (16, 5), (64, 6), (256, 7)])
def test_the_killer_is_found_and_nobody_else(size: int, most: int) -> None:
    crowd = keys(range(size))
    for killer in (crowd[0], crowd[-1], crowd[size // 2]):
        suspects = Suspects()
        assert lives_until_found(suspects, crowd, killer) <= most
        assert suspects.quarantined == (killer,)
        assert killer not in {key for trial in suspects.trials for key in trial}


def test_several_killers_are_found_one_after_the_other() -> None:
    crowd = keys(range(30))
    killers = {crowd[3], crowd[4], crowd[29]}
    suspects = Suspects()
    for _ in range(60):
        if set(suspects.quarantined) == killers:
            break
        left = killers - set(suspects.quarantined)
        beside: list[str] = []
        for done, trial in enumerate(suspects.trials):
            if left & set(trial):
                suspects.judge(death([*trial, *beside], trial, done))
                break
            beside += trial
        else:
            alive = [key for key in crowd if key not in suspects.quarantined]
            suspects.judge(death(alive, (), len(suspects.trials)))
    assert set(suspects.quarantined) == killers


@settings(max_examples=200)
@given(st.integers(2, 40), st.integers(0, 2**32))
def test_kills_from_outside_condemn_nobody_of_a_crowd(size: int, seed: int) -> None:
    """Five kills at any moment: during a trial, between two, or when all have stood theirs."""
    rng = random.Random(seed)
    crowd = keys(range(size))
    suspects = Suspects()
    for _ in range(5):
        trials = suspects.trials
        done = rng.randint(0, len(trials))
        if done == len(trials):
            suspects.judge(death(crowd, (), done))
            continue
        trial, beside = trials[done], [key for stood in trials[:done] for key in stood]
        if len(trial) == 1 and not beside:
            break  # alone: whoever kills it now is believed to be this request
        suspects.judge(death([*trial, *beside], trial, done))
        assert not suspects.quarantined


def test_a_death_that_says_nothing_changes_nothing() -> None:
    crowd = keys(range(4))
    suspects = Suspects()
    for _ in range(2):
        suspects.judge(death(crowd))
    trials = suspects.trials
    assert sorted(key for trial in trials for key in trial) == crowd
    suspects.judge(LastSteps(requests=frozenset(crowd)))  # while it started
    suspects.judge(death([]))  # before the first trial began
    suspects.judge(death([crowd[0]], (crowd[1],)))  # who was on trial was in no step
    assert suspects.trials == trials and not suspects.quarantined
    suspects.judge(death(crowd, (), len(trials)))  # all have stood: this is their first again
    assert not suspects.trials


def test_groups_are_quarters() -> None:
    assert [len(part) for part in split(keys(range(10)))] == [3, 3, 2, 2]
    assert split(keys(range(1))) == ((keys(range(1))[0],),)
    assert split([]) == ()
