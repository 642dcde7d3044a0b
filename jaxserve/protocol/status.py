"""What an engine says of itself, beside the tokens: each device call, how it starts, its state.

Whoever watches (metrics, the console, baselines), admission and probes read these. Times are
CLOCK_MONOTONIC nanoseconds.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from jaxserve.types import DeviceInfo, EmbeddingInfo, ModelInfo


@dataclass(slots=True, kw_only=True)
class StepStats:
    """One device call, for metrics: what ran, how long, and how much of it was work.

    Attributes:
        program: name of the compiled step program.
        device_ns: from the device starting the call to its result being ready.
        idle_ns: time the device waited since the previous call.
        rows, tokens, padded_tokens: sequences, tokens of work, and tokens with the padding.
        decode_tokens, prefill_tokens: tokens of work by kind; drafts count as decoded.
        draft_tokens, draft_accepted_tokens: drafts verified, and those that were right.
        flops, bytes: counted from shapes (models declare them), not measured.
        pages_cached: pages that nobody holds and that can still be found by their content.
        preemptions, prefix_lookup_tokens, prefix_hit_tokens: since the statistics before these;
            known tokens of sequences that joined, and those of them found instead of computed.
        pages_saved, pages_loaded: KV pages that this call copied to the host and from it.
        at_ns: when its result was read.
    """

    step_id: int
    program: str
    device_ns: int
    idle_ns: int
    rows: int
    tokens: int
    padded_tokens: int
    decode_tokens: int
    prefill_tokens: int
    draft_tokens: int
    draft_accepted_tokens: int
    flops: int
    bytes: int
    running: int
    waiting: int
    pages_used: int
    pages_total: int
    preemptions: int
    pages_cached: int
    prefix_lookup_tokens: int
    prefix_hit_tokens: int
    compiles_after_warmup: int
    pages_saved: int = 0
    pages_loaded: int = 0
    at_ns: int = 0


@dataclass(slots=True, kw_only=True)
class Progress:
    """How far start-up is: `phase` is "loading", "compiling" or "ready"."""

    phase: str
    done: int
    total: int


@dataclass(slots=True, kw_only=True)
class ClassLoad:
    """The sequences of one tenant and priority that have not ended.

    Attributes:
        weight: of the tenant's share.
        running, waiting: with and without a row.
        tokens: of prompt, still to be computed.
    """

    priority: int
    tenant: str
    weight: float = 1.0
    running: int = 0
    waiting: int = 0
    tokens: int = 0


@dataclass(slots=True, kw_only=True)
class EngineStatus:
    """The engine's state: "loading", "compiling", "ready", "draining" or "failed".

    A client that knows that it is started again calls it "restarting" until it is ready.

    Attributes:
        model: set once the model is loaded.
        step_age_s: seconds since the step loop last turned.
        pages_cached: pages that nobody holds and that can still be found by their content.
        prefix_lookup_tokens: known tokens of the sequences that joined so far; prefix_hit_tokens:
            of these, those found instead of computed.
        shed: sequences that a full queue refused or pushed out since the start, by reason.
        swapped: waiting sequences whose pages are in the host's memory.
        host_pages_used, host_pages_total: pages there; 0 in all where there is no host store.
        error: the one sentence, for "failed".
        at_ns: when all this was so.
        answers: the number of the question that this answers, after all that came before it; 0
            where nobody asked.
        max_rows: sequences that can run at once.
        loads: by tenant and priority; the smallest may be added together.
        prefill_tokens_per_s: prompt tokens computed a second, of late, in steps that had some.
        service_s, token_s: how long sequences that ended of late held a row, in all and for each
            output token; 0 before any has.
        output_share: the part of their max_tokens that they used.
        embedding: of the model that embeds; None where there is none, or it is not loaded yet.
        texts_waiting: to be embedded; embed_wait_s: how long a new one would wait, of late.
        adapter_slots, adapters_held: slots for LoRA adapters, and those that hold one.
        adapter_joins, adapter_hits: rows taken with an adapter so far, and those of them whose
            adapter was in a slot.
        adapter_loads: adapters read from the disk so far.
        adapter_host_bytes: of those in the host's memory.
        device: what it computes on; None before the model is loaded, and where it is not known.
    """

    state: str
    pid: int
    step_age_s: float
    running: int = 0
    waiting: int = 0
    pages_used: int = 0
    pages_total: int = 0
    pages_cached: int = 0
    prefix_lookup_tokens: int = 0
    prefix_hit_tokens: int = 0
    swapped: int = 0
    host_pages_used: int = 0
    host_pages_total: int = 0
    compiles_after_warmup: int = 0
    model: ModelInfo | None = None
    shed: dict[str, int] = field(default_factory=dict)
    error: str = ""
    at_ns: int = 0
    answers: int = 0
    max_rows: int = 0
    loads: list[ClassLoad] = field(default_factory=list)
    prefill_tokens_per_s: float = 0.0
    service_s: float = 0.0
    token_s: float = 0.0
    output_share: float = 0.0
    embedding: EmbeddingInfo | None = None
    texts_waiting: int = 0
    embed_wait_s: float = 0.0
    adapter_slots: int = 0
    adapters_held: int = 0
    adapter_joins: int = 0
    adapter_hits: int = 0
    adapter_loads: int = 0
    adapter_host_bytes: int = 0
    device: DeviceInfo | None = None
