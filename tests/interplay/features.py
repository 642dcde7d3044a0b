"""Features of a request and of an engine, as data: how to ask for one, how to see that it acted.

A `Trial` runs one or more of them together over the fake engine: a few probes, which the features
shape, among background load. Whatever is combined, each probe's tokens equal the history oracle.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from jaxserve.engine.loop import Engine
from jaxserve.engine.thread import EngineThread
from jaxserve.protocol.client import SyncStream
from jaxserve.protocol.messages import AdapterRef, SequenceRecord
from jaxserve.protocol.streams import SequenceEvent
from jaxserve.protocol.thread import ThreadClient
from jaxserve.settings import load_config
from jaxserve.types import FinishReason, SamplingParams, TokenLogprobs
from tests.fakes.engine import GROUPS, fake_parts, oracle
from tests.fakes.executor import FakeExecutor, oracle_logprob
from tests.interplay.lives import ReplayingClient

#: A small engine, that fills up and chunks: features change it.
SETTINGS = (
    "cache.page_size=4",
    "cache.num_pages=200",
    "scheduler.max_rows=6",
    "scheduler.max_step_tokens=64",
    "scheduler.decode_steps=1",
)


@dataclass(kw_only=True)
class Probe:
    """A request that is held against the oracle.

    Attributes:
        cut: choice → tokens after which the client ends it.
        cut_reason: with which word.
        adapter: a LoRA adapter; None for the base.
    """

    prompt: list[int]
    sampling: SamplingParams
    n: int = 1
    priority: int = 0
    cut: dict[int, int] = field(default_factory=dict)
    cut_reason: FinishReason = FinishReason.CANCELLED
    adapter: AdapterRef | None = None

    @property
    def adapter_key(self) -> str | None:
        """What the oracle wants to know of it."""
        return self.adapter.key if self.adapter is not None else None

    def shape(self, **sampling: object) -> None:
        """Changes how tokens are sampled."""
        self.sampling = replace(self.sampling, **sampling)


@dataclass
class Outcome:
    """What came of one choice."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    reason: FinishReason | None = None
    record: SequenceRecord | None = None


@dataclass(frozen=True, kw_only=True)
class Feature:
    """One thing that an engine can do.

    Attributes:
        settings: of the engine; a later feature's win.
        shape: changes a probe.
        before: submits what must have happened before the probes.
        background: requests beside the probes.
        lives: of the engine: all but the last end when the probes have got some tokens.
        acted: whether it is to be seen in the trial that it took part.
    """

    name: str
    settings: tuple[str, ...] = ()
    shape: Callable[[Probe], None] = lambda probe: None
    before: Callable[[Trial], None] = lambda trial: None
    background: int = 0
    lives: int = 1
    acted: Callable[[Trial], bool] = lambda trial: True


