"""Each step's time is divided over its rows, all of it, to the nanosecond, whatever happens."""

from __future__ import annotations

import dataclasses
import random
import time

import numpy as np
import pytest

from jaxserve.config import (
    CacheConfig,
    Config,
    EmbeddingsConfig,
    SchedulerConfig,
    TelemetryConfig,
)
from jaxserve.device.step import Program, StepOutputs, empty_inputs
from jaxserve.engine.attribution import Attribution, NoAttribution, WorkRates, apportion
from jaxserve.engine.process import build_engine
from jaxserve.engine.turn import InFlight
from jaxserve.protocol.messages import Cancel, Embed, GetStatus, SequenceRecord
from jaxserve.protocol.status import StepStats
from jaxserve.scheduler.commit import Commit
from jaxserve.scheduler.pages import PageTable
from jaxserve.scheduler.plan import Chunk, Join, Plan
from jaxserve.scheduler.sequence import Sequence
from jaxserve.types import EmbeddingParams, FinishReason, SamplingParams
from tests.engine.test_loop import ListServer, submit
from tests.fakes.batch import ExactBatch
from tests.fakes.engine import PAGE_BYTES, fake_parts, oracle
from tests.fakes.executor import ECHO

RATES = WorkRates(token=3.0, sample=1.0, attend=0.01, read=0.05, weights=40.0)


class Timed:
    """An engine over the fake device whose steps take times of a random sequence."""

    def __init__(self, seed: int = 0, rates: WorkRates = RATES, **settings) -> None:
        cache = CacheConfig(
            page_size=4,
            num_pages=settings.pop("num_pages", 30),
            host_bytes=settings.pop("host_pages", 0) * PAGE_BYTES,
            preemption=settings.pop("preemption", "auto"),
        )
        embeddings = EmbeddingsConfig(model=settings.pop("embeds", ""))
        telemetry = TelemetryConfig(enabled=settings.pop("telemetry", True))
        limits = {"max_rows": 4, "max_step_tokens": 16, "decode_steps": 1, "max_waiting": 500}
        config = Config(
            cache=cache,
            embeddings=embeddings,
            telemetry=telemetry,
            scheduler=SchedulerConfig(**limits | settings),
        )
        self.server = ListServer()
        parts = fake_parts(config, lambda *_: None)
        self.engine = build_engine(config, self.server, dataclasses.replace(parts, work=rates))
        self.random = random.Random(seed)
        self.engine.handle("watch", GetStatus(stats=True))
        self.device = parts.executor

    def turn(self, *messages, client="a") -> None:
        self.device.device_ns = self.random.randrange(1, 10**9)
        self.server.arrivals += [(client, message) for message in messages]
        self.engine.receive(0)
        self.engine.step()

    def finish(self) -> None:
        for _ in range(3000):
            work = self.engine.scheduler.has_work or self.engine._embedding.num_waiting
            if not work and self.engine.in_flight is None:
                return
            self.turn()
        raise AssertionError("it does not come to an end")

    @property
    def records(self) -> dict[int, SequenceRecord]:
        return {end.sequence_id: end.record for end in self.server.ends("a")}

    @property
    def device_ns(self) -> int:
        stats = [message for _, message in self.server.sent if isinstance(message, StepStats)]
        return sum(step.device_ns for step in stats)

    @property
    def shared_ns(self) -> int:
        return sum(map(total, self.records.values()))

    def check(self) -> None:
        """All of the steps' time is somebody's, or nobody's."""
        assert self.shared_ns + self.engine._attribution.unowned_ns == self.device_ns


def total(record: SequenceRecord) -> int:
    return record.prefill_device_ns + record.decode_device_ns + record.wasted_device_ns


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"decode_steps": 4},
        {"draft_tokens": 3},
        {"num_pages": 12},
        {"num_pages": 12, "host_pages": 40, "preemption": "swap"},
        {"num_pages": 12, "preemption": "recompute", "decode_steps": 3},
    ],
    ids=lambda settings: "-".join(f"{k}{v}" for k, v in settings.items()) or "plain",
)
def test_shares_and_what_is_nobodys_are_the_steps_time(seed: int, settings: dict):
    timed = Timed(seed, **settings)
    timed.device.page_ns = (1000.0,)
    chance, live = timed.random, []
    for number in range(40):
        messages = []
        if chance.random() < 0.6:
            ids = [1000 * number + n for n in range(chance.choice([1, 1, 1, 2]))]
            prompt = [chance.randrange(2, 50) for _ in range(chance.randrange(2, 14))]
            top_k = ECHO if "draft_tokens" in settings else 0
            stops = chance.random() < 0.5
            stop_ids = tuple(range(2, 60)) if stops else ()
            messages.append(
                submit(
                    ids,
                    prompt,
                    max_tokens=chance.randrange(1, 12),
                    stop_token_ids=stop_ids,
                    top_k=top_k,
                )
            )
            messages[0] = dataclasses.replace(messages[0], priority=chance.choice([0, 0, -1]))
            live += ids
        if live and chance.random() < 0.2:
            messages.append(Cancel(sequence_ids=[chance.choice(live)]))
        timed.turn(*messages)
    timed.finish()
    assert len(timed.records) == len(live) > 0
    assert timed.shared_ns > 0
    timed.check()
    assert not timed.engine._attribution._accounts


