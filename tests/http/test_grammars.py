"""The child that checks grammars, each in a fork: those that take long end, and nobody waits."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from jaxserve.config import StructuredConfig
from jaxserve.errors import GrammarError, Overloaded
from jaxserve.http.grammars import GrammarChecker
from jaxserve.protocol.parent import has_ended
from jaxserve.structured.grammars import json_schema, regex
from jaxserve.types import Grammar, ModelInfo, Vocabulary
from tests.fakes.engine import EOS, VOCAB_SIZE
from tests.fakes.grammar import vocabulary

MODEL = ModelInfo(
    name="fake", max_context=64, vocab_size=VOCAB_SIZE, eos_token_ids=(EOS,), cache_groups=()
)
GOOD, OTHER, WRONG = regex("[0-9]+"), regex("[a-z]+"), regex("(")


def slow(name: str, size: int = 9_000) -> Grammar:
    """One that takes seconds, by the square of its size, and little memory."""
    return json_schema({"properties": {f"{name}_{index}": {} for index in range(size)}})


@asynccontextmanager
async def checking(at_once: int | None = None, **values) -> AsyncIterator[GrammarChecker]:
    config = StructuredConfig(**{"max_properties": 100_000} | values)
    checker = GrammarChecker(config, vocabulary, at_once)
    try:
        yield checker
    finally:
        await checker.close()


def child(checker: GrammarChecker) -> int:
    """The child's pid."""
    assert checker._child is not None
    return checker._child.pid


def forks_of(pid: int) -> list[int]:
    """Its grammars', by pid."""
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(word) for word in file.read().split()]


async def a_fork(checker: GrammarChecker) -> int:
    """The pid of one, once there is one."""
    async with asyncio.timeout(20):
        while not (pids := forks_of(child(checker))):
            await asyncio.sleep(0.001)
    return pids[0]


async def ended(pid: int) -> None:
    """Returns when no such process runs."""
    async with asyncio.timeout(20):
        while not has_ended(pid):
            await asyncio.sleep(0.01)


def test_verdicts_are_kept() -> None:
    async def run() -> None:
        async with checking() as checker:
            await checker.check(GOOD, MODEL, "guided_regex")
            for _ in range(2):
                with pytest.raises(GrammarError, match="guided_regex: .*unclosed group") as caught:
                    await checker.check(WRONG, MODEL, "guided_regex")
                assert caught.value.param == "guided_regex"
            os.kill(child(checker), signal.SIGSTOP)  # and nobody is asked again
            await asyncio.wait_for(checker.check(GOOD, MODEL, "guided_regex"), 5)
            with pytest.raises(GrammarError):
                await asyncio.wait_for(checker.check(WRONG, MODEL, "guided_regex"), 5)

    asyncio.run(run())


def test_one_that_takes_too_long_is_refused_and_its_fork_killed() -> None:
    async def run() -> None:
        async with checking(check_timeout_s=0.3) as checker:
            await checker.check(GOOD, MODEL, "x")
            pid, large = child(checker), slow("a")
            asked = asyncio.create_task(checker.check(large, MODEL, "x"))
            fork = await a_fork(checker)
            with pytest.raises(GrammarError, match=r"longer than 0.3 s") as caught:
                await asked
            assert caught.value.param == "x" and has_ended(fork) and not forks_of(pid)
            await checker.check(OTHER, MODEL, "x")
            assert child(checker) == pid, "the child goes on"
            os.kill(pid, signal.SIGSTOP)
            with pytest.raises(GrammarError, match="longer"):  # it is known by now
                await checker.check(large, MODEL, "x")

    asyncio.run(run())


def test_one_that_needs_too_much_memory_is_refused() -> None:
    async def run() -> None:
        async with checking() as checker:
            await checker.check(GOOD, MODEL, "x")
            large = slow("a")
            asked = asyncio.create_task(checker.check(large, MODEL, "x"))
            os.kill(await a_fork(checker), signal.SIGKILL)  # as too large an allocation ends it
            with pytest.raises(GrammarError, match="2048 MiB"):
                await asked
            assert large not in checker._verdicts, "something else may have ended it"
            await checker.check(OTHER, MODEL, "x")

    asyncio.run(run())


