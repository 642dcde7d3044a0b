"""Features of a request and of an engine, as data: how to ask for one, how to see that it acted.

A `Trial` runs one or more of them together in a world: a few probes, which the features shape,
among background load. Whatever is combined, each probe's tokens equal the world's oracle.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

from jaxserve.engine.loop import Engine
from jaxserve.engine.thread import EngineThread
from jaxserve.protocol.client import SyncStream
from jaxserve.protocol.messages import SequenceRecord
from jaxserve.protocol.streams import SequenceEvent
from jaxserve.protocol.thread import ThreadClient
from jaxserve.settings import load_config
from jaxserve.types import FinishReason, SamplingParams
from tests.fakes.executor import FakeExecutor
from tests.interplay.lives import ReplayingClient
from tests.interplay.worlds import FakeWorld, Outcome, Probe, World


@dataclass(frozen=True, kw_only=True)
class Feature:
    """One thing that an engine can do.

    Attributes:
        settings: of the engine; a later feature's win.
        shape: changes a probe.
        before: submits what must have happened before the probes.
        after: reads what `before` began, once the probes are done.
        background: requests beside the probes.
        lives: of the engine: all but the last end when the probes have got some tokens.
        acted: whether it is to be seen in the trial that it took part.
    """

    name: str
    settings: tuple[str, ...] = ()
    shape: Callable[[Probe], None] = lambda probe: None
    before: Callable[[Trial], None] = lambda trial: None
    after: Callable[[Trial], None] = lambda trial: None
    background: int = 0
    lives: int = 1
    acted: Callable[[Trial], bool] = lambda trial: True


class Trial:
    """Some features together, run once.

    Attributes:
        num_mixed: device calls that held decoding rows and chunks; -1 where nobody counted.
        probes, outcomes: parallel; an outcome for each choice.
        records: of all sequences, background too.
        engines: one a life.
        embedding: texts that are embedded beside, and the stream of their vectors.
        vectors, text_records: of them, once they were read; vectors by place.
    """

    def __init__(self, features: tuple[Feature, ...], world: World | None = None) -> None:
        self.features = features
        self.world = world or FakeWorld()
        self.probes = self.world.probes()
        for feature in features:
            for probe in self.probes:
                feature.shape(probe)
        self.outcomes = [[Outcome() for _ in range(probe.n)] for probe in self.probes]
        self.records: list[SequenceRecord] = []
        self.engines: list[Engine] = []
        self.num_mixed = -1
        self.embedding: tuple[list[list[int]], SyncStream] | None = None
        self.vectors: dict[int, bytes] = {}
        self.text_records: list[SequenceRecord] = []

    def run(self) -> None:
        """Runs it to the end; the engine must have nothing left then."""
        own = [setting for feature in self.features for setting in feature.settings]
        config = load_config(settings=[*self.world.settings, *own], environ={})
        with contextlib.ExitStack() as threads:

            def launch() -> ThreadClient:
                threads.close()  # the life before has ended
                thread = threads.enter_context(EngineThread(config, self.world.load))
                self.engine = thread.engine
                self.engines.append(thread.engine)
                return thread.connect()

            self._again = lambda: self.client.again(launch())
            self.client = ReplayingClient(launch(), self.world.vocabulary)
            self.client.start()
            self.client.ready()
            for feature in self.features:
                feature.before(self)
            self._run_probes()
            for feature in self.features:
                feature.after(self)
            status = self.client.get_status()
            assert (status.running, status.waiting) == (0, 0)
            if isinstance(self.engine.executor, FakeExecutor):
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
                expected = probe.expected(choice)
                tokens = outcome.token_ids
                certain = self.world.num_certain(
                    probe.prompt, probe.sampling, choice, probe.adapter_key
                )
                if certain <= len(expected):
                    assert tokens[:certain] == expected[:certain]
                    continue
                full = len(tokens) == probe.sampling.max_tokens
                natural = FinishReason.LENGTH if full else FinishReason.STOP
                if choice in probe.cut and outcome.reason is probe.cut_reason:
                    assert tokens == expected[: len(tokens)]
                else:  # it may end before the client's word arrives
                    assert tokens == expected
                    assert outcome.reason is natural
                if probe.sampling.logprobs is not None:
                    assert [entry.token_id for entry in outcome.logprobs] == tokens
                    self.world.check_logprobs(probe, outcome)
        for feature in self.features:
            assert feature.acted(self), f"{feature.name} took no part: the trial shows nothing"
