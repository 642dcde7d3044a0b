"""Whatever way a request ends, its record has what the engine did for it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import ClassVar

import pytest

from jaxserve.errors import JaxserveError
from jaxserve.http import settling
from jaxserve.protocol.messages import Finished, SequenceRecord
from jaxserve.protocol.records import Outcome, RequestRecord
from jaxserve.protocol.stream import Stream
from jaxserve.protocol.streams import StreamState
from jaxserve.types import FinishReason
from tests.http.frontend import Front, front
from tests.http.test_streams import CHAT, listening, request

HI = [{"role": "user", "content": "hi"}]
STEP_NS = 1_000_000


class Kept:
    """A reporter that keeps what it is told."""

    def __init__(self) -> None:
        self.records: list[RequestRecord] = []

    async def record(self) -> RequestRecord:
        """The one that has come, or comes."""
        async with asyncio.timeout(20):
            while not self.records:
                await asyncio.sleep(0.002)
        return self.records[-1]


@pytest.fixture(name="front")
def _front() -> Iterator[Front]:
    with front() as made:
        made.engine.engine.executor.device_ns = STEP_NS  # what each step takes
        yield made


@pytest.fixture
def kept(front: Front) -> Kept:
    kept = Kept()
    front.app.frontend.settling._report = kept.records.append
    return kept


def device_ns(record: RequestRecord) -> int:
    return sum(
        s.prefill_device_ns + s.decode_device_ns + s.wasted_device_ns for s in record.sequences
    )


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
def test_a_whole_answer_has_its_sequences(front: Front, kept: Kept, stream: bool):
    body = {"messages": HI, "seed": 1, "max_tokens": 6, "ignore_eos": True, "n": 3}
    front.post(CHAT, body | {"stream": stream})
    (record,) = kept.records
    assert len(record.sequences) == 3
    assert [s.output_tokens for s in record.sequences] == [6, 6, 6]
    first, *others = (s.prefill_device_ns for s in record.sequences)
    assert first > sum(others)  # the prompt once; of the others its last token
    assert all(s.decode_device_ns > 0 for s in record.sequences)


def test_streamed_costs_what_unstreamed_does(front: Front, kept: Kept):
    body = {"seed": 1, "max_tokens": 40, "ignore_eos": True}
    found = []
    for index, stream in enumerate([True, False, True, False]):
        content = f"hello {index}"  # nothing of it is cached
        front.post(
            CHAT, body | {"messages": [{"role": "user", "content": content}], "stream": stream}
        )
        (sequence,) = kept.records[-1].sequences
        found.append((sequence.prefill_device_ns, sequence.decode_device_ns))
    assert len(set(found)) == 1 and min(found[0]) > 0


def test_a_client_that_leaves_is_charged_for_what_was_done(front: Front, kept: Kept):
    async def scenario() -> RequestRecord:
        async with listening(front) as (_, address):
            body = {"messages": HI, "ignore_eos": True, "seed": 1, "stream": True, "n": 2}
            reader, writer = await request(address, body)
            await reader.readuntil(b'"content":')
            writer.transport.abort()
            return await kept.record()

    record = front.run(scenario())
    assert record.outcome is Outcome.LEFT
    assert len(record.sequences) == 2 and device_ns(record) > 0


def test_a_deadline_and_a_stop_string_leave_nothing_out(front: Front, kept: Kept):
    body = {"messages": HI, "ignore_eos": True, "seed": 1, "max_tokens": 200, "timeout": 0.03}
    front.post(CHAT, body | {"n": 4})
    record = front.run(kept.record())
    assert record.outcome in (Outcome.EXPIRED, Outcome.DONE)
    assert len(record.sequences) == 4
    kept.records.clear()
    text = front.ok(CHAT, {"messages": HI, "seed": 1, "max_tokens": 40, "ignore_eos": True})
    content = text["choices"][0]["message"]["content"]
    kept.records.clear()
    front.ok(
        CHAT,
        {"messages": HI, "seed": 1, "max_tokens": 40, "ignore_eos": True, "stop": content[2:4]},
    )
    (sequence,) = kept.records[0].sequences
    assert sequence.decode_device_ns > 0


def test_an_error_of_one_choice_leaves_the_others_work_in():
    """One of three choices fails, the others are cancelled: all their work is the request's."""
    state, ends = StreamState(range(7, 10)), []
    state.at_end = lambda: ends.append(True)

    def end(number: int, reason: FinishReason) -> None:
        record = SequenceRecord(decode_device_ns=10**number)
        state.finish(Finished(sequence_id=7 + number, reason=reason, record=record))

    end(1, FinishReason.ERROR)
    with pytest.raises(JaxserveError):
        state.take()
    end(2, FinishReason.CANCELLED)
    assert not ends
    end(0, FinishReason.CANCELLED)
    assert ends == [True]
    stream = Stream(None, state)
    assert {i: record.decode_device_ns for i, record in stream.records.items()} == {
        0: 1,
        1: 10,
        2: 100,
    }


def test_a_record_is_reported_though_the_engine_never_answers(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(settling, "LAST_WORD_S", 0.01)
    kept: list[RequestRecord] = []

    class Silent:
        done = False
        num_choices = 1
        records: ClassVar[dict[int, SequenceRecord]] = {}

        def at_end(self, call) -> None:
            pass

    async def work() -> None:
        waiting = settling.Settling(kept.append)
        record = RequestRecord(request_id="1", route="/v1/completions", arrived_ns=1)
        waiting.settle(record, [Silent()])
        assert not kept
        await waiting.close()
        assert [r.request_id for r in kept] == ["1"]

    asyncio.run(work())


def test_all_that_steps_took_is_somebodys_or_nobodys(front: Front, kept: Kept):
    """Requests that end, stop, leave and fail: shares and the engine's waste are the steps'."""
    engine = front.engine.engine

    async def scenario() -> None:
        async with listening(front) as (_, address):
            for index in range(12):
                body = {"messages": HI, "seed": index, "stream": True, "max_tokens": 5 + index}
                reader, writer = await request(address, body | {"n": 1 + index % 3})
                if index % 3 == 0:
                    await reader.readuntil(b'"content":')
                    writer.transport.abort()
                else:
                    await reader.readuntil(b"[DONE]")
                    writer.close()
            while len(kept.records) < 12:
                await asyncio.sleep(0.002)

    front.run(scenario())
    num_steps = len(engine.executor.calls)
    front.run(front.client.get_status())
    shared = sum(map(device_ns, kept.records)) + engine._attribution.unowned_ns
    assert shared == STEP_NS * num_steps