def test_grammars_are_compiled_beside_each_other() -> None:
    """Whoever's takes long; and small ones do not wait for any number of large ones."""

    async def run() -> None:
        async with checking(at_once=3, check_timeout_s=2.0) as checker:
            await checker.check(GOOD, MODEL, "x")
            large = [asyncio.create_task(checker.check(slow(n), MODEL, "x")) for n in "abcd"]
            await a_fork(checker)
            async with asyncio.timeout(20):
                while len(forks_of(child(checker))) < 2:
                    await asyncio.sleep(0.001)
            await checker.check(OTHER, MODEL, "x")
            assert not any(task.done() for task in large)
            assert len(forks_of(child(checker))) == 2, "one place is left to small ones"
            ends = await asyncio.gather(*large, return_exceptions=True)
            assert all(isinstance(end, GrammarError | Overloaded) for end in ends)

    asyncio.run(run())


def test_many_large_ones_at_once_are_all_answered_in_time() -> None:
    async def run() -> None:
        async with checking(check_timeout_s=0.5) as checker:
            await checker.check(GOOD, MODEL, "x")
            large = [slow(f"a{index}") for index in range(12)]
            begun_s = time.monotonic()
            asked = [checker.check(own, MODEL, "x") for own in large]
            ends = await asyncio.gather(*asked, return_exceptions=True)
            took_s = time.monotonic() - begun_s
            kinds = {type(end) for end in ends}
            assert kinds == {GrammarError, Overloaded}
            assert took_s < checker.patience_s + 1.0, "and what a busy machine adds"

    asyncio.run(run())


def test_a_child_that_ends_is_started_again_for_those_that_it_leaves() -> None:
    async def run() -> None:
        async with checking(check_timeout_s=30.0) as checker:
            await checker.check(GOOD, MODEL, "x")
            first, large = child(checker), slow("a", 3_000)
            asked = asyncio.create_task(checker.check(large, MODEL, "x"))
            fork = await a_fork(checker)
            os.kill(first, signal.SIGKILL)
            await asked
            assert child(checker) != first
            await ended(fork)

    asyncio.run(run())


def test_a_child_that_does_not_answer_is_replaced() -> None:
    async def run() -> None:
        async with checking(check_timeout_s=0.2) as checker:
            await checker.check(GOOD, MODEL, "x")
            first = child(checker)
            os.kill(first, signal.SIGSTOP)
            with pytest.raises(Overloaded):
                await checker.check(OTHER, MODEL, "x")
            assert has_ended(first)
            await checker.check(OTHER, MODEL, "x")

    asyncio.run(run())


def test_the_child_and_its_forks_end_with_who_asks() -> None:
    """Here by closing its pipe, as the end of a worker does."""

    async def run() -> None:
        async with checking(check_timeout_s=30.0) as checker:
            await checker.check(GOOD, MODEL, "x")
            asked = asyncio.create_task(checker.check(slow("a"), MODEL, "x"))
            fork, own = await a_fork(checker), checker._child
            assert own is not None and own._process.stdin is not None
            pid = own.pid

            def nothing() -> Vocabulary:
                raise GrammarError("no other child is wanted")

            checker._vocabulary = nothing
            own._process.stdin.close()
            await ended(pid)
            await ended(fork)
            with pytest.raises(GrammarError, match="no other child"):
                await asked

    asyncio.run(run())


def test_the_limit_of_a_grammar_is_in_bytes() -> None:
    """As the engine's is: what passes here is not refused there."""

    async def run() -> None:
        async with checking(max_grammar_bytes=10) as checker:
            await checker.check(regex("\u65e5" * 3), MODEL, "x")
            with pytest.raises(GrammarError, match="x: the grammar has 12 bytes, the limit is 10"):
                await checker.check(regex("\u65e5" * 4), MODEL, "x")

    asyncio.run(run())


def test_the_child_has_the_limit_of_memory() -> None:
    async def run() -> None:
        async with checking(check_memory_bytes=2**30) as checker:
            await checker.check(GOOD, MODEL, "x")
            with open(f"/proc/{child(checker)}/limits") as file:
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
        async with checking(at_once=1, check_timeout_s=0.2) as checker:
            await checker._turns.acquire(1)  # somebody else's turn, for too long
            with pytest.raises(Overloaded):
                await checker.check(GOOD, MODEL, "x")
            checker._turns.release()
            await checker.check(GOOD, MODEL, "x")

    asyncio.run(run())


def test_small_grammars_do_not_wait_for_many_large_ones() -> None:
    """Which may take their whole time each, and together longer than anybody waits."""

    async def run() -> None:
        async with checking(at_once=1) as checker:
            await checker.ready(MODEL)
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
