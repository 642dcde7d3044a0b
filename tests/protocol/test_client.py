"""The client against a fake engine, in a thread and in a process: same words, same behaviour."""

from __future__ import annotations

import asyncio
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from jaxserve.config import CacheConfig, Config, ModelConfig, SchedulerConfig
from jaxserve.engine.thread import EngineThread
from jaxserve.errors import ContextTooLong, DeviceFailure, InvalidRequest, OutOfPages, Overloaded
from jaxserve.protocol.client import ClientTransport, EngineClient, SyncClient
from jaxserve.protocol.spawn import EngineProcess, EngineSettings
from jaxserve.protocol.status import StepStats
from jaxserve.protocol.zmq import ZmqClient
from jaxserve.types import FinishReason, SamplingParams
from tests.fakes.engine import fake_parts, oracle

CONFIG = Config(
    model=ModelConfig(max_context=1024),
    cache=CacheConfig(page_size=4, num_pages=200),
    scheduler=SchedulerConfig(max_rows=8, max_step_tokens=32, decode_steps=4, max_waiting=20),
)
PROMPT = [11, 12, 13, 14, 15, 16]


def sampling(**values) -> SamplingParams:
    """Sampling parameters of a test."""
    return SamplingParams(**{"max_tokens": 20, "seed": 3, "ignore_eos": True} | values)


@contextmanager
def in_thread(config: Config = CONFIG) -> Iterator:
    """Connects to an engine in a thread."""
    with EngineThread(config, fake_parts) as engine:
        yield engine.connect


@contextmanager
def in_process(config: Config = CONFIG) -> Iterator:
    """Connects to an engine in a process."""
    process = EngineProcess.start(config, module="tests.fakes.engine")
    try:
        yield lambda: ZmqClient(process.address)
    finally:
        assert process.stop() == 0


@pytest.fixture(scope="module", params=[in_thread, in_process], ids=["thread", "process"])
def connect(request):
    """Transports to one engine, over each road."""
    with request.param() as connect:
        yield connect


async def collect(stream) -> dict[int, list[int]]:
    """All tokens of a stream by choice; checks that each choice ends once, with its record."""
    tokens: dict[int, list[int]] = {choice: [] for choice in range(len(stream.sequence_ids))}
    ended = []
    async for event in stream:
        tokens[event.choice] += event.token_ids
        if event.finished is not None:
            ended.append(event.choice)
            assert event.finished.record.output_tokens == len(tokens[event.choice])
    assert sorted(ended) == list(tokens)
    return tokens


def with_client(transport: ClientTransport, body, **options) -> None:
    """Runs an async test with a ready client."""

    async def run() -> None:
        client = EngineClient(transport, **options)
        await client.start()
        await client.ready()
        try:
            await body(client)
        finally:
            await client.close()

    asyncio.run(asyncio.wait_for(run(), 60))


def test_choices_equal_the_oracle(connect):
    async def body(client: EngineClient) -> None:
        assert client.status is not None and client.status.model is not None
        assert client.status.model.max_context == 1024
        tokens = await collect(client.submit(PROMPT, sampling(), n=3))
        assert tokens == {choice: oracle(PROMPT, sampling(), choice) for choice in range(3)}
        assert client.num_streams == 0

    with_client(connect(), body)


def test_records_and_times_are_in_order(connect):
    async def body(client: EngineClient) -> None:
        stream = client.submit(PROMPT, sampling(max_tokens=9), cache_salt="records")
        events = [event async for event in stream]
        finished = events[-1].finished
        assert finished is not None and finished.reason is FinishReason.LENGTH
        r = finished.record
        assert (r.prompt_tokens, r.output_tokens, r.context_tokens) == (6, 9, 15)
        assert (r.computed_tokens, r.cached_tokens, r.discarded_tokens) == (14, 0, 0)
        times = [r.arrived_ns, r.queued_ns, r.scheduled_ns, r.first_token_ns, r.done_ns]
        assert times == sorted(times) and times[0] > 0

    with_client(connect(), body)


def test_logprobs_come_with_their_tokens_and_prompt_logprobs_once(connect):
    async def body(client: EngineClient) -> None:
        prompt = list(range(20, 90))  # three chunks
        params = sampling(max_tokens=10, logprobs=2, prompt_logprobs=1)
        tokens, entries, prompt_entries = [], [], []
        async for event in client.submit(prompt, params, n=2):
            if event.choice == 0:
                tokens += event.token_ids
                entries += event.logprobs
                prompt_entries += event.prompt_logprobs
            else:
                assert not event.prompt_logprobs
        assert [entry.token_id for entry in entries] == tokens == oracle(prompt, params)
        assert [entry.token_id for entry in prompt_entries] == prompt[1:]
        assert {len(entry.top) for entry in entries} == {2}
        assert {len(entry.top) for entry in prompt_entries} == {1}

    with_client(connect(), body)


