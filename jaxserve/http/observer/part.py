"""What one part of the observer takes part in: each field is a place that it may leave empty.

A part is a tracer, the SLOs' book, the ledger… It lives in `telemetry` or `metering`, knows nothing
of the others, and is made by `http.observer.parts`. Everything is called in the observer's one
thread, on its event loop. What blocks (a disk, a database, a network) belongs into a thread or
`flush`, never into the calls that take a record.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field

from prometheus_client.core import Metric

from jaxserve.http.observer.messages import Answer, News, Question
from jaxserve.protocol.records import Begun, FirstToken, RequestRecord
from jaxserve.protocol.status import EngineStatus, StepStats

#: Answers a question that a worker passes on from a client.
Ask = Callable[[Question], Awaitable[Answer]]


@dataclass(frozen=True, kw_only=True)
class Part:
    """One part.

    Attributes:
        name: in logs and metrics.
        begun: a request has arrived.
        first_token: it has its first token.
        ended: a request has ended. The same record comes twice where a worker was not told in time
            that it was kept: what must count once looks at `request_id`.
        step: a device call was made.
        status: what the engine says of itself, about once a second.
        news: the engine ended or began again, a worker came, something was changed on purpose.
        tick: about once a second, whether or not anything happens. It may wait for something: no
            other part's waits for it.
        flush: makes durable what was taken so far. Records are only forgotten by the workers once
            all parts have done so: raises where it could not, and is called again.
        asks: by the name of a question.
        metrics: families for /metrics; names must be the part's own.
        close: lets go; after a last `flush`.
    """

    name: str
    begun: Callable[[Begun], None] | None = None
    first_token: Callable[[FirstToken], None] | None = None
    ended: Callable[[RequestRecord], None] | None = None
    step: Callable[[StepStats], None] | None = None
    status: Callable[[EngineStatus], None] | None = None
    news: Callable[[News], None] | None = None
    tick: Callable[[], Awaitable[None]] | None = None
    flush: Callable[[], Awaitable[None]] | None = None
    asks: Mapping[str, Ask] = field(default_factory=dict)
    metrics: Callable[[], Iterable[Metric]] | None = None
    close: Callable[[], Awaitable[None]] | None = None
