"""A supervised client over several lives of the engine, each in a thread of this process."""

from __future__ import annotations

import asyncio
import dataclasses
import os
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.config import CacheConfig, Config, ModelConfig, SchedulerConfig
from jaxserve.engine.thread import EngineThread
from jaxserve.errors import DeviceFailure, Overloaded, RequestQuarantined
from jaxserve.protocol import pulse
from jaxserve.protocol.client import EngineClient, Stream
from jaxserve.protocol.messages import (
    Cancel,
    ClientMessage,
    Drain,
    EngineMessage,
    Finished,
    GetStatus,
    SequenceRecord,
    Submit,
    TokenEvents,
)
from jaxserve.protocol.replay import JournalEntry
from jaxserve.protocol.status import EngineStatus
from jaxserve.protocol.streams import SequenceEvent
from jaxserve.types import FinishReason, ModelInfo, SamplingParams, TokenLogprobs
from tests.fakes.engine import fake_parts, oracle

CONFIG = Config(
    model=ModelConfig(max_context=1024),
    cache=CacheConfig(page_size=4, num_pages=120),
    scheduler=SchedulerConfig(max_rows=6, max_step_tokens=16, decode_steps=4, max_waiting=20),
)
PROMPT = [11, 12, 13, 14, 15, 16]


def sampling(**values: Any) -> SamplingParams:
    """Sampling parameters of a test."""
    return SamplingParams(**{"max_tokens": 30, "seed": 3, "ignore_eos": True} | values)


class Lives:
    """An engine that can be killed and started again, and its client."""

    def __init__(self) -> None:
        self.engine = EngineThread(CONFIG, fake_parts)
        self.replays: list[tuple[int, int]] = []
        self.client = EngineClient(
            self.engine.connect(), supervised=True, on_replay=lambda *n: self.replays.append(n)
        )

    def die(self) -> None:
        """As the supervisor tells it."""
        self.client.down()
        self.engine.close()

    def start(self) -> None:
        """Another engine."""
        self.engine = EngineThread(CONFIG, fake_parts)
        self.client.reconnect(self.engine.connect())

    async def again(self) -> None:
        """Dies and serves again."""
        self.die()
        self.start()
        await self.client.ready()


def with_lives(body: Callable[[Lives], Awaitable[None]]) -> None:
    """Runs an async test."""

    async def run() -> None:
        lives = Lives()
        await lives.client.start()
        await lives.client.ready()
        try:
            await body(lives)
        finally:
            await lives.client.close()
            lives.engine.close()

    asyncio.run(asyncio.wait_for(run(), 60))


class Reader:
    """Reads a stream and keeps what came, by choice."""

    def __init__(self, stream: Stream, n: int) -> None:
        self.stream = stream
        self.tokens: list[list[int]] = [[] for _ in range(n)]
        self.logprobs: list[list[TokenLogprobs]] = [[] for _ in range(n)]
        self.prompt_logprobs: list[TokenLogprobs] = []
        self.finished: dict[int, Finished] = {}

    def take(self, event: SequenceEvent) -> None:
        """One event."""
        assert event.choice not in self.finished
        self.tokens[event.choice] += event.token_ids
        self.logprobs[event.choice] += event.logprobs
        self.prompt_logprobs += event.prompt_logprobs
        if event.finished is not None:
            self.finished[event.choice] = event.finished

    async def some(self, num_events: int) -> None:
        """So many events, or until the end."""
        for _ in range(num_events):
            if (event := await anext(self.stream, None)) is not None:
                self.take(event)

    async def rest(self) -> None:
        """To the end."""
        async for event in self.stream:
            self.take(event)


REQUESTS = st.fixed_dictionaries(
    {
        "prompt": st.lists(st.integers(3, 500), min_size=1, max_size=40),
        "n": st.integers(1, 3),
        "max_tokens": st.integers(1, 40),
        "seed": st.integers(0, 5),
        "ignore_eos": st.booleans(),
        "stop_token_ids": st.sampled_from([(), tuple(range(100, 120))]),
        "repetition_penalty": st.sampled_from([1.0, 1.2]),
        "bad_words": st.sampled_from([(), ((7, 8),)]),
        "logprobs": st.sampled_from([None, 2]),
        "prompt_logprobs": st.sampled_from([None, 1]),
    }
)