def test_refusals_are_typed(connect):
    async def body(client: EngineClient) -> None:
        cases = [
            (ContextTooLong, PROMPT, sampling(max_tokens=2000), "1024"),
            (OutOfPages, PROMPT, sampling(max_tokens=900), "199 pages"),
            (InvalidRequest, [512], sampling(), "512"),
            (InvalidRequest, [-1], sampling(), "-1"),
            (InvalidRequest, [], sampling(), "empty"),
            (InvalidRequest, PROMPT, sampling(temperature=float("nan")), "nan"),
            (InvalidRequest, PROMPT, sampling(logit_bias=((900, 1.0),)), "900"),
        ]
        for kind, prompt, params, words in cases:
            with pytest.raises(kind, match=words):
                await collect(client.submit(prompt, params))
        with pytest.raises(InvalidRequest, match="8 \\+ 20"):
            await collect(client.submit(PROMPT, sampling(), n=29))
        async with client.submit(PROMPT, sampling(max_tokens=700), n=28):
            with pytest.raises(Overloaded, match="20"):
                await collect(client.submit(PROMPT, sampling(), n=28))
        assert (await collect(client.submit(PROMPT, sampling())))[0] == oracle(PROMPT, sampling())

    with_client(connect(), body)


def test_a_slow_reader_gets_its_tokens_in_one_event(connect):
    async def body(client: EngineClient) -> None:
        slow = client.submit(PROMPT, sampling(max_tokens=200), n=2)
        while not slow.done:
            await client.join()
        events = [event async for event in slow]
        assert [len(event.token_ids) for event in events] == [200, 200]
        assert events[0].token_ids == oracle(PROMPT, sampling(max_tokens=200), events[0].choice)

    with_client(connect(), body)


def test_leaving_a_stream_frees_its_pages(connect):
    async def body(client: EngineClient) -> None:
        async with client.submit(PROMPT, sampling(max_tokens=700), n=2) as stream:
            async for event in stream:
                assert event.finished is None
                break
        events = [event async for event in stream]
        ends = [event.finished.reason for event in events if event.finished]
        assert ends == [FinishReason.CANCELLED] * 2
        assert (await client.get_status()).pages_used == 0

    with_client(connect(), body)


def test_cancel_with_stop_ends_one_choice(connect):
    async def body(client: EngineClient) -> None:
        stream = client.submit(PROMPT, sampling(max_tokens=300), n=2)
        reasons = {}
        async for event in stream:
            if event.choice == 1 and not reasons:
                stream.cancel(1, FinishReason.STOP)
            if event.finished is not None:
                reasons[event.choice] = event.finished.reason
        assert reasons == {0: FinishReason.LENGTH, 1: FinishReason.STOP}

    with_client(connect(), body)


def test_two_clients_use_the_same_ids_and_one_vanishes(connect):
    async def body(first: EngineClient) -> None:
        second = EngineClient(connect())
        await second.start()
        await second.ready()
        long = second.submit(PROMPT, sampling(max_tokens=700), n=2)
        await anext(long)
        mine = asyncio.create_task(collect(first.submit(PROMPT, sampling(seed=9), n=2)))
        await second.close()
        with pytest.raises(DeviceFailure, match="closed"):
            [event async for event in long]
        tokens = await mine
        assert tokens == {c: oracle(PROMPT, sampling(seed=9), c) for c in range(2)}
        status = await first.get_status()
        assert (status.pages_used, status.running, status.waiting) == (0, 0, 0)

    with_client(connect(), body)


def test_step_statistics_go_to_those_that_ask(connect):
    stats: list[StepStats] = []

    async def body(client: EngineClient) -> None:
        before = await client.get_status()
        for _ in range(2):
            await collect(client.submit(PROMPT, sampling(max_tokens=10), cache_salt="stats"))
        status = await client.get_status()
        assert sum(s.prefill_tokens for s in stats) == len(PROMPT) + 2
        assert status.prefix_lookup_tokens - before.prefix_lookup_tokens == 2 * len(PROMPT)
        assert status.prefix_hit_tokens - before.prefix_hit_tokens == 4
        assert sum(s.prefix_hit_tokens for s in stats) == status.prefix_hit_tokens  # all that was
        assert stats[-1].pages_cached == status.pages_cached >= 3
        assert sum(s.decode_tokens for s in stats) == 2 * 9
        assert stats[0].rows == 1 and stats[-1].pages_total == 199
        assert [s.step_id for s in stats] == sorted(s.step_id for s in stats)

    with_client(connect(), body, on_stats=stats.append)