def test_where_nobody_observes_no_step_is_divided():
    timed = Timed(telemetry=False)
    timed.turn(submit([1], [5, 6, 7]), submit([2], [8, 9]))
    timed.finish()
    assert isinstance(timed.engine._attribution, NoAttribution)
    assert timed.device_ns > 0 == timed.shared_ns
    assert [record.output_tokens for record in timed.records.values()] == [10, 10]


def test_an_error_of_a_step_leaves_what_was_read_in_the_records():
    timed = Timed()
    timed.turn(submit([1], [5, 6, 7]), submit([2], [8, 9]))
    for _ in range(4):
        timed.turn()
    timed.device.fail_at = len(timed.device.calls)
    with pytest.raises(RuntimeError, match="told to fail"):
        timed.engine.serve()
    assert {end.reason for end in timed.server.ends("a")} == {FinishReason.ERROR}
    assert timed.device_ns > 0
    timed.check()


def test_rows_are_charged_in_proportion_to_tokens_context_and_their_share_of_the_weights():
    timed = Timed(rates=RATES, max_step_tokens=64, max_rows=4)
    timed.random.randrange = lambda *_: 10**6  # every step takes a millisecond
    timed.turn(submit([1], list(range(2, 32)), max_tokens=1), submit([2], [3, 4], max_tokens=1))
    timed.finish()
    weights_each = RATES.weights / 32
    work = [
        n * (RATES.token + weights_each)
        + RATES.sample
        + n * (n - (n - 1) / 2) * RATES.attend
        + n * RATES.read
        for n in (30, 2)
    ]
    first, second = timed.records[1], timed.records[2]
    assert first.prefill_device_ns == pytest.approx(10**6 * work[0] / sum(work), abs=2)
    assert second.prefill_device_ns == pytest.approx(10**6 * work[1] / sum(work), abs=2)
    assert first.decode_device_ns == second.decode_device_ns == 0
    timed.check()


def test_positions_computed_again_are_waste_and_the_rest_is_not():
    timed = Timed(num_pages=8, preemption="recompute", max_rows=2)
    timed.turn(submit([1], [5] * 9, max_tokens=12), submit([2], [6] * 9, max_tokens=12))
    timed.finish()
    records = timed.records
    again = [record for record in records.values() if record.recomputed_tokens]
    assert again and all(record.wasted_device_ns > 0 for record in again)
    never = [record for record in records.values() if not record.recomputed_tokens]
    assert all(record.wasted_device_ns == 0 for record in never)
    assert all(record.prefill_device_ns > 0 < record.decode_device_ns for record in again)
    timed.check()


def test_cached_tokens_cost_nothing():
    timed = Timed(max_step_tokens=64)
    prompt = list(range(2, 42))
    timed.random.randrange = lambda *_: 10**6
    timed.device.device_ns = 10**6
    timed.turn(submit([1], prompt, max_tokens=1), submit([9], [7] * 20, max_tokens=4))
    timed.finish()
    timed.turn(submit([2], prompt, max_tokens=1), submit([3], [8] * 20, max_tokens=1))
    timed.finish()
    first, second = timed.records[1], timed.records[2]
    assert second.cached_tokens == 36 and first.cached_tokens == 0
    assert second.prefill_device_ns < 0.5 * first.prefill_device_ns
    timed.check()


def test_decode_steps_behind_a_stop_token_are_waste():
    prompt, params = [5, 6, 7], {"max_tokens": 60, "seed": 1}
    tokens = oracle(prompt, SamplingParams(**params, ignore_eos=True))
    stop = next(t for t in tokens[5:] if t not in tokens[:5])
    timed = Timed(decode_steps=8)
    timed.turn(submit([1], prompt, max_tokens=60, stop_token_ids=(stop,)))
    timed.finish()
    record = timed.records[1]
    assert record.output_tokens == tokens.index(stop)
    assert record.discarded_tokens > 0 < record.decode_device_ns
    assert record.wasted_device_ns + timed.engine._attribution.unowned_ns > 0
    timed.check()


def test_what_runs_for_a_cancelled_sequence_is_nobodys():
    timed = Timed()
    timed.turn(submit([1], [5, 6]))
    timed.turn()
    timed.turn(Cancel(sequence_ids=[1]))
    assert total(timed.records[1]) > 0  # the steps read before
    timed.finish()
    assert timed.engine._attribution.unowned_ns > 0
    timed.check()