@settings(max_examples=150)
@given(
    st.lists(REQUESTS, min_size=1, max_size=5),
    st.lists(st.integers(0, 12), min_size=1, max_size=4),
)
def test_whatever_runs_when_the_engine_dies_goes_on_as_if_it_had_not(
    requests: list[dict[str, Any]], deaths: list[int]
) -> None:
    async def body(lives: Lives) -> None:
        readers, samplings = [], []
        for request in requests:
            params = dict(request)
            prompt, n = params.pop("prompt"), params.pop("n")
            samplings.append(SamplingParams(**params))
            readers.append(Reader(lives.client.submit(prompt, samplings[-1], n=n), n))
        for num_events in deaths:
            for reader in readers:
                await reader.some(num_events)
            await lives.again()
        for request, params, reader in zip(requests, samplings, readers, strict=True):
            await reader.rest()
            prompt = request["prompt"]
            for choice in range(request["n"]):
                expected = oracle(prompt, params, choice)
                assert reader.tokens[choice] == expected
                record = reader.finished[choice].record
                assert record.output_tokens == len(expected)
                assert record.context_tokens == len(prompt) + len(expected)
                times = [record.arrived_ns, record.queued_ns, record.scheduled_ns]
                times.append(record.first_token_ns or record.done_ns)
                assert times == sorted(times)
                wanted = expected if params.logprobs is not None else []
                assert [entry.token_id for entry in reader.logprobs[choice]] == wanted
            wanted = prompt[1:] if params.prompt_logprobs is not None else []
            assert [entry.token_id for entry in reader.prompt_logprobs] == wanted
        assert (await lives.client.get_status()).pages_used == 0
        assert lives.client.num_streams == 0

    with_lives(body)


def test_positions_of_the_lost_life_count_once_as_computed() -> None:
    async def body(lives: Lives) -> None:
        reader = Reader(lives.client.submit(PROMPT, sampling(max_tokens=200), n=2), 2)
        while not all(reader.tokens):
            await reader.some(1)
        emitted = [len(tokens) for tokens in reader.tokens]
        await lives.again()
        await reader.rest()
        for choice, finished in reader.finished.items():
            record = finished.record
            assert record.replays == 1 and record.output_tokens == 200
            # All positions but the last token's; a further choice shares the prompt's.
            assert record.computed_tokens + record.cached_tokens == len(PROMPT) + 199
            known = len(PROMPT) + emitted[choice]
            shared = len(PROMPT) - 1 if choice else 0
            assert record.recomputed_tokens == known - 1 - shared
        assert lives.replays == [(1, 0)]

    with_lives(body)


def test_a_cancel_between_two_lives_ends_at_once_and_is_not_replayed() -> None:
    async def body(lives: Lives) -> None:
        endless = sampling(max_tokens=300)
        reader = Reader(lives.client.submit(PROMPT, endless, n=3), 3)
        other = lives.client.submit(PROMPT, sampling())
        while not all(reader.tokens):
            await reader.some(1)
        lives.die()
        reader.stream.cancel(1, FinishReason.STOP)
        while 1 not in reader.finished:
            await reader.some(1)
        record = reader.finished[1].record
        assert reader.finished[1].reason is FinishReason.STOP
        assert record.output_tokens == len(reader.tokens[1]) and record.prompt_tokens == 6
        other.cancel()
        assert other.done
        lives.start()
        await lives.client.ready()
        status = await lives.client.get_status()
        assert status.running + status.waiting <= 2
        await reader.rest()
        assert [reader.tokens[c] for c in (0, 2)] == [oracle(PROMPT, endless, c) for c in (0, 2)]
        assert reader.tokens[1] == oracle(PROMPT, endless, 1)[: len(reader.tokens[1])]

    with_lives(body)


def test_what_comes_between_two_lives_waits_for_the_next() -> None:
    async def body(lives: Lives) -> None:
        lives.die()
        status = lives.client.status
        assert status is not None and status.state == "restarting" and status.model is not None
        stream = lives.client.submit(PROMPT, sampling())
        left = lives.client.submit(PROMPT, sampling(), n=2)
        left.cancel(0)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(anext(stream), 0.01)
        lives.start()
        reader, other = Reader(stream, 1), Reader(left, 2)
        await reader.rest()
        await other.rest()
        assert reader.tokens == [oracle(PROMPT, sampling())]
        assert other.tokens == [[], oracle(PROMPT, sampling(), 1)]
        assert reader.finished[0].record.replays == 0

    with_lives(body)


