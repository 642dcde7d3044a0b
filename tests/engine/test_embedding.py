"""Texts beside generation: turns, bounds, cancels, refusals, faults, and what is told of them."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable

import numpy as np
import pytest

from jaxserve.config import CacheConfig, Config, EmbeddingsConfig, SchedulerConfig
from jaxserve.engine.embedding import as_bytes
from jaxserve.engine.loop import Engine
from jaxserve.engine.probation import Probation
from jaxserve.engine.process import build_engine
from jaxserve.engine.recorder import AnyProgram, FlightRecorder, NoRecorder
from jaxserve.engine.turn import InFlight, TextsInFlight
from jaxserve.protocol.flight import Cell, FlightFile, flight_requests
from jaxserve.protocol.messages import (
    Cancel,
    Embed,
    GetStatus,
    Goodbye,
    Interval,
    Submit,
    TokenSegment,
)
from jaxserve.protocol.status import EngineStatus, StepStats
from jaxserve.types import EmbeddingParams, FinishReason, SamplingParams
from tests.engine.test_loop import ListServer
from tests.fakes.embedder import NOT_FINITE, vector_of
from tests.fakes.engine import fake_parts

CONFIG = Config(
    cache=CacheConfig(page_size=4, num_pages=100),
    scheduler=SchedulerConfig(max_rows=4, max_step_tokens=16, decode_steps=1, max_waiting=20),
    embeddings=EmbeddingsConfig(model="fake", embed_tokens=32, shared_embed_tokens=16),
)
PARAMS = EmbeddingParams(pooling="mean", normalize=True)


class Steps(NoRecorder):
    """Remembers what was launched."""

    def __init__(self) -> None:
        self.requests: list[list[int]] = []

    def embedding(self, requests: Iterable[int], program: AnyProgram) -> None:
        self.requests.append(list(requests))


class Rig:
    """An engine over fakes, and what it sent."""

    def __init__(self, config: Config = CONFIG) -> None:
        self.server = ListServer()
        self.recorder = Steps()
        self.parts = fake_parts(config, lambda *_: None)
        self.engine: Engine = build_engine(config, self.server, self.parts, self.recorder)
        self.kinds: list[str] = []

    def embed(self, ids: list[int], texts: list[list[int]], client: str = "c", **values) -> None:
        message = Embed(sequence_ids=ids, texts=texts, params=PARAMS, arrived_ns=7)
        self.engine.handle(client, dataclasses.replace(message, **values))

    def generate(self, number: int, client: str = "c", **values) -> None:
        sampling = SamplingParams(**{"max_tokens": 12, "seed": 1, "ignore_eos": True} | values)
        prompt = [TokenSegment(token_ids=[5, 6, 7])]
        message = Submit(sequence_ids=[number], prompt=prompt, sampling=sampling, arrived_ns=0)
        self.engine.handle(client, message)

    def turn(self) -> None:
        self.engine.receive(0.0)
        self.engine.step()
        step = self.engine.in_flight
        kinds = {InFlight: "tokens", TextsInFlight: "texts", type(None): "nothing"}
        self.kinds.append(kinds[type(step)])

    def run(self, limit: int = 200) -> None:
        for _ in range(limit):
            self.turn()
            if self.kinds[-1] == "nothing" and not self.engine.status().waiting:
                return
        raise AssertionError("it does not come to an end")

    @property
    def steps(self) -> list[list[int]]:
        """Lengths of the texts of each step."""
        return [[len(text) for text in step] for step in self.parts.embedding.embedder.steps]

    def vectors(self, client: str = "c") -> dict[int, np.ndarray]:
        return {
            end.sequence_id: np.frombuffer(end.vector, np.float32)
            for end in self.server.ends(client)
            if end.vector
        }


def text(length: int, first: int = 1) -> list[int]:
    return [first + i % 100 for i in range(length)]


def test_texts_are_packed_in_order_and_come_back_with_their_records():
    rig = Rig()
    texts = [text(n) for n in (10, 20, 5, 28, 1, 2)]
    rig.embed(list(range(6)), texts)
    rig.run()
    assert rig.steps == [[10, 20], [5], [28, 1, 2]]  # at most 32 tokens, nobody overtakes
    for number, vector in rig.vectors().items():
        np.testing.assert_allclose(vector, vector_of(texts[number]), rtol=1e-6)
    ends = rig.server.ends("c")
    assert sorted(end.sequence_id for end in ends) == list(range(6))
    for end in ends:
        record = end.record
        assert end.reason is FinishReason.STOP
        assert record.prompt_tokens == record.computed_tokens == len(texts[end.sequence_id])
        assert record.output_tokens == record.recomputed_tokens == 0
        assert 7 == record.arrived_ns < record.queued_ns <= record.scheduled_ns
        assert record.scheduled_ns <= record.first_token_ns <= record.done_ns


def test_the_kinds_take_turns_and_texts_take_less_beside_tokens():
    rig = Rig()
    rig.generate(100)
    rig.embed(list(range(8)), [text(8)] * 8)
    rig.run()
    both = rig.kinds[: 2 * len(rig.steps)]
    assert set(both[::2]) != set(both[1::2]) and len(set(both[::2])) == 1
    assert rig.steps == [[8, 8]] * 4  # shared_embed_tokens
    assert len(rig.server.tokens("c", 100)) == 12


def test_a_text_over_the_budget_is_a_step_by_itself():
    rig = Rig()
    rig.generate(100)
    rig.embed([0, 1, 2], [text(4), text(40), text(4)])
    rig.run()
    assert rig.steps == [[4], [40], [4]]


def test_priorities_and_fair_shares_hold_for_texts():
    rig = Rig()
    rig.embed([0, 1, 2], [text(30)] * 3, tenant="a")
    rig.embed([3], [text(30, 2)], tenant="b")
    rig.embed([4], [text(30, 3)], tenant="a", priority=-1)
    rig.run()
    order = [end.sequence_id for end in rig.server.ends("c")]
    assert order[0] == 4  # the better priority
    assert order.index(3) <= 2  # b does not wait for all of a's


def test_cancelled_texts_are_dropped_wherever_they_are():
    rig = Rig()
    rig.embed([0, 1, 2, 3], [text(30, n + 1) for n in range(4)])
    rig.turn()  # launches the first
    rig.engine.handle("c", Cancel(sequence_ids=[0, 2]))
    rig.run()
    ends = {end.sequence_id: end.reason for end in rig.server.ends("c")}
    assert ends == {
        0: FinishReason.CANCELLED,
        1: FinishReason.STOP,
        2: FinishReason.CANCELLED,
        3: FinishReason.STOP,
    }
    assert len(rig.steps) == 3 and set(rig.vectors()) == {1, 3}


def test_a_client_that_leaves_takes_its_texts_along():
    rig = Rig()
    rig.embed([0, 1], [text(30)] * 2)
    rig.embed([0], [text(30)], client="d")
    rig.turn()
    rig.engine.handle("c", Goodbye())
    rig.run()
    assert len(rig.steps) == 2
    assert set(rig.vectors("d")) == {0}


def test_a_full_queue_refuses_and_pushes_out():
    rig = Rig()
    rig.embed(list(range(20)), [text(5)] * 20, tenant="a")
    rig.embed(list(range(20, 34)), [text(5)] * 14, tenant="a")
    refused = rig.server.ends("c")
    assert len(refused) == 0
    rig.engine.receive(0.0)
    refused = [end for end in rig.server.ends("c") if end.reason is FinishReason.ERROR]
    assert {end.sequence_id for end in refused} == set(range(20, 34))
    assert {end.error_code for end in refused} == {"overloaded"}
    rig.embed([40], [text(5)], priority=-1)  # better: one goes for it (20 + 4 may wait)
    rig.run()
    assert 40 in rig.vectors()
    assert rig.engine.status().shed["queue_full"] == 14


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"texts": [[1], []]}, "a text is empty"),
        ({"texts": [[1], text(65)]}, "has 65 tokens, the limit is 64"),
        ({"texts": [[1], [300]]}, "between 0 and 299"),
        ({"texts": [[1]]}, "one sequence for each text"),
        ({"second_starts": [1]}, "of all 2 texts"),
        ({"params": EmbeddingParams(pooling="x", normalize=True)}, "pooling must be"),
        (
            {"params": EmbeddingParams(pooling="cls", normalize=True, dimensions=9)},
            "dimensions must be between 0 and 8",
        ),
        ({"priority": 2**40}, "priority"),
        ({"weight": float("nan")}, "weight"),
        ({"request_key": "x"}, "request_key"),
    ],
)
def test_what_does_not_fit_the_arrays_is_refused(change, message):
    rig = Rig()
    rig.embed([0, 1], **{"texts": [[1], [2]]} | change)
    rig.engine.receive(0.0)
    ends = rig.server.ends("c")
    assert [end.sequence_id for end in ends] == [0, 1] and message in ends[0].error
    rig.run()
    assert rig.steps == []


def test_an_engine_that_does_not_embed_says_so():
    rig = Rig(dataclasses.replace(CONFIG, embeddings=EmbeddingsConfig()))
    rig.embed([0], [[1]])
    rig.engine.receive(0.0)
    (end,) = rig.server.ends("c")
    assert end.error_code == "invalid_value" and "embeddings.model" in end.error
    assert rig.engine.status().embedding is None


def test_what_is_not_finite_is_its_own_texts_error():
    rig = Rig()
    rig.embed([0, 1, 2], [[1], [NOT_FINITE], [2]])
    rig.run()
    ends = {end.sequence_id: end for end in rig.server.ends("c")}
    assert ends[1].error_code == "embedding_not_finite" and not ends[1].vector
    assert set(rig.vectors()) == {0, 2}


def test_a_fault_in_a_step_ends_everything():
    rig = Rig()
    rig.parts.embedding.embedder.fail_at = 1
    rig.generate(100)
    rig.embed([0, 1], [text(16)] * 2)
    with pytest.raises(RuntimeError, match="told to fail"):
        rig.engine.serve()
    ends = rig.server.ends("c")
    assert {end.sequence_id for end in ends if end.error_code == "engine_failure"} >= {1, 100}
    assert len({end.sequence_id for end in ends}) == len(ends) == 3


def test_status_statistics_and_recorder_tell_of_texts():
    rig = Rig()
    rig.engine.handle("c", GetStatus(stats=True))
    rig.embed([0, 1], [text(30), text(7)], request_key="00000000000000ff")
    rig.embed([2], [text(9)], request_key="00000000000000fe")
    assert rig.engine.status().texts_waiting == 3
    rig.run()
    assert rig.recorder.requests == [[255], [255, 254]]
    stats = [message for _, message in rig.server.sent if isinstance(message, StepStats)]
    assert [(s.program, s.rows, s.tokens, s.prefill_tokens) for s in stats] == [
        ("embed_t64_l64", 1, 30, 30),
        ("embed_t16_l64", 2, 16, 16),
    ]
    status = rig.engine.status()
    assert isinstance(status, EngineStatus) and status.texts_waiting == 0
    assert status.embedding == rig.parts.embedding.model
    rig.embed([3], [text(46)])
    assert rig.engine.status().embed_wait_s == pytest.approx(46 * 0.002 / 46, rel=0.3)


def test_vectors_are_cut_before_they_are_normalised():
    raw = np.array([[3.0, 4.0, 12.0], [0.0, 0.0, 5.0], [np.inf, 0.0, 0.0]], np.float32)
    cut = EmbeddingParams(pooling="mean", normalize=True, dimensions=2)
    first, second, third = as_bytes(raw, cut)
    np.testing.assert_allclose(np.frombuffer(first, np.float32), [0.6, 0.8], rtol=1e-6)
    assert second is None and third is None  # nothing is left, or it is not finite
    plain = as_bytes(raw, EmbeddingParams(pooling="mean", normalize=False))
    np.testing.assert_array_equal(np.frombuffer(plain[0], np.float32), raw[0])
    assert as_bytes(raw[:, :1], None) == [raw[0, :1].tobytes(), raw[1, :1].tobytes(), None]


def test_texts_on_trial_wait_and_run_apart():
    key, other = "000000000000000a", "000000000000000b"
    rig = Rig()
    clock = [0.0]
    probation = Probation([(key,)], (), 4, rig.recorder, clock_s=lambda: clock[0])
    rig.engine = build_engine(CONFIG, rig.server, rig.parts, rig.recorder, probation)
    rig.embed([0], [text(5)], request_key=other, attempt=1)
    rig.embed([1, 2, 3], [text(30), text(6), text(7)], request_key=key, attempt=1)
    rig.engine.handle("c", Cancel(sequence_ids=[2]))  # while it waits
    assert rig.engine.status().waiting == 3
    rig.run()
    assert rig.steps == [[30], [7], [5]]
    ends = {end.sequence_id: end for end in rig.server.ends("c")}
    assert ends[2].reason is FinishReason.CANCELLED and ends[2].record.prompt_tokens == 6
    assert set(rig.vectors()) == {0, 1, 3}


def test_the_flight_recorder_names_the_requests_of_a_step(tmp_path):
    flight = FlightFile(tmp_path / "flight", flight_requests(CONFIG))
    recorder = FlightRecorder(
        flight.path, CONFIG.engine, 4, 1, max_requests=flight_requests(CONFIG)
    )
    rig = Rig()
    rig.engine = build_engine(CONFIG, rig.server, rig.parts, recorder)
    keys = [f"{number:016x}" for number in range(1, 9)]  # more than there are rows
    for number, key in enumerate(keys):
        rig.embed([number], [text(4)], request_key=key)
    rig.turn()
    assert flight.last_steps().requests == frozenset(keys)
    assert flight.get(Cell.DEADLINE_NS) > 0
    rig.run()
    assert flight.get(Cell.DEADLINE_NS) == 0
    flight.close()


def test_a_text_that_comes_again_has_waited_since_it_came_but_for_the_time_without_an_engine():
    rig = Rig()
    now_ns = time.monotonic_ns()
    away = Interval(kind="replay", start_ns=now_ns - 20 * 10**9, end_ns=now_ns - 5 * 10**9)
    values = {"arrived_ns": now_ns - 30 * 10**9, "waited": [away]}
    rig.embed([1], [text(4)], attempt=1, **values)
    rig.embed([2], [text(4)], **values)
    again, new = rig.engine._live.of("c").values()
    assert again.waited_ns == pytest.approx(15e9, abs=2e9) and new.waited_ns == 0
