"""One request on its way through the engine: what all generating endpoints have in common.

`Generation` submits each prompt, turns the engine's tokens into text with `ChoiceText` (which
matches stop strings and never splits a character), and hands out `Delta`s, all that have come
since its reader last looked. Endpoints only say how prompts are made and how deltas look on the
wire; streaming and not are two readers of the same deltas. Where a request has tools, or its model
reasons, a `MessageReader` for each choice adds what the text is of the message (`Delta.parts`).

Invariants: every choice gets exactly one delta with a `finish_reason`, and none after it. Tokens
past a stop string are neither handed out nor counted. Whoever leaves early calls `cancel`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from jaxserve.errors import DeadlineExceeded, Overloaded
from jaxserve.http.metrics import Metrics
from jaxserve.http.sampling import Options
from jaxserve.protocol.client import EngineClient, SequenceEvent, Stream
from jaxserve.protocol.messages import AdapterRef, Finished
from jaxserve.protocol.records import RequestCost, RequestRecord
from jaxserve.text.choice import ChoiceText
from jaxserve.text.message import Part
from jaxserve.text.read_choice import ReadChoice, Took
from jaxserve.text.tokenizer import Tokenizer
from jaxserve.types import FinishReason, SamplingParams, TokenLogprobs


@dataclass(slots=True)
class Delta:
    """What is new for one choice.

    Attributes:
        choice: prompt index × candidates + candidate.
        token_ids, logprobs: of the tokens that belong to the output; text may lag behind them.
        prompt_logprobs: of prompt tokens after the first; with a prompt's first choice only.
        finish_reason: "stop", "length" or "tool_calls" in the choice's last delta.
        parts: what `text` brings of the message, where the request's messages are read.
        part_tokens: as of `ReadDelta`; the tokens may be of earlier deltas.
    """

    choice: int
    text: str = ""
    token_ids: Sequence[int] = ()
    logprobs: Sequence[TokenLogprobs] = ()
    prompt_logprobs: Sequence[TokenLogprobs] = ()
    finish_reason: str | None = None
    parts: Sequence[Part] = ()
    part_tokens: Sequence[Took] = ()


@dataclass(slots=True, kw_only=True)
class Usage:
    """Tokens of a whole request; every candidate's output counts.

    Attributes:
        reasoning_tokens: of the completion's, those of the reasoning.
        cost: where the request asked for it, once it is done.
    """

    prompt_tokens: int
    completion_tokens: int = 0
    cached_tokens: int = 0
    reasoning_tokens: int = 0
    cost: RequestCost | None = None


class _Choice:
    """One sequence, as far as it has come."""

    __slots__ = ("done", "last_ns", "read")

    def __init__(self, read: ReadChoice) -> None:
        self.read = read
        self.done = False
        self.last_ns = 0


class Generation:
    """The sequences of one request: call `next` until it gives nothing.

    Args:
        prompts: token ids of each prompt, at least one token; samplings: aligned with them.
        tenant, weight: who is charged, and its share.
        record: of the request; its tokens and times are noted there.
        deadline_ns: when it is given up; None for never.
        on_first: is told when the first token is there.
        adapter: a LoRA adapter; None for the base model.
        keep_answers: whether `answers` will be asked for.

    Attributes:
        usage: complete once `next` has given nothing.
        streams: at the engine.
    """

    def __init__(
        self,
        client: EngineClient,
        tokenizer: Tokenizer,
        metrics: Metrics,
        *,
        prompts: list[list[int]],
        samplings: list[SamplingParams],
        options: Options,
        tenant: str,
        weight: float,
        record: RequestRecord,
        deadline_ns: int | None,
        on_first: Callable[[RequestRecord], None],
        adapter: AdapterRef | None = None,
        keep_answers: bool = False,
    ) -> None:
        self.usage = Usage(prompt_tokens=sum(len(prompt) for prompt in prompts))
        self.streams: list[Stream] = []
        self._options = options
        self._metrics = metrics
        self._record = record
        self._on_first = on_first
        self._choices = [
            _Choice(
                ReadChoice(
                    ChoiceText(
                        tokenizer,
                        prompt,
                        stop=options.stop,
                        include_stop=options.include_stop,
                        skip_special_tokens=options.skip_special_tokens,
                        shown=options.shown_tokens,
                    ),
                    options.reader() if options.reader is not None else None,
                )
            )
            for prompt in prompts
            for _ in range(options.candidates)
        ]
        self._kept: list[list[Delta]] | None = [[] for _ in self._choices] if keep_answers else None
        self._loop = asyncio.get_running_loop()
        self._waiter: asyncio.Future[None] | None = None
        self._woken = False
        self._running = True
        self._expiry: asyncio.TimerHandle | None = None
        self._expired = False
        record.submitted_ns = time.monotonic_ns()  # before the engine can have done anything
        for prompt, sampling in zip(prompts, samplings, strict=True):
            stream = client.submit(
                prompt,
                sampling,
                n=options.candidates,
                priority=options.priority,
                tenant=tenant,
                weight=weight,
                cache_salt=options.cache_salt,
                arrived_ns=record.arrived_ns,
                adapter=adapter,
                traceparent=record.traceparent,
            )
            stream.watch(self._wake)
            self.streams.append(stream)
        metrics.prompt_tokens(self.usage.prompt_tokens)
        record.prompt_tokens = self.usage.prompt_tokens
        if deadline_ns is not None:
            left_s = (deadline_ns - time.monotonic_ns()) / 1e9
            self._expiry = self._loop.call_later(left_s, self._expire)

    def cancel(self) -> None:
        """The client has left, or the answer failed: gives the engine's pages back."""
        if self._expiry is not None:
            self._expiry.cancel()
        for stream in self.streams:
            stream.cancel()

    def answers(self) -> list[tuple[str, str]]:
        """Text and finish reason of each choice, as far as they have come and were kept."""
        return [
            (
                "".join(delta.text for delta in deltas),
                next((d.finish_reason for d in deltas if d.finish_reason is not None), ""),
            )
            for deltas in self._kept or ()
        ]

    async def next(self) -> list[Delta]:
        """What has come since the last call, waiting for it if need be; empty at the end.

        Raises:
            DeadlineExceeded: the deadline has passed; the engine has been told.
            JaxserveError: the engine refused a prompt, or failed; `cancel` the others then.
        """
        while True:
            if self._expired:
                raise DeadlineExceeded("the request's deadline passed before it was done")
            if self._woken:
                self._woken = self._running = False
                deltas: list[Delta] = []
                for index, stream in enumerate(self.streams):
                    while (event := stream.take()) is not None:
                        self._advance(deltas, stream, index, event)
                    self._running = self._running or not stream.done
                if deltas:
                    return deltas
            if not self._running:
                done_ns = time.monotonic_ns() - self._record.arrived_ns
                self._metrics.request_done(done_ns / 1e9)
                return []
            self._waiter = self._loop.create_future()
            await self._waiter

    def _expire(self) -> None:
        self._expired = True
        self.cancel()
        self._wake()

    def _wake(self) -> None:
        self._woken = True
        waiter = self._waiter
        if waiter is not None:
            self._waiter = None
            if not waiter.done():  # its reader may have been cancelled
                waiter.set_result(None)

    def _advance(
        self, deltas: list[Delta], stream: Stream, prompt: int, event: SequenceEvent
    ) -> None:
        """Turns one event into a delta, if it brings anything that shows."""
        index = prompt * self._options.candidates + event.choice
        choice = self._choices[index]
        if event.finished is not None:
            self._note_end(event.finished, event.choice)
        if choice.done:
            return
        delta = Delta(index, prompt_logprobs=event.prompt_logprobs)
        if event.token_ids and not self._options.discard:
            self._add_tokens(choice, delta, stream, event)
        if event.finished is not None and not choice.done:
            tail = choice.read.finish()
            delta.text += tail.text
            delta.finish_reason = _finish_reason(event.finished, tail.stopped)
            choice.done = True
            delta.parts = [*delta.parts, *tail.parts]
            delta.part_tokens = [*delta.part_tokens, *tail.part_tokens]
        if delta.finish_reason is not None:
            delta.parts, delta.part_tokens, delta.finish_reason = choice.read.close(
                delta.parts, delta.part_tokens, delta.finish_reason
            )
            self._record.finish_reasons.append(delta.finish_reason)
        deltas.append(delta)
        if self._kept is not None:
            self._kept[index].append(delta)

    def _note_end(self, finished: Finished, choice: int) -> None:
        """The engine's last word about a sequence, which may come after the choice's end here."""
        if choice == 0:
            self.usage.cached_tokens += finished.record.cached_tokens
            self._record.cached_tokens = self.usage.cached_tokens

    def _add_tokens(
        self, choice: _Choice, delta: Delta, stream: Stream, event: SequenceEvent
    ) -> None:
        added = choice.read.add(event.token_ids)
        num_tokens = added.num_tokens
        self.usage.completion_tokens += num_tokens
        self.usage.reasoning_tokens += added.reasoning_tokens
        delta.text, delta.parts, delta.part_tokens = added.text, added.parts, added.part_tokens
        delta.token_ids = event.token_ids
        delta.logprobs = event.logprobs
        self._measure(choice, event)
        if added.stopped:
            delta.token_ids = event.token_ids[:num_tokens]
            delta.logprobs = event.logprobs[:num_tokens]
            delta.finish_reason = FinishReason.STOP.value
            choice.done = True
            stream.cancel(event.choice, FinishReason.STOP)

    def _measure(self, choice: _Choice, event: SequenceEvent) -> None:
        record = self._record
        record.completion_tokens = self.usage.completion_tokens
        record.reasoning_tokens = self.usage.reasoning_tokens
        last_ns, choice.last_ns = choice.last_ns, event.at_ns
        if last_ns:
            self._metrics.tokens(len(event.token_ids), (event.at_ns - last_ns) / 1e9)
            return
        self._metrics.tokens(len(event.token_ids))
        if not record.first_token_ns:
            record.first_token_ns = time.monotonic_ns()
            self._metrics.first_token((record.first_token_ns - record.arrived_ns) / 1e9)
            self._on_first(record)


def _finish_reason(finished: Finished, stopped: bool) -> str:
    if finished.reason is FinishReason.CANCELLED:
        raise Overloaded("the request was cancelled before it was done")
    return FinishReason.STOP.value if stopped else finished.reason.value