def test_drain_is_asked_for_again_and_refuses_only_the_new() -> None:
    async def body(lives: Lives) -> None:
        old = Reader(lives.client.submit(PROMPT, sampling(max_tokens=200)), 1)
        await old.some(1)
        lives.client.drain()
        await lives.again()
        with pytest.raises(Overloaded, match="draining"):
            await Reader(lives.client.submit(PROMPT, sampling()), 1).rest()
        await lives.again()  # now it drains before it hears of the old
        await old.rest()
        assert old.tokens == [oracle(PROMPT, sampling(max_tokens=200))]
        assert (await lives.client.get_status()).state == "draining"

    with_lives(body)


def test_an_engine_that_is_given_up_ends_every_stream() -> None:
    async def body(lives: Lives) -> None:
        stream = lives.client.submit(PROMPT, sampling(max_tokens=300))
        await anext(stream)
        lives.die()
        lives.client.fail(DeviceFailure("it is not started again"))
        with pytest.raises(DeviceFailure, match="not started again"):
            [event async for event in stream]
        with pytest.raises(DeviceFailure):
            lives.client.submit(PROMPT, sampling())

    with_lives(body)


class Road:
    """A transport whose engine is the test."""

    def __init__(self) -> None:
        self.sent: list[ClientMessage] = []
        self.abandoned = False

    def open(self, deliver: Callable[[EngineMessage], None]) -> None:
        self.deliver = deliver

    def send(self, message: ClientMessage) -> None:
        self.sent.append(message)

    def close(self) -> None:
        pass

    def abandon(self) -> None:
        self.abandoned = True

    def submits(self) -> list[Submit]:
        """Requests that were sent here."""
        return [message for message in self.sent if isinstance(message, Submit)]

    async def says(self, *messages: EngineMessage) -> None:
        """Has the client hear them."""
        for message in messages:
            self.deliver(message)
        await asyncio.sleep(0)
        await asyncio.sleep(0)


def events(sequence_id: int, *tokens: int) -> TokenEvents:
    """Tokens of one sequence."""
    return TokenEvents(step_id=0, at_ns=1, sequence_ids=[sequence_id], token_ids=[list(tokens)])


def ends(sequence_id: int, code: str = "") -> TokenEvents:
    """The end of one sequence."""
    reason = FinishReason.ERROR if code else FinishReason.LENGTH
    finished = Finished(
        sequence_id=sequence_id, reason=reason, record=SequenceRecord(), error_code=code
    )
    return TokenEvents(step_id=0, at_ns=1, finished=[finished])


READY = EngineStatus(
    state="ready",
    pid=1,
    step_age_s=0.0,
    model=ModelInfo(name="m", max_context=64, vocab_size=512, eos_token_ids=(2,), cache_groups=()),
)


def test_no_life_hears_or_is_heard_in_another() -> None:
    async def run() -> None:
        roads = [Road(), Road(), Road()]
        client = EngineClient(roads[0], supervised=True)
        await client.start()
        await roads[0].says(READY)
        stream = client.submit(PROMPT, sampling(), n=3)
        (first,) = roads[0].submits()
        assert len(first.request_key) == 16 and (first.attempt, first.emitted) == (0, [])
        await roads[0].says(events(0, 7), events(2, 8, 9), ends(1))
        # A step that raised ends all with the engine's failure: no stream ends of it.
        failed = EngineStatus(state="failed", pid=1, step_age_s=0.0, error="a step failed")
        await roads[0].says(ends(0, "engine_failure"), ends(2, "engine_failure"), failed)
        assert not stream.done and client.error is None
        client.down()
        assert roads[0].abandoned
        await roads[0].says(events(0, 400), ends(2))  # too late
        client.reconnect(roads[1])
        await roads[1].says(EngineStatus(state="loading", pid=2, step_age_s=0.0))
        assert not roads[1].submits() and client.status.state == "restarting"
        client.down()  # it died while it loaded
        client.reconnect(roads[2])
        await roads[1].says(READY)
        assert not roads[2].submits()
        await roads[2].says(READY)
        (again,) = roads[2].submits()
        assert again == first.__class__(
            **{name: getattr(first, name) for name in ("prompt", "sampling", "arrived_ns")},
            request_key=first.request_key,
            sequence_ids=[3, 5],
            attempt=1,
            choices=[0, 2],
            emitted=[[7], [8, 9]],
            queued_ns=again.queued_ns,
            waited=again.waited,
        )
        (wait,) = again.waited  # one, though two lives ended in it
        assert wait.kind == "replay" and first.arrived_ns < wait.start_ns < wait.end_ns
        assert stream.sequence_ids == range(3, 6)
        await roads[2].says(events(0, 401), ends(2), events(3, 10), ends(3), events(5, 11), ends(5))
        reader = Reader(stream, 3)
        await reader.rest()
        assert reader.tokens == [[7, 10], [], [8, 9, 11]]
        assert not any(isinstance(m, Cancel | Drain) for road in roads for m in road.sent)
        await client.close()

    asyncio.run(asyncio.wait_for(run(), 30))