def test_texts_share_their_steps_and_cancelled_ones_are_nobodys():
    timed = Timed(embeds="fake")
    timed.turn()
    embedder = timed.engine._embedding._parts.embedder
    embed = Embed(
        sequence_ids=[1, 2, 3],
        texts=[[5] * 30, [6] * 10, [7] * 10],
        params=EmbeddingParams(pooling="mean", normalize=True),
        arrived_ns=1,
    )
    timed.turn(embed)
    timed.turn(Cancel(sequence_ids=[3]))
    timed.finish()
    records = timed.records
    step_ns = timed.device_ns
    assert embedder.steps and step_ns > 0
    assert records[1].prefill_device_ns == pytest.approx(0.6 * step_ns, abs=2)
    assert records[2].prefill_device_ns == pytest.approx(0.2 * step_ns, abs=2)
    assert timed.engine._attribution.unowned_ns == pytest.approx(0.2 * step_ns, abs=2)
    timed.check()


def test_windows_bound_what_a_token_sees():
    rates = WorkRates(attend=1.0, windows=((None, 0.25), (100, 0.75)))
    assert rates.seen(np.asarray([40.0, 1000.0])).tolist() == [40.0, 250 + 75]


def test_rates_are_what_the_model_counts_for_one_more():
    def count_work(tokens: int, rows: int, context: int) -> tuple[int, int]:
        return 1000 * tokens + 500 * rows + 20 * context, 9000 + 8 * tokens + 4 * context

    rates = WorkRates.measured(count_work, 10.0, [None, None, 64, 64])
    assert (rates.token, rates.sample, rates.attend, rates.read) == (108, 50, 2, 4)
    assert rates.weights == 9000 and rates.windows == ((None, 0.5), (64, 0.5))


@pytest.mark.parametrize("seed", range(20))
def test_parts_add_up_to_the_whole(seed: int):
    draw = np.random.default_rng(seed)
    weights = draw.random(draw.integers(1, 1025)) * 10.0 ** draw.integers(-6, 12)
    whole = int(draw.integers(0, 10**12))
    parts = apportion(whole, weights)
    assert parts.sum() == whole and (parts >= 0).all()
    assert np.abs(parts - whole * weights / weights.sum()).max() <= 1 + 1e-9 * whole
    assert apportion(whole, np.zeros(3)).sum() == whole


def test_a_step_of_many_rows_is_divided_in_microseconds():
    """Printed, and bounded loosely: 10 us are meant at 1,024 rows on a quiet core."""
    timed = Timed(max_rows=1024, max_step_tokens=1024, num_pages=5000, max_waiting=2000)
    for client in range(8):
        timed.turn(submit(list(range(128 * client, 128 * client + 128)), [5], max_tokens=40))
    for _ in range(6):
        timed.turn()
    step = timed.engine.in_flight
    assert step is not None and step.inputs[0].num_decode_rows == 1024
    outputs = timed.device.collect(step.launched)
    attribution, best = timed.engine._attribution, float("inf")
    for _ in range(200):
        began = time.perf_counter()
        attribution.divide(step, outputs, [Commit()])
        best = min(best, time.perf_counter() - began)
    print(f"1,024 rows divided in {best * 1e6:.1f} us")
    assert best < 200e-6
    assert isinstance(attribution, Attribution)


def test_rows_of_all_copies_of_the_model_share_one_step():
    """Two copies run one device call: what each row caused, on whichever."""
    attribution = Attribution(WorkRates(), max_rows=2, copies=2)
    sequences, plans, inputs = [], [], []
    for copy, num_tokens in enumerate((6, 2)):
        sequence = Sequence(
            key=("a", copy),
            token_ids=[5] * num_tokens,
            prompt_len=num_tokens,
            sampling=SamplingParams(max_tokens=4, seed=1),
            choice=0,
            level=0,
            arrival=copy,
            stop_token_ids=frozenset(),
            table=PageTable(pages=[], num_behind=[]),
        )
        plan = Plan(step_id=0)
        plan.joins.append(Join(slot=0, sampling=sequence.sampling, prompt_len=num_tokens, choice=0))
        plan.chunks.append(Chunk(slot=0, start=0, token_ids=sequence.token_ids, samples=True))
        sequences.append(sequence)
        plans.append(plan)
        inputs += ExactBatch().build([plan])
    accounts = attribution.launched(plans, inputs, lambda copy: [sequences[copy], None])
    step = InFlight(plans, inputs, None, accounts)
    outputs = [StepOutputs(token_ids=np.zeros((1, 1), np.int64), device_ns=8001)] * 2
    attribution.divide(step, outputs, [Commit(), Commit()])
    assert [attribution.take(sequence) for sequence in sequences] == [(6000, 0, 0), (2001, 0, 0)]
    assert attribution.unowned_ns == 0


def test_a_copy_that_has_nothing_to_do_takes_no_share():
    attribution = Attribution(WorkRates(), max_rows=2, copies=2)
    empty = empty_inputs(Program(num_rows=1, num_tokens=1), 2)
    accounts = attribution.launched([None, None], [empty, empty], lambda copy: [])
    step = InFlight([None, None], [empty, empty], None, accounts)
    outputs = [StepOutputs(token_ids=np.zeros((1, 1), np.int64), device_ns=77)] * 2
    attribution.divide(step, outputs, [None, None])
    assert attribution.unowned_ns == 77
