"""The typed messages between a client (HTTP worker, offline use, tests) and an engine.

Plain dataclasses without JAX, so that both halves import them. They cross a thread as they are
and a process through `protocol.zmq`. Only token ids travel: text stays in the front end. What the
engine says of itself, beside the tokens, is in `protocol.status`.

Invariants: a client numbers its own sequences (`sequence_id`, unique for that client's life);
every submitted sequence gets exactly one `Finished`, whatever happens short of the engine's death;
events of one sequence arrive in order. Times are CLOCK_MONOTONIC nanoseconds, comparable between
processes of one machine.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from jaxserve.protocol.status import EngineStatus, Progress, StepStats
from jaxserve.types import (
    EmbeddingParams,
    FinishReason,
    SamplingParams,
    TokenLogprobs,
    Vocabulary,
)


@dataclass(slots=True, kw_only=True)
class Interval:
    """A stretch of a request's life that has a name.

    Attributes:
        kind: in the engine "held" (on trial after a death), "adapter", "grammar", "preempted" or
            "swapped" (its pages were on the host), "replay"; the front end has others.
    """

    kind: str
    start_ns: int
    end_ns: int


# ---------------------------------------------------------------------------- client → engine


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenSegment:
    """A run of prompt tokens; other kinds of segment may join it in a prompt."""

    token_ids: list[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterRef:
    """A LoRA adapter.

    Attributes:
        key: the hash of its content; KV that was computed with it is known by it.
        path: of a directory with just that content, which stays while a request uses it.
    """

    key: str
    path: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Submit:
    """Starts one sequence per id in `sequence_ids`; they share the prompt's pages.

    Attributes:
        sequence_ids: one per choice, in choice order (the choice index keys the random bits).
        prompt: segments, in order; at least one token in all.
        arrived_ns: when the request reached the front end.
        priority: smaller is served first, and preempts.
        tenant: who is charged; opaque here.
        cache_salt: only requests with the same one share cached pages.
        adapter: None for the base model.
        weight: the tenant's share beside others'; with twice the weight it is served twice as much.
        request_key: 16 hexadecimal digits, unique over all clients and the engine's lives; by it
            the flight recorder names a request. Empty: it is in no record.
        attempt: earlier lives of the engine that had taken it in. Above 0, what follows says how
            far it had come; it has been let in once, and is not refused for a queue or a drain.
        choices: indexes of the sequences among the request's choices; 0, 1, … where empty.
        emitted: of each sequence, output tokens that its client has; none where empty.
        queued_ns: of each sequence, for how long it has waited for its first token, without the
            time in which there was no engine; none where empty.
        prompt_logprobs_done: prompt log-probabilities that its client has.
        traceparent: the front end's span, as W3C trace context; empty where nothing is traced.
        waited: what it has waited for before the scheduler sees it: its client says of the lives
            of the engine that ended, whoever holds it here adds its own.
    """

    sequence_ids: list[int]
    prompt: list[TokenSegment]
    sampling: SamplingParams
    arrived_ns: int
    priority: int = 0
    tenant: str = ""
    cache_salt: str = ""
    weight: float = 1.0
    request_key: str = ""
    attempt: int = 0
    choices: list[int] = field(default_factory=list)
    emitted: list[list[int]] = field(default_factory=list)
    queued_ns: list[int] = field(default_factory=list)
    prompt_logprobs_done: int = 0
    adapter: AdapterRef | None = None
    traceparent: str = ""
    waited: list[Interval] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Embed:
    """Asks for the vector of each of some texts (or a cross-encoder's score of each pair).

    Attributes:
        sequence_ids: one per text.
        texts: token ids of each, at least one.
        second_starts: where each pair's second text begins; empty where they are no pairs.
        arrived_ns, priority, tenant, weight, request_key: as of `Submit`.
        attempt: earlier lives of the engine that had taken it in, as of `Submit`; nothing else is
            kept of those.
        traceparent, waited: as of `Submit`.
    """

    sequence_ids: list[int]
    texts: list[list[int]]
    params: EmbeddingParams
    arrived_ns: int
    second_starts: list[int] = field(default_factory=list)
    priority: int = 0
    tenant: str = ""
    weight: float = 1.0
    request_key: str = ""
    attempt: int = 0
    traceparent: str = ""
    waited: list[Interval] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cancel:
    """Ends these sequences. Unknown or finished ids are ignored.

    `reason` is reported in `Finished`: CANCELLED when the client left, STOP when the front end
    matched a stop string.
    """

    sequence_ids: list[int]
    reason: FinishReason = FinishReason.CANCELLED


@dataclass(frozen=True, slots=True, kw_only=True)
class Drain:
    """Refuse new sequences from now on; running and waiting ones finish."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GetStatus:
    """Asks for an `EngineStatus`; also serves as the sign that this client lives.

    Attributes:
        stats: whether this client wants a `StepStats` for each device call from now on.
        number: of the question, which the answer repeats; larger than of those before.
    """

    stats: bool = False
    number: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Goodbye:
    """This client leaves: all its sequences are cancelled, and nothing more is sent to it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UseVocabulary:
    """What tokens say: sent before the first request that has a grammar, in each life."""

    vocabulary: Vocabulary


ClientMessage = Submit | Cancel | Drain | GetStatus | Goodbye | UseVocabulary | Embed

# ---------------------------------------------------------------------------- engine → client


@dataclass(slots=True, kw_only=True)
class SequenceRecord:
    """What a sequence did and when; metering, tracing and SLOs are computed from it.

    Attributes:
        stop_tokens: 1 where a token ended it that is not among its output.
        computed_tokens: positions run through the model for the first time, prompt and output.
        cached_tokens: prompt tokens whose KV was found instead of computed.
        recomputed_tokens: positions run again after a preemption, or after the engine's end.
        swapped_tokens: positions brought back from the host's memory instead, each time it was.
        drafted_tokens: proposed by speculation; discarded_tokens: sampled or drafted, not emitted.
        context_tokens: prompt plus emitted tokens at the end.
        replays: how often the engine ended under it and it went on in another.
        prefill_device_ns: its share of the device's time, of each step by the work that its rows
            caused there: for prompt positions that were computed for the first time.
        decode_device_ns: for tokens that were emitted.
        wasted_device_ns: for positions computed again, and tokens that were not emitted.
        intervals: what else it waited for, in order.
        traceparent: as it was submitted; pid: of the engine's process that says this, 0 for none.
        choice: index among all sequences of its request; the front end says it.
        *_ns: zero while it has not happened.
    """

    prompt_tokens: int = 0
    output_tokens: int = 0
    stop_tokens: int = 0
    computed_tokens: int = 0
    cached_tokens: int = 0
    recomputed_tokens: int = 0
    swapped_tokens: int = 0
    drafted_tokens: int = 0
    discarded_tokens: int = 0
    preemptions: int = 0
    context_tokens: int = 0
    replays: int = 0
    arrived_ns: int = 0
    queued_ns: int = 0
    scheduled_ns: int = 0
    first_token_ns: int = 0
    done_ns: int = 0
    prefill_device_ns: int = 0
    decode_device_ns: int = 0
    wasted_device_ns: int = 0
    intervals: list[Interval] = field(default_factory=list)
    traceparent: str = ""
    pid: int = 0
    choice: int = 0


@dataclass(slots=True, kw_only=True)
class Finished:
    """The last word about one sequence.

    Attributes:
        stop_token_id: the end or stop token that ended it, if one did; it is not emitted.
        error, error_code, error_param: what went wrong, for FinishReason.ERROR; the code is a
            `JaxserveError`'s, by which the client raises the right exception.
        retry_after_s: when the same request may succeed, where that is known.
        vector: what an `Embed` asked for, as float32 in the machine's order.
    """

    sequence_id: int
    reason: FinishReason
    record: SequenceRecord
    stop_token_id: int | None = None
    error: str = ""
    error_code: str = ""
    error_param: str | None = None
    retry_after_s: float | None = None
    vector: bytes = b""


@dataclass(slots=True, kw_only=True)
class TokenEvents:
    """What one step brought to one client's sequences: parallel lists, one message a step.

    Attributes:
        step_id, at_ns: the step, and when its tokens were read back.
        sequence_ids: the sequences that got tokens, aligned with token_ids.
        token_ids: the new tokens of each, oldest first.
        logprobs: sequence id → one entry per new token, for those that asked.
        prompt_logprobs: sequence id → entries for the prompt tokens of this step's chunk, each
            token but the first once; of several choices only the first reports them.
        finished: sequences that ended in this step, after their tokens.
    """

    step_id: int
    at_ns: int
    sequence_ids: list[int] = field(default_factory=list)
    token_ids: list[list[int]] = field(default_factory=list)
    logprobs: dict[int, list[TokenLogprobs]] = field(default_factory=dict)
    prompt_logprobs: dict[int, list[TokenLogprobs]] = field(default_factory=dict)
    finished: list[Finished] = field(default_factory=list)


EngineMessage = TokenEvents | StepStats | Progress | EngineStatus
