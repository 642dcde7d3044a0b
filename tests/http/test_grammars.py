"""The child that checks grammars: it is killed when it takes too long, and nobody else waits."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from jaxserve.config import StructuredConfig
from jaxserve.errors import GrammarError, Overloaded
from jaxserve.http.grammars import GrammarChecker
from jaxserve.structured.grammars import regex
from jaxserve.types import ModelInfo
from tests.fakes.engine import EOS, VOCAB_SIZE
from tests.fakes.grammar import vocabulary

MODEL = ModelInfo(
    name="fake", max_context=64, vocab_size=VOCAB_SIZE, eos_token_ids=(EOS,), cache_groups=()
)
GOOD, OTHER, WRONG = regex("[0-9]+"), regex("[a-z]+"), regex("(")


@asynccontextmanager
async def checking(**values) -> AsyncIterator[GrammarChecker]:
    checker = GrammarChecker(StructuredConfig(**values), vocabulary)
    try:
        yield checker
    finally:
        await checker.close()


def stop(checker: GrammarChecker) -> int:
    """The child stands still, as if a grammar took for ever; its pid."""
    assert checker._child is not None
    os.kill(checker._child.pid, signal.SIGSTOP)
    return checker._child.pid


def test_verdicts_are_kept() -> None:
    async def run() -> None:
        async with checking() as checker:
            await checker.check(GOOD, MODEL, "guided_regex")
            for _ in range(2):
                with pytest.raises(GrammarError, match="guided_regex: .*unclosed group") as caught:
                    await checker.check(WRONG, MODEL, "guided_regex")
                assert caught.value.param == "guided_regex"
            stop(checker)  # and nobody is asked again
            await asyncio.wait_for(checker.check(GOOD, MODEL, "guided_regex"), 5)
            with pytest.raises(GrammarError):
                await asyncio.wait_for(checker.check(WRONG, MODEL, "guided_regex"), 5)

    asyncio.run(run())


def test_one_that_takes_too_long_is_refused_and_its_child_killed() -> None:
    async def run() -> None:
        async with checking(check_timeout_s=0.3) as checker:
            await checker.check(GOOD, MODEL, "x")
            pid = stop(checker)
            with pytest.raises(GrammarError, match="longer than 0.3 s"):
                await checker.check(OTHER, MODEL, "x")
            with pytest.raises(ProcessLookupError):
                os.kill(pid, 0)
            await checker.check(regex("c"), MODEL, "x")
            with pytest.raises(GrammarError, match="longer"):  # it is known by now
                await checker.check(OTHER, MODEL, "x")

    asyncio.run(run())


def test_one_that_needs_too_much_memory_is_refused() -> None:
    async def run() -> None:
        async with checking() as checker:
            await checker.check(GOOD, MODEL, "x")
            pid = stop(checker)
            asked = asyncio.create_task(checker.check(OTHER, MODEL, "x"))
            await asyncio.sleep(0)
            os.kill(pid, signal.SIGKILL)  # as an allocation beyond the limit ends it
            with pytest.raises(GrammarError, match="2048 MiB"):
                await asked
            await checker.check(regex("c"), MODEL, "x")

    asyncio.run(run())


def test_the_child_has_the_limit_of_memory() -> None:
    async def run() -> None:
        async with checking(check_memory_bytes=2**30) as checker:
            await checker.check(GOOD, MODEL, "x")
            assert checker._child is not None
            with open(f"/proc/{checker._child.pid}/limits") as file:
                (line,) = [line for line in file if line.startswith("Max address space")]
            assert str(2**30) in line

    asyncio.run(run())


def test_who_leaves_takes_the_check_from_nobody() -> None:
    async def run() -> None:
        async with checking() as checker:
            first = asyncio.create_task(checker.check(GOOD, MODEL, "x"))
            second = asyncio.create_task(checker.check(GOOD, MODEL, "x"))
            await asyncio.sleep(0)
            first.cancel()
            await second
            with pytest.raises(asyncio.CancelledError):
                await first

    asyncio.run(run())


def test_those_behind_too_many_others_are_told_to_come_back() -> None:
    async def run() -> None:
        async with checking(check_timeout_s=0.2) as checker:
            await checker._turns.acquire(1)  # somebody else's turn, for too long
            with pytest.raises(Overloaded):
                await checker.check(GOOD, MODEL, "x")
            checker._turns.release()
            await checker.check(GOOD, MODEL, "x")

    asyncio.run(run())


def test_small_grammars_do_not_wait_for_many_large_ones() -> None:
    """Which may take their whole time each, and together longer than anybody waits."""

    async def run() -> None:
        async with checking() as checker:
            await checker._turns.acquire(1)  # somebody else's turn
            large = [regex(f"a{index}" * 1000) for index in range(12)]
            waiting = [*large, OTHER]
            tasks = [asyncio.create_task(checker.check(own, MODEL, "x")) for own in waiting]
            await asyncio.sleep(0)
            await asyncio.sleep(0)  # all wait
            checker._turns.release()
            await asyncio.gather(*tasks)
            assert list(checker._verdicts) == [OTHER, *large]

    asyncio.run(run())
