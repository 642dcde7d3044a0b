"""The one endpoint behind chat, completions and responses: read, submit, answer in pieces or whole.

`read_chat`, `read_completion` and `read_response` say what a body asks for; from there on all take
this path.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable
from typing import Any

from jaxserve.errors import DeviceFailure, JaxserveError, Overloaded
from jaxserve.http.auth import Identity
from jaxserve.http.errors import send_json
from jaxserve.http.frontend import Frontend
from jaxserve.http.generation import Delta, Generation
from jaxserve.http.records import (
    note_adapter,
    note_admitted,
    note_answered,
    note_asked,
    note_error,
    note_read,
    note_work,
    record_of,
)
from jaxserve.http.sse import Departure, EventStream
from jaxserve.http.wire import Answer, Work
from jaxserve.protocol.records import Outcome
from jaxserve.text.fields import Fields
from jaxserve.types import ModelInfo

logger = logging.getLogger(__name__)

Read = Callable[[Fields, Frontend, ModelInfo, Identity], Awaitable[Work]]


class GenerationEndpoint:
    """ASGI: one of the generating routes.

    Args:
        read: takes the body's fields apart.
    """

    def __init__(self, frontend: Frontend, read: Read) -> None:
        self._frontend = frontend
        self._read = read

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answers one request; raises what the error table answers."""
        frontend = self._frontend
        model = frontend.model()
        identity: Identity = scope["jaxserve.identity"]
        record = record_of(scope)
        frontend.costs.admit(scope, identity)
        frontend.gate.glance(scope, identity)
        fields = await frontend.read(scope, receive)
        frontend.costs.read(scope, fields)
        pick = frontend.adapters.pick(fields, model)
        note_read(record, model.name, pick.adapter or "")
        if frontend.record_content:
            note_asked(record, fields)
        visit = await frontend.gate.enter(scope, fields, identity)
        try:
            frontend.reporter.begun(note_admitted(record, visit.demand))
            frontend.metrics.admitted(record)
            work = await self._read(fields, frontend, pick.model, identity)
            note_work(record, work)
            async with frontend.adapters.using(pick, visit.deadline_ns) as adapter:
                if adapter is not None:
                    note_adapter(record)
                await visit.begin(work)
                generation = Generation(
                    frontend.client,
                    frontend.tokenizer,
                    frontend.metrics,
                    prompts=work.prompts,
                    samplings=work.samplings,
                    options=work.options,
                    tenant=identity.tenant,
                    weight=identity.weight,
                    record=record,
                    deadline_ns=visit.deadline_ns,
                    on_first=frontend.reporter.first_token,
                    adapter=adapter,
                    keep_answers=frontend.record_content,
                )
                scope["jaxserve.streams"] += generation.streams
                visit.follow(generation.usage)
                answer = _stream if work.options.stream else _whole
                try:
                    async with Departure(receive, generation.cancel) as departure:
                        await answer(generation, work, frontend, departure, send, scope)
                    if departure.gone:
                        record.outcome = Outcome.LEFT
                finally:
                    generation.cancel()
                    if frontend.record_content:
                        note_answered(record, generation)
        except Overloaded:
            visit.forgive()
            raise
        finally:
            visit.leave()


async def _whole(
    generation: Generation,
    work: Work,
    frontend: Frontend,
    departure: Departure,
    send: Any,
    scope: Any,
) -> None:
    options = work.options
    parts: list[list[Delta]] = [[] for _ in range(len(work.prompts) * options.candidates)]
    try:
        while deltas := await generation.next():
            for delta in deltas:
                parts[delta.choice].append(delta)
    except JaxserveError:
        if departure.gone:
            return
        raise
    merged = [_joined(index, choice) for index, choice in enumerate(parts)]
    answers = []
    for start in range(0, len(merged), options.candidates):
        choices = merged[start : start + options.candidates]
        prompt_logprobs = choices[0].prompt_logprobs
        if options.candidates > options.n:
            choices = sorted(choices, key=_mean_logprob, reverse=True)[: options.n]
        answers.append(Answer(choices=choices, prompt_logprobs=prompt_logprobs))
    frontend.costs.tell(scope, generation.usage)
    await send_json(send, work.wire.document(answers, generation.usage))


async def _stream(
    generation: Generation,
    work: Work,
    frontend: Frontend,
    departure: Departure,
    send: Any,
    scope: Any,
) -> None:
    events = EventStream(send, frontend.config.heartbeat_s)
    wire = work.wire
    try:
        while deltas := await generation.next():
            data = wire.events(deltas[0])
            if len(deltas) > 1:
                data += b"".join([wire.events(delta) for delta in deltas[1:]])
            if data:
                await events.write(data)
        frontend.costs.tell(scope, generation.usage)
        await events.end(wire.ending(generation.usage))
    except JaxserveError as error:
        if departure.gone:
            return
        if not events.started:
            raise
        note_error(scope, error)
        await events.end(wire.failure(error))
    except Exception:
        if not events.started:
            raise
        logger.exception("a stream failed")
        error = DeviceFailure("the server failed to write this stream")
        note_error(scope, error)
        await events.end(wire.failure(error))
    finally:
        events.close()


def _joined(index: int, parts: list[Delta]) -> Delta:
    return Delta(
        index,
        "".join([part.text for part in parts]),
        [token for part in parts for token in part.token_ids],
        [entry for part in parts for entry in part.logprobs],
        [entry for part in parts for entry in part.prompt_logprobs],
        parts[-1].finish_reason,
        [part for delta in parts for part in delta.parts],
        [took for delta in parts for took in delta.part_tokens],
    )


def _mean_logprob(choice: Delta) -> float:
    if not choice.logprobs:
        return -math.inf
    return sum(entry.logprob for entry in choice.logprobs) / len(choice.logprobs)