class Trial:
    """Some features together, run once.

    Attributes:
        num_mixed: device calls that held decoding rows and chunks.
        probes, outcomes: parallel; an outcome for each choice.
        records: of all sequences, background too.
        engines: one a life.
    """

    def __init__(self, features: tuple[Feature, ...]) -> None:
        self.features = features
        self.probes = [
            Probe(
                prompt=[7 + index, *range(20, 40 + 5 * index)],
                sampling=SamplingParams(max_tokens=14 + index, seed=index, ignore_eos=True),
            )
            for index in range(3)
        ]
        for feature in features:
            for probe in self.probes:
                feature.shape(probe)
        self.outcomes = [[Outcome() for _ in range(probe.n)] for probe in self.probes]
        self.records: list[SequenceRecord] = []
        self.engines: list[Engine] = []
        self.num_mixed = -1

    def run(self) -> None:
        """Runs it to the end; the engine must have nothing left then."""
        settings = [*SETTINGS, *(s for feature in self.features for s in feature.settings)]
        config = load_config(settings=settings, environ={})
        with contextlib.ExitStack() as threads:

            def launch() -> ThreadClient:
                thread = threads.enter_context(EngineThread(config, fake_parts))
                self.engine = thread.engine
                self.engines.append(thread.engine)
                return thread.connect()

            self._again = lambda: self.client.again(launch())
            self.client = ReplayingClient(launch())
            self.client.start()
            self.client.ready()
            for feature in self.features:
                feature.before(self)
            self._run_probes()
            status = self.client.get_status()
            assert (status.running, status.waiting) == (0, 0)
            assert isinstance(self.engine.executor, FakeExecutor)
            self.num_mixed = self.engine.executor.num_mixed
            self.client.close()

    def finish(self, stream: SyncStream) -> list[SequenceEvent]:
        """Reads a stream to its end; its records are kept."""
        events = list(stream)
        self._keep(events)
        return events

    def _run_probes(self) -> None:
        submit = self.client.submit
        load = max(feature.background for feature in self.features)
        low = SamplingParams(max_tokens=40, seed=9, ignore_eos=True)
        early = [submit([90 + i] * 30, low, priority=1) for i in range(load)]
        for stream in early[:1]:
            first = next(stream)  # they run
            self._keep([first])
        streams = [
            submit(
                probe.prompt,
                probe.sampling,
                n=probe.n,
                priority=probe.priority,
                adapter=probe.adapter,
            )
            for probe in self.probes
        ]
        deaths = max(feature.lives for feature in self.features) - 1
        while not all(stream.done for stream in streams):
            for index, stream in enumerate(streams):
                self._take(index, stream)
            if deaths and any(outcome.token_ids for own in self.outcomes for outcome in own):
                deaths -= 1
                self._again()
            if not all(stream.done for stream in streams):
                self.client.wait()
        for index, stream in enumerate(streams):
            self._take(index, stream)
        for stream in early:
            self.finish(stream)

    def _take(self, index: int, stream: SyncStream) -> None:
        probe = self.probes[index]
        while (event := stream.take()) is not None:
            self._keep([event])
            outcome = self.outcomes[index][event.choice]
            outcome.token_ids += event.token_ids
            outcome.logprobs += event.logprobs
            if event.finished is not None:
                outcome.reason, outcome.record = event.finished.reason, event.finished.record
            elif len(outcome.token_ids) >= probe.cut.get(event.choice, 10**6):
                stream.cancel(event.choice, probe.cut_reason)

    def _keep(self, events: list[SequenceEvent]) -> None:
        self.records += [e.finished.record for e in events if e.finished is not None]

    def check(self) -> None:
        """Every choice brought the oracle's tokens, each once, and ended as it had to."""
        for probe, outcomes in zip(self.probes, self.outcomes, strict=True):
            for choice, outcome in enumerate(outcomes):
                expected = oracle(probe.prompt, probe.sampling, choice, probe.adapter_key)
                tokens = outcome.token_ids
                full = len(tokens) == probe.sampling.max_tokens
                natural = FinishReason.LENGTH if full else FinishReason.STOP
                if choice in probe.cut and outcome.reason is probe.cut_reason:
                    assert tokens == expected[: len(tokens)]
                else:  # it may end before the client's word arrives
                    assert tokens == expected
                    assert outcome.reason is natural
                if probe.sampling.logprobs is not None:
                    self._check_logprobs(probe, outcome)
        for feature in self.features:
            assert feature.acted(self), f"{feature.name} took no part: the trial shows nothing"

    def _check_logprobs(self, probe: Probe, outcome: Outcome) -> None:
        assert [entry.token_id for entry in outcome.logprobs] == outcome.token_ids
        if probe.sampling.repetition_penalty != 1:
            return  # the fake mixes what was seen into the hash, then
        for place, entry in enumerate(outcome.logprobs):
            history = [*probe.prompt, *outcome.token_ids[:place]]
            expected = oracle_logprob(history, entry.token_id, GROUPS, probe.adapter_key)
            assert entry.logprob == expected
