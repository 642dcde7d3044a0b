"""What HTTP workers and the observer tell each other, one frame each (`protocol.codec`)."""

from __future__ import annotations

from dataclasses import dataclass, field

from jaxserve.protocol.codec import Codec
from jaxserve.protocol.records import Begun, FirstToken, RequestRecord
from jaxserve.protocol.status import EngineStatus, StepStats


@dataclass(slots=True, kw_only=True)
class News:
    """Something that is no request and no step.

    Attributes:
        kind: "engine_down", "engine_started" or "engine_failed"; others as parts agree.
        subject: what it is about: a name, a sentence.
    """

    kind: str
    at_ns: int
    subject: str = ""


@dataclass(slots=True, kw_only=True)
class Report:
    """What a worker has seen since its report before.

    Attributes:
        worker: its index; life: unique to this run of it; number: of the report in it, from 1.
        dropped: records that it had no room for, so far.
    """

    worker: int
    life: str
    number: int
    begun: list[Begun] = field(default_factory=list)
    ended: list[RequestRecord] = field(default_factory=list)
    steps: list[StepStats] = field(default_factory=list)
    news: list[News] = field(default_factory=list)
    status: EngineStatus | None = None
    dropped: int = 0
    first_tokens: list[FirstToken] = field(default_factory=list)


@dataclass(slots=True, kw_only=True)
class Question:
    """What a client wants to know.

    Attributes:
        id: given back with the answer.
        name: of the question; which part answers it follows from it.
        query: of the URL, the last of each name. body: of the request.
        tenant, admin: who asks.
    """

    id: int
    name: str
    query: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    tenant: str = ""
    admin: bool = False


@dataclass(slots=True, kw_only=True)
class Kept:
    """All reports up to this number are kept: the worker may forget them."""

    number: int


@dataclass(slots=True, kw_only=True)
class Answer:
    """Of a question: a response's status, type and body."""

    id: int = 0
    status: int = 200
    content_type: str = "application/json"
    body: bytes = b""


@dataclass(slots=True, kw_only=True)
class Told:
    """What the parts tell all workers, each time it changes.

    Attributes:
        topic: whose word it is, "budgets" for one; body: JSON, whole each time.
    """

    topic: str
    body: bytes


ToObserver = Report | Question
ToWorker = Kept | Answer | Told

TO_OBSERVER = Codec(ToObserver)
TO_WORKER = Codec(ToWorker)
