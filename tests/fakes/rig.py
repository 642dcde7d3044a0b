"""A scheduler, a batch and the fake device, turned as the engine turns them, with full accounts."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Any

from jaxserve.config import CacheConfig, SchedulerConfig
from jaxserve.engine.turn import Batch
from jaxserve.scheduler.plan import Plan
from jaxserve.scheduler.scheduler import Scheduler
from jaxserve.scheduler.sequence import AdapterUse, Sequence
from jaxserve.types import CacheGroup, FinishReason, ModelInfo, SamplingParams
from tests.fakes.batch import ExactBatch
from tests.fakes.executor import FULL, FakeExecutor, oracle

VOCAB = 50
EOS = 0


@dataclass
class Rig:
    """A scheduler, a batch and a fake device, turned as the engine turns them."""

    groups: Seq[CacheGroup] = (FULL,)
    page_size: int = 4
    pages: int = 40
    host_pages: int = 0
    preemption: str = "swap"
    max_rows: int = 4
    max_step_tokens: int = 16
    decode_steps: int = 4
    draft_tokens: int = 0
    draft_rows: int = 4
    max_context: int = 256
    limits: dict[str, Any] = field(default_factory=dict)  # further fields of SchedulerConfig
    clock_ns: Callable[[], int] = time.monotonic_ns
    pipelined: bool = True
    prefix: bool = True
    isolation: str = "tenant"
    adapter_slots: Seq[int] = ()
    batch: Batch = field(default_factory=ExactBatch)
    sequences: list[Sequence] = field(default_factory=list)
    ends: Counter[Sequence] = field(default_factory=Counter)
    emitted: dict[Sequence, list[int]] = field(default_factory=dict)
    plans: list[Plan] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.model = ModelInfo(
            name="fake",
            max_context=self.max_context,
            vocab_size=VOCAB,
            eos_token_ids=(EOS,),
            cache_groups=tuple(self.groups),
        )
        num_pages = [self.pages] * len(self.groups)
        self.scheduler = Scheduler(
            SchedulerConfig(
                **{
                    "max_rows": self.max_rows,
                    "max_step_tokens": self.max_step_tokens,
                    "decode_steps": self.decode_steps,
                    "draft_tokens": self.draft_tokens,
                    "draft_rows": self.draft_rows,
                    "max_waiting": 100,
                }
                | self.limits
            ),
            self.model,
            page_size=self.page_size,
            num_pages=num_pages,
            cache=CacheConfig(prefix=self.prefix, isolation=self.isolation),
            clock_ns=self.clock_ns,
            host_pages=[self.host_pages] * len(self.groups),
            preemption=self.preemption,
            adapter_slots=self.adapter_slots,
        )
        self.executor = FakeExecutor(
            self.groups,
            page_size=self.page_size,
            num_pages=num_pages,
            max_rows=self.max_rows,
            vocab_size=VOCAB,
            max_context=self.max_context,
            host_pages=[self.host_pages] * len(self.groups),
        )
        self.in_flight = None

    def submit(
        self,
        prompt: list[int],
        *,
        n: int = 1,
        priority: int = 0,
        tenant: str = "",
        cache_salt: str = "",
        weight: float = 1.0,
        adapter: AdapterUse | None = None,
        **sampling,
    ) -> list:
        """A request; its sequences."""
        params = SamplingParams(**{"max_tokens": 8, "seed": 1} | sampling)
        keys = [("client", len(self.sequences) + i) for i in range(n)]
        sequences = self.scheduler.submit(
            keys,
            prompt,
            params,
            priority=priority,
            tenant=tenant,
            cache_salt=cache_salt,
            weight=weight,
            adapter=adapter,
        )
        for shed, _ in self.scheduler.shedding.take():
            self.ends[shed] += 1
        self.sequences += sequences
        self.emitted |= {sequence: [] for sequence in sequences}
        return sequences

    def cancel(self, sequence: Sequence) -> None:
        """Ends a sequence from outside."""
        if sequence.reason is None:
            self.scheduler.cancel(sequence, FinishReason.CANCELLED)
            self.ends[sequence] += 1

    def set_back(self, sequence: Sequence) -> None:
        """Preempts a sequence before the next plan."""
        self.scheduler._settle()
        self.scheduler._rows.set_back(sequence)

    def turn(self) -> None:
        """One turn of the engine's loop."""
        plan = self.scheduler.plan()
        launched = None
        if plan is not None:
            self.plans.append(plan)
            (inputs,) = self.batch.build([plan])
            tokens = inputs.query_starts[inputs.num_live_rows]
            assert tokens <= self.max_step_tokens
            launched = (inputs, self.executor.launch([inputs])[0])
        if not self.pipelined:
            self.read(launched)
            return
        self.read(self.in_flight)
        self.in_flight = launched

    def read(self, step) -> None:
        """Commits a launched step."""
        if step is None:
            return
        inputs, outputs = step
        num_rows = inputs.num_live_rows
        rows = inputs.rows[:num_rows].tolist()
        commit = self.scheduler.commit(
            rows,
            outputs.token_ids[:, :num_rows].T.tolist(),
            device_ns=outputs.device_ns,
            page_ns=outputs.page_ns,
        )
        for sequence, tokens in zip(commit.sequences, commit.token_ids, strict=True):
            self.emitted[sequence] += tokens
        for sequence in commit.finished:
            self.ends[sequence] += 1

    def play(
        self,
        script: Seq[tuple[str, Any]],
        further: Mapping[str, Callable[[Sequence], None]] | None = None,
    ) -> None:
        """Does what a script says: "submit" a request, "cancel" a sequence, "turn" so many times.

        Args:
            further: other actions, each done to a sequence.
        """
        to_one = {"cancel": self.cancel, **(further or {})}
        for action, value in script:
            if action == "submit":
                self.submit(**value)
            elif action == "turn":
                for _ in range(value):
                    self.turn()
            elif self.sequences:
                to_one[action](self.sequences[value % len(self.sequences)])

    def run(self, limit: int = 3000) -> None:
        """Turns until nothing is left to do."""
        for _ in range(limit):
            if not self.scheduler.has_work:
                return
            self.turn()
        raise AssertionError("the scheduler does not come to an end")

    def expected(self, sequence: Sequence) -> list[int]:
        """What the oracle says."""
        return oracle(
            sequence.token_ids[: sequence.prompt_len],
            sequence.sampling,
            sequence.choice,
            groups=self.groups,
            vocab_size=VOCAB,
            eos_token_ids=(EOS,),
            adapter=sequence.adapter.key if sequence.adapter else None,
        )

    def check(self) -> None:
        """All that must hold once everything has ended."""
        assert self.scheduler.pages.num_used == 0
        assert self.scheduler.swap.num_used == self.scheduler.swap.num_sequences == 0
        assert self.scheduler.num_running == self.scheduler.num_waiting == 0
        assert self.ends == Counter(self.sequences)
        sampled = positions = 0
        for sequence in self.sequences:
            expected = self.expected(sequence)
            emitted = self.emitted[sequence]
            if sequence.reason is FinishReason.ERROR:
                assert emitted == []  # shed: it has never run
            elif sequence.reason is FinishReason.CANCELLED:
                assert emitted == expected[: len(emitted)]
            else:
                assert emitted == expected
                full = len(emitted) == sequence.sampling.max_tokens
                assert sequence.reason is (FinishReason.LENGTH if full else FinishReason.STOP)
            assert emitted == sequence.token_ids[sequence.prompt_len :]
            stop_tokens = int(sequence.stop_token_id is not None)
            sampled += sequence.num_outputs + sequence.num_discarded + stop_tokens
            positions += sequence.num_first_computed + sequence.num_recomputed
            positions += sequence.num_drafted - sequence.num_kept
            if sequence.reason is FinishReason.LENGTH:  # max_tokens is never over-run
                assert sequence.num_discarded <= sequence.num_drafted
        assert sampled == self.executor.num_sampled
        assert positions == self.executor.num_positions
