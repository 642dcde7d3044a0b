"""Fills the record of a request while it is answered (`protocol.records`).

`Arrival` opens one for each request that asks for work and closes it at the last byte; what is in
between notes what it knows. Errors are noted where they are turned into an answer.
"""

from __future__ import annotations

import secrets
import time
from typing import TYPE_CHECKING, Any

from jaxserve.errors import DeadlineExceeded, JaxserveError, Overloaded
from jaxserve.protocol.messages import Interval
from jaxserve.protocol.records import Asked, Begun, Outcome, RequestRecord
from jaxserve.telemetry.tracing.content import answered_content, asked_content
from jaxserve.telemetry.tracing.context import read_context
from jaxserve.telemetry.tracing.sampling import begins_sampled

if TYPE_CHECKING:
    from jaxserve.config import TracingConfig
    from jaxserve.http.auth import Identity
    from jaxserve.http.demand import Demand
    from jaxserve.http.generation import Generation
    from jaxserve.http.wire import Work
    from jaxserve.text.fields import Fields

#: Routes whose requests ask for work. All others are counted by status only.
WORK_ROUTES = frozenset(
    {
        *("/v1/chat/completions", "/v1/completions", "/v1/responses"),
        *("/v1/embeddings", "/v1/score", "/v1/rerank"),
    }
)
#: The status of a request whose client left before its answer began.
LEFT = 499
#: Longer texts of a request (a user's name, an error) are cut.
_MAX_TEXT = 200


def open_record(path: str) -> RequestRecord:
    """The record of a request that has just arrived."""
    return RequestRecord(
        request_id=secrets.token_hex(16), route=path, arrived_ns=time.monotonic_ns()
    )


def note_context(record: RequestRecord, scope: Any, config: TracingConfig) -> None:
    """Which trace it belongs to: its caller's, or one of its own, whose id is the request's."""
    context = read_context(scope["headers"])
    record.span_id = record.request_id[:16]
    if context is None:
        record.trace_id = record.request_id
    else:
        record.trace_id, record.parent_id = context.trace_id, context.span_id
        record.trace_flags, record.tracestate = context.flags, context.tracestate
    record.sampled = begins_sampled(config, record.trace_id, context)


def record_of(scope: Any) -> RequestRecord:
    """The record of the request that an endpoint answers."""
    return scope["jaxserve.record"]


def note_identity(scope: Any, identity: Identity) -> None:
    """Who calls is known."""
    record: RequestRecord | None = scope.get("jaxserve.record")
    if record is None:
        return
    record.tenant = identity.tenant
    record.key = identity.key
    record.priority = identity.priority  # until it says otherwise


def note_read(record: RequestRecord, model: str, adapter: str) -> None:
    """Its body is there."""
    record.read_ns = time.monotonic_ns()
    record.model = model
    record.adapter = adapter


def note_asked(record: RequestRecord, fields: Fields) -> None:
    """What it asks is to be kept."""
    messages = fields.peek("messages")
    messages = fields.peek("input") if messages is None else messages
    record.asked_content = asked_content(messages, fields.peek("prompt"))


def note_answered(record: RequestRecord, generation: Generation) -> None:
    """What it was answered is to be kept, as far as it came."""
    record.answered_content = answered_content(generation.answers())


def note_admitted(record: RequestRecord, demand: Demand) -> Begun:
    """It was let in: what is told of it at once."""
    record.admitted_ns = time.monotonic_ns()
    record.user = demand.user[:_MAX_TEXT]
    record.priority = demand.priority
    return Begun(
        request_id=record.request_id,
        arrived_ns=record.arrived_ns,
        route=record.route,
        model=record.model,
        tenant=record.tenant,
        priority=record.priority,
        adapter=record.adapter,
    )


def note_work(record: RequestRecord, work: Work) -> None:
    """What it asked for is known."""
    options = work.options
    given = options.sampling
    record.response_id = work.wire.response_id
    record.tokenized_ns = time.monotonic_ns()
    record.streamed = options.stream
    record.asked = Asked(
        max_tokens=options.max_tokens,
        temperature=given.get("temperature"),
        top_p=given.get("top_p"),
        top_k=given.get("top_k"),
        frequency_penalty=given.get("frequency_penalty"),
        presence_penalty=given.get("presence_penalty"),
        seed=given.get("seed"),
        stop=list(options.stop),
        choices=options.n,
    )


def note_adapter(record: RequestRecord) -> None:
    """Its adapter's files are here."""
    record.spans.append(
        Interval(kind="adapter", start_ns=record.tokenized_ns, end_ns=time.monotonic_ns())
    )


def note_error(scope: Any, error: JaxserveError) -> None:
    """It ends with an error, whether or not its answer has begun."""
    record: RequestRecord | None = scope.get("jaxserve.record")
    if record is None:
        return
    record.error_code = error.code
    record.error = error.message[:_MAX_TEXT]
    record.outcome = _outcome(error)


def close_record(record: RequestRecord, status: int) -> None:
    """The last byte was sent, or the client is gone."""
    record.done_ns = time.monotonic_ns()
    record.status = status
    if status == LEFT:
        record.outcome = Outcome.LEFT


def _outcome(error: JaxserveError) -> Outcome:
    """What an error says about whose fault it was."""
    if isinstance(error, Overloaded):
        return Outcome.SHED
    if isinstance(error, DeadlineExceeded):
        return Outcome.EXPIRED
    if error.status in (402, 429):
        return Outcome.LIMITED
    return Outcome.FAILED if error.status >= 500 else Outcome.REFUSED