def test_a_quarantined_request_is_an_error_of_its_own() -> None:
    told: list[tuple[int, int]] = []

    async def run() -> None:
        road = Road()
        client = EngineClient(road, supervised=True, on_replay=lambda *n: told.append(n))
        await client.start()
        await road.says(READY)
        stream = client.submit(PROMPT, sampling(), n=2)
        code = RequestQuarantined.code
        await road.says(ends(0, code), ends(1, code))
        with pytest.raises(RequestQuarantined):
            await anext(stream)
        await client.close()

    asyncio.run(asyncio.wait_for(run(), 30))
    assert told == [(0, 1)]


def test_what_was_waited_before_a_death_is_told_to_the_next_engine() -> None:
    """So that nobody's `scheduler.longest_wait_s` begins anew."""
    message = Submit(sequence_ids=[0, 1], prompt=[], sampling=sampling(), arrived_ns=100)
    entry = JournalEntry(message)
    entry.first_token_ns[1] = 130
    entry.lose(150)
    again = entry.again(range(2, 4), [0, 1], 170)
    # Until its first token. All wait alike between two lives: that puts nobody before another.
    assert isinstance(again, Submit) and again.queued_ns == [50, 30]
    entry.first_token_ns[0] = 210
    entry.lose(220)
    again = entry.again(range(4, 6), [0, 1], 225)
    assert isinstance(again, Submit) and again.queued_ns == [50 + 40, 30]


def test_a_status_that_was_under_way_before_the_question_is_no_answer():
    """What it says may be of before what was sent meanwhile."""

    async def run() -> None:
        road = Road()
        client = EngineClient(road)
        await client.start()
        asking = asyncio.create_task(client.get_status())
        await road.says(dataclasses.replace(READY, running=1, pid=os.getpid()))
        asked = [message.number for message in road.sent if isinstance(message, GetStatus)]
        assert asked == sorted(set(asked)) and len(asked) == 2  # the first is the pulse's
        early = dataclasses.replace(READY, running=2, pid=os.getpid(), answers=asked[0])
        await road.says(early)
        assert not asking.done()
        await road.says(dataclasses.replace(early, running=3, answers=asked[1]))
        assert (await asking).running == 3
        await client.close()

    asyncio.run(asyncio.wait_for(run(), 30))


def test_a_client_that_stood_still_begins_anew_at_the_same_engine(monkeypatch) -> None:
    """The engine may have cancelled what it had; its streams go on, and it is no dead client."""
    pauses = 0

    def begin_anew() -> None:
        nonlocal pauses
        pauses += 1
        monkeypatch.setattr(pulse, "MAX_PAUSE_S", 500.0)
        client.down()
        client.reconnect(engine.connect())

    async def run() -> None:
        await client.start()
        await client.ready()
        reader = Reader(client.submit(PROMPT, sampling(max_tokens=400)), 1)
        await reader.some(2)
        monkeypatch.setattr(pulse, "MAX_PAUSE_S", -1.0)  # as every beat has it
        await reader.rest()
        while not pauses:
            await asyncio.sleep(0)
        assert (pauses, client.error) == (1, None)
        assert reader.tokens == [oracle(PROMPT, sampling(max_tokens=400))]
        await client.ready()
        again = Reader(client.submit(PROMPT, sampling()), 1)
        await again.rest()
        assert again.tokens == [oracle(PROMPT, sampling())]
        assert (await client.get_status()).running == 0
        await client.close()

    monkeypatch.setattr(pulse, "HEARTBEAT_S", 0.01)
    with EngineThread(CONFIG, fake_parts) as engine:
        client = EngineClient(engine.connect(), supervised=True, on_pause=begin_anew)
        asyncio.run(asyncio.wait_for(run(), 60))
