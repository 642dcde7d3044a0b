"""What the engine tells of its work: the record of a sequence, the statistics of a step."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Sequence as Seq

from jaxserve.device.embed_step import EmbedOutputs
from jaxserve.device.step import StepOutputs
from jaxserve.engine.turn import Executor, InFlight, TextsInFlight
from jaxserve.protocol.messages import Embed, Interval, SequenceRecord, Submit
from jaxserve.protocol.status import StepStats
from jaxserve.scheduler.copies import Schedulers
from jaxserve.scheduler.plan import Plan
from jaxserve.scheduler.sequence import Sequence, Wait


class Statistics:
    """Statistics of steps; counts that only grow are told as what came since the step before.

    Args:
        scheduler, executor: whose steps these are.
    """

    def __init__(self, scheduler: Schedulers, executor: Executor) -> None:
        self._scheduler = scheduler
        self._executor = executor
        self._told: Counter[str] = Counter()

    def of(self, step: InFlight, outputs: StepOutputs) -> StepStats:
        """Of a step that has been read."""
        plans = [plan for plan in step.plans if plan is not None]
        program = step.inputs[0].program
        chunk_tokens = sum(len(chunk.token_ids) for plan in plans for chunk in plan.chunks)
        own_tokens = prefill_tokens(plans)
        num_decode_rows = sum(inputs.num_decode_rows for inputs in step.inputs)
        decode_tokens = num_decode_rows * program.decode_steps + chunk_tokens - own_tokens
        work = [self._executor.count_work(inputs) for inputs in step.inputs]
        return StepStats(
            step_id=plans[0].step_id,
            program=program.name,
            device_ns=outputs.device_ns,
            idle_ns=outputs.idle_ns,
            rows=sum(inputs.num_live_rows for inputs in step.inputs),
            tokens=decode_tokens + own_tokens,
            padded_tokens=program.num_tokens * program.decode_steps * len(step.inputs),
            decode_tokens=decode_tokens,
            prefill_tokens=own_tokens,
            draft_tokens=step.drafted,
            draft_accepted_tokens=step.accepted,
            flops=sum(flops for flops, _ in work),
            bytes=sum(num_bytes for _, num_bytes in work),
            pages_saved=sum(len(plan.page_saves) for plan in plans),
            pages_loaded=sum(len(plan.page_loads) for plan in plans),
            **self._state(),
        )

    def of_texts(
        self, step: TextsInFlight, outputs: EmbedOutputs, work: tuple[int, int]
    ) -> StepStats:
        """Of an embedding step that has been read; its tokens count as prompt tokens."""
        num_tokens = sum(text.prompt_len for text in step.texts)
        return StepStats(
            step_id=step.step_id,
            program=step.program.name,
            device_ns=outputs.device_ns,
            idle_ns=outputs.idle_ns,
            rows=len(step.texts),
            tokens=num_tokens,
            padded_tokens=step.program.num_tokens,
            decode_tokens=0,
            prefill_tokens=num_tokens,
            draft_tokens=0,
            draft_accepted_tokens=0,
            flops=work[0],
            bytes=work[1],
            **self._state(),
        )

    def _state(self) -> dict[str, int]:
        """What is told with every step, of whatever kind it was."""
        scheduler = self._scheduler
        return {
            "running": scheduler.num_running,
            "waiting": scheduler.num_waiting,
            "pages_used": scheduler.pages_used,
            "pages_total": scheduler.pages_total,
            "pages_cached": scheduler.pages_cached,
            "preemptions": self._since_told("preemptions", scheduler.num_preemptions),
            "prefix_lookup_tokens": self._since_told("lookup", scheduler.prefix_lookup_tokens),
            "prefix_hit_tokens": self._since_told("hit", scheduler.prefix_hit_tokens),
            "compiles_after_warmup": self._executor.compiles_after_warmup,
            "at_ns": time.monotonic_ns(),
        }

    def _since_told(self, name: str, total: int) -> int:
        """What a count has grown by since the statistics before."""
        grown = total - self._told[name]
        self._told[name] = total
        return grown


def prefill_tokens(plans: Seq[Plan | None]) -> int:
    """Known tokens that a step computes, beside those that decode and what is drafted."""
    chunks = (chunk for plan in plans if plan is not None for chunk in plan.chunks)
    return sum(len(chunk.token_ids) for chunk in chunks if not chunk.num_drafts)


def waits_of(message: Submit | Embed) -> list[Wait]:
    """What a request waited for before the scheduler saw it."""
    return [Wait(wait.kind, wait.start_ns, wait.end_ns) for wait in message.waited]


def record_of(sequence: Sequence, now_ns: int, device_ns: tuple[int, int, int]) -> SequenceRecord:
    """What a sequence that ends now did and when.

    Args:
        device_ns: its shares of the device's time: prefill, decode, and waste.
    """
    return SequenceRecord(
        prompt_tokens=sequence.prompt_len,
        output_tokens=sequence.num_outputs,
        stop_tokens=int(sequence.stop_token_id is not None),
        computed_tokens=sequence.num_first_computed,
        cached_tokens=sequence.num_cached,
        recomputed_tokens=sequence.num_recomputed,
        drafted_tokens=sequence.num_drafted,
        swapped_tokens=sequence.num_swapped,
        discarded_tokens=sequence.num_discarded,
        preemptions=sequence.num_preemptions,
        context_tokens=len(sequence.token_ids),
        arrived_ns=sequence.arrived_ns,
        queued_ns=sequence.queued_ns,
        scheduled_ns=sequence.scheduled_ns,
        first_token_ns=sequence.first_token_ns,
        done_ns=now_ns,
        intervals=[
            Interval(kind=wait.kind, start_ns=wait.start_ns, end_ns=wait.end_ns or now_ns)
            for wait in sequence.waits
        ],
        traceparent=sequence.traceparent,
        pid=os.getpid(),
        prefill_device_ns=device_ns[0],
        decode_device_ns=device_ns[1],
        wasted_device_ns=device_ns[2],
    )
