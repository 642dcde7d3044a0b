"""Whose turn is next."""

from __future__ import annotations

import asyncio

import pytest

from jaxserve.http.turns import Turns


def test_the_smallest_goes_first_and_of_equals_the_first() -> None:
    async def run() -> None:
        turns, went = Turns(), []

        async def work(size: int, name: str) -> None:
            await turns.acquire(size)
            went.append(name)
            await asyncio.sleep(0)
            turns.release()

        await turns.acquire(9)
        sizes = {"large": 7, "small": 1, "middle": 3, "small too": 1}
        tasks = [asyncio.create_task(work(size, name)) for name, size in sizes.items()]
        await asyncio.sleep(0)
        assert went == []
        turns.release()
        await asyncio.gather(*tasks)
        assert went == ["small", "small too", "middle", "large"]

    asyncio.run(run())


@pytest.mark.parametrize("given", [False, True])
def test_who_leaves_keeps_nobody_waiting(given: bool) -> None:
    """Also where the turn was given in the moment of leaving."""

    async def run() -> None:
        turns = Turns()
        await turns.acquire(1)
        leaver = asyncio.create_task(turns.acquire(1))
        other = asyncio.create_task(turns.acquire(2))
        await asyncio.sleep(0)
        if given:
            turns.release()
        leaver.cancel()
        await asyncio.wait([leaver])
        assert leaver.cancelled()
        if not given:
            assert not other.done()
            turns.release()
        await asyncio.wait_for(other, 5)
        turns.release()
        await asyncio.wait_for(turns.acquire(1), 5)

    asyncio.run(run())


def test_who_has_left_and_not_heard_of_it_is_passed_over() -> None:
    async def run() -> None:
        turns = Turns()
        await turns.acquire(1)
        leaver = asyncio.create_task(turns.acquire(1))
        other = asyncio.create_task(turns.acquire(2))
        await asyncio.sleep(0)
        leaver.cancel()
        turns.release()
        await asyncio.wait_for(other, 5)
        assert leaver.cancelled()
        third = asyncio.create_task(turns.acquire(1))
        await asyncio.sleep(0)
        assert not third.done(), "one at a time"
        turns.release()
        await asyncio.wait_for(third, 5)

    asyncio.run(run())


def test_one_place_of_several_is_left_to_small_work() -> None:
    async def run() -> None:
        turns = Turns(places=2, small=5)
        await turns.acquire(9)
        large = asyncio.create_task(turns.acquire(6))
        await asyncio.sleep(0)
        assert not large.done(), "the last place is not for it"
        await asyncio.wait_for(turns.acquire(5), 5)
        small = asyncio.create_task(turns.acquire(5))
        await asyncio.sleep(0)
        assert not small.done(), "there is none"
        turns.release()
        await asyncio.wait_for(small, 5)
        assert not large.done()
        turns.release()
        await asyncio.sleep(0)
        assert not large.done(), "one other large one still works"
        turns.release()
        await asyncio.wait_for(large, 5)

    asyncio.run(run())
