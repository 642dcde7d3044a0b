"""The sequences that clients wait for: each ends once, and what is refused is told likewise."""

from __future__ import annotations

import dataclasses

import pytest

from jaxserve.config import SchedulerConfig
from jaxserve.engine.adapters import RequestAdapters
from jaxserve.engine.attribution import Attribution, WorkRates
from jaxserve.engine.backlog import Backlog
from jaxserve.engine.live import LiveSequences
from jaxserve.engine.outbox import Outbox
from jaxserve.errors import DeviceFailure, InvalidRequest
from jaxserve.protocol.messages import Finished, Interval, Submit
from jaxserve.scheduler.scheduler import Scheduler
from jaxserve.scheduler.sequence import Sequence
from jaxserve.types import FinishReason
from tests.engine.test_lobby import MODEL
from tests.engine.test_loop import ListServer, submit

PARENT = f"00-{'a' * 32}-{'b' * 16}-01"


class Desk:
    """Live sequences, and a scheduler that makes some."""

    def __init__(self) -> None:
        self.server = ListServer()
        self.outbox = Outbox(self.server)
        self.backlog = Backlog()
        self.live = LiveSequences(
            self.outbox, self.backlog, RequestAdapters(), Attribution(WorkRates(), 4)
        )
        self.scheduler = Scheduler(SchedulerConfig(), MODEL, page_size=4, num_pages=[65])

    def enter(self, client: str, message: Submit) -> list[Sequence]:
        """Lets a request in."""
        assert not self.live.knows(client, message.sequence_ids)
        sequences = self.scheduler.submit(
            [(client, number) for number in message.sequence_ids], [5, 6], message.sampling
        )
        self.backlog.enter(sequences, 0, "")
        self.live.enter(client, message, sequences)
        return sequences

    def told(self, client: str) -> list[Finished]:
        """The ends that a client was sent."""
        self.outbox.send()
        return self.server.ends(client)


@pytest.fixture
def desk() -> Desk:
    return Desk()


def test_numbers_are_each_client_s_own_and_free_once_their_sequences_have_ended(desk: Desk):
    first, second = desk.enter("a", dataclasses.replace(submit([1, 2], [5]), traceparent=PARENT))
    desk.enter("b", submit([1], [5]))
    assert desk.live.of("a") == {1: first, 2: second} and set(desk.live.clients) == {"a", "b"}
    assert desk.live.knows("a", [9, 2]) and not desk.live.knows("b", [2])
    second.reason = FinishReason.STOP
    desk.live.finish(second, 77)
    (end,) = desk.told("a")
    assert (end.sequence_id, end.reason, end.error_code) == (2, FinishReason.STOP, "")
    assert (end.record.done_ns, end.record.traceparent) == (77, PARENT)
    assert desk.live.of("a") == {1: first} and not desk.live.knows("a", [2])
    with pytest.raises(KeyError):
        desk.live.finish(second, 78)


def test_all_end_with_one_error_but_those_that_had_ended_keep_their_reason(desk: Desk):
    stopped, _ = desk.enter("a", submit([1, 2], [5]))
    desk.enter("b", submit([1], [5]))
    stopped.reason = FinishReason.STOP
    desk.live.finish_all(DeviceFailure("it burns"))
    by_id = {end.sequence_id: end.reason for end in desk.told("a")}
    assert by_id == {1: FinishReason.STOP, 2: FinishReason.ERROR}
    assert [(end.error, end.error_code) for end in desk.told("b")] == [
        ("it burns", "engine_failure")
    ]
    assert desk.live.of("a") == desk.live.of("b") == {}
    desk.live.forget("a")
    assert set(desk.live.clients) == {"b"}


def test_what_is_refused_says_what_it_waited_for(desk: Desk):
    waited = Interval(kind="adapter", start_ns=3, end_ns=9)
    message = dataclasses.replace(submit([4, 5], [5]), waited=[waited], traceparent=PARENT)
    desk.live.refuse("a", message, InvalidRequest("no", param="top_k"))
    ends = desk.told("a")
    assert [(end.sequence_id, end.error_param) for end in ends] == [(4, "top_k"), (5, "top_k")]
    assert all(end.record.intervals == [waited] for end in ends)
    assert all(end.record.traceparent == PARENT and end.record.arrived_ns == 1 for end in ends)
    assert desk.live.of("a") == {}


def test_a_refusal_ends_nothing_that_its_client_has_live_under_the_same_number(desk: Desk):
    (live,) = desk.enter("a", submit([1], [5]))
    desk.live.refuse("a", submit([1, 2], [5]), InvalidRequest("no"))
    assert [end.sequence_id for end in desk.told("a")] == [2]
    assert desk.live.of("a") == {1: live}