def test_sync_client_reads_many_streams(connect):
    client = SyncClient(connect())
    client.start()
    client.ready()
    streams = [client.submit(PROMPT, sampling(seed=seed)) for seed in range(5)]
    last = [token for event in streams[4] for token in event.token_ids]
    assert last == oracle(PROMPT, sampling(seed=4))
    for seed, stream in enumerate(streams[:4]):
        tokens = [token for event in stream for token in event.token_ids]
        assert tokens == oracle(PROMPT, sampling(seed=seed))
    assert client.get_status().pages_used == 0
    client.close()


@pytest.mark.parametrize("road", [in_thread, in_process], ids=["thread", "process"])
def test_drain_refuses_the_new_and_ends_the_old(road):
    with road() as connect:

        async def body(client: EngineClient) -> None:
            old = client.submit(PROMPT, sampling(max_tokens=500))
            await anext(old)
            client.drain()
            with pytest.raises(Overloaded, match="draining"):
                await collect(client.submit(PROMPT, sampling()))
            await client.join()
            assert old.done
            assert (await client.get_status()).state == "draining"

        with_client(connect(), body)


def test_a_killed_engine_fails_every_stream():
    process = EngineProcess.start(CONFIG, module="tests.fakes.engine")

    async def body(client: EngineClient) -> None:
        stream = client.submit(PROMPT, sampling(max_tokens=700))
        await anext(stream)
        os.kill(process.pid, signal.SIGKILL)
        with pytest.raises(DeviceFailure, match=f"pid {process.pid}"):
            [event async for event in stream]
        with pytest.raises(DeviceFailure):
            client.submit(PROMPT, sampling())

    with_client(ZmqClient(process.address), body)
    assert process.stop() == -signal.SIGKILL


def test_a_step_that_fails_ends_all_sequences_and_the_process():
    config = Config(model=ModelConfig(max_context=1024, served_name="fails"), cache=CONFIG.cache)
    process = EngineProcess.start(config, module="tests.fakes.failing_engine")

    async def body(client: EngineClient) -> None:
        streams = [client.submit(PROMPT, sampling(max_tokens=700), n=2) for _ in range(3)]
        for stream in streams:
            with pytest.raises(DeviceFailure, match="told to fail"):
                [event async for event in stream]

    with_client(ZmqClient(process.address), body)
    assert process.stop() == 5


def test_a_model_that_does_not_load_is_one_sentence_and_exit_1(capfd):
    config = Config(model=ModelConfig(path="/no/such/model"))
    process = EngineProcess.start(config, module="tests.fakes.failing_engine")

    async def run() -> None:
        client = EngineClient(ZmqClient(process.address))
        await client.start()
        with pytest.raises(DeviceFailure, match=r"/no/such/model does not exist|pid"):
            await client.ready()
        await client.close()

    asyncio.run(asyncio.wait_for(run(), 60))
    assert process.stop() == 1
    assert capfd.readouterr().err == "jaxserve: /no/such/model does not exist\n"


def test_an_engine_of_other_code_than_its_parents_does_not_start(capfd):
    settings = EngineSettings(config=CONFIG, messages="as they were when the server was started")
    process = EngineProcess.start(settings, module="tests.fakes.engine")
    with os.fdopen(os.pidfd_open(process.pid)) as end:
        assert select.select([end], [], [], 60)[0]
    assert process.stop() == 1
    assert "the code on the disk has changed" in capfd.readouterr().err


def test_the_engine_ends_with_its_parent():
    script = (
        "from jaxserve.config import Config\n"
        "from jaxserve.protocol.spawn import EngineProcess\n"
        "print(EngineProcess.start(Config(), module='tests.fakes.engine').pid, flush=True)\n"
        "input()\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert parent.stdin is not None and parent.stdout is not None
    engine = os.pidfd_open(int(parent.stdout.readline()))
    parent.kill()
    parent.wait(20)
    parent.stdin.close()
    parent.stdout.close()
    poll = select.poll()
    poll.register(engine, select.POLLIN)
    assert poll.poll(20_000), "the engine outlives its parent"
    os.close(engine)
