"""Configuration: frozen sections; `config_values` has what each setting takes.

Part of the floor. A component is handed its own section, never the whole `Config`, which
`jaxserve.settings` reads.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from jaxserve.config_front import HttpConfig, LimitsConfig, ToolsConfig
from jaxserve.config_observing import (
    AlertsConfig,
    MeteringConfig,
    SloConfig,
    TelemetryConfig,
    TracingConfig,
)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which model is served, and where it comes from.

    Attributes:
        path: "smollm2-135m-instruct" (embedded), a directory, a .gguf file, a hub id
            ("org/name"), or a gs:// or s3:// address.
        revision: branch, tag or commit, for a hub id.
        token: access token, for a hub id; HF_TOKEN where empty. Never printed.
        format: "auto", "hf", "gguf" or "orbax".
        tokenizer: path of another tokenizer (directory or file) than the model's own.
        chat_template: path of a Jinja file used instead of the model's own template.
        served_name: name in the API; from the path where empty.
        max_context: positions a sequence may have; 0 takes the model's own limit.
    """

    path: str = "smollm2-135m-instruct"
    revision: str = ""
    token: str = field(default="", metadata={"secret": True})
    format: str = "auto"
    tokenizer: str = ""
    chat_template: str = ""
    served_name: str = ""
    max_context: int = 0


@dataclass(frozen=True, kw_only=True)
class WeightsConfig:
    """How weights are held on the device.

    Attributes:
        dtype: "auto" (float32 on CPU, bfloat16 elsewhere), "float32", "bfloat16" or "float16".
        quantization: "none", or made at loading from any source: "int8" (a scale an output column),
            "int4" (a scale and a minimum for 32 inputs), or "fp8" (as int8, with activations
            rounded to fp8 too, for Hopper GPUs); embedding tables and heads are int8 in all.
        cache_dir: where downloads go; where empty, the hub's own cache, and
            ~/.cache/jaxserve/models for gs:// and s3://.
    """

    dtype: str = "auto"
    quantization: str = "none"
    cache_dir: str = ""


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """The paged KV cache.

    Attributes:
        page_size: tokens a page.
        num_pages: pages of the pool; 0 sizes it from memory_bytes.
        memory_bytes: bytes of the pool; 0 takes memory_fraction, but never more than max_rows
            full contexts need.
        memory_fraction: share of the device's memory (the host's on CPU) for the pool; halved
            until that much is free.
        host_bytes: memory of the host for pages of preempted sequences, which come back instead of
            being computed again; 0 for none. -1 takes 4 GiB, but at most an eighth of what is
            free and as much as the pool itself; none where the model is on several hosts. Memory
            is taken when it is first used.
        preemption: "auto" saves a preempted sequence's pages where that is measured to be faster
            than computing its tokens again, "swap" wherever host_bytes has room, "recompute" never.
        dtype: "auto" (as the activations), "float32", "bfloat16" or "float16"; or "int8" or "fp8"
            (e4m3), with a scale for each position's key and value of each head.
        prefix: whether full pages stay findable by their content, so that a prompt that begins like
            an earlier one, or a sequence that was set back, does not compute them again. Never with
            engine.batch_invariant.
        isolation: who shares such pages: "tenant" (each tenant with itself only) or "none" (all
            with all, so that a tenant can tell by the time to its first token what others sent).
    """

    page_size: int = 16
    num_pages: int = 0
    memory_bytes: int = 0
    memory_fraction: float = 0.5
    host_bytes: int = -1
    preemption: str = "auto"
    dtype: str = "auto"
    prefix: bool = True
    isolation: str = "tenant"


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """What one step may hold.

    Attributes:
        max_rows: sequences that run at once.
        max_step_tokens: tokens of one step, decode rows and prefill chunks together.
        max_waiting: sequences that may wait; one more is refused, or pushes a worse one out.
        max_waiting_tokens: known tokens of those that may wait, likewise; 0 sets no bound.
        decode_steps: decode steps in one device call when nothing on the host is needed.
        draft_tokens: next tokens of a row that are guessed from its earlier text and verified in
            one step, at most; 0 switches speculation off. Output is the same. Never with
            engine.batch_invariant.
        draft_rows: with more rows than this in a step nothing is guessed.
        max_step_ms: what a step that decodes should take at most; chunks of prompts are cut to it.
            0 sets no bound.
        longest_wait_s: a sequence that has waited so long is served before all that have not,
            whatever their priority; 0 for never.
        fairness: within a priority: "vtc" (the tenant that got least comes first), "locality" (the
            same within a quantum, in which cached prompts come first), or "fcfs" (by arrival).
        input_token_price, output_token_price: what a computed prompt token and a generated token
            count for.
        locality_quantum_tokens: what "locality" lets tenants be served out of turn, priced.
    """

    max_rows: int = 64
    max_step_tokens: int = 512
    max_waiting: int = 4096
    max_waiting_tokens: int = 0
    decode_steps: int = 4
    draft_tokens: int = 7
    draft_rows: int = 8
    max_step_ms: float = 0.0
    longest_wait_s: float = 0.0
    fairness: str = "vtc"
    input_token_price: float = 1.0
    output_token_price: float = 2.0
    locality_quantum_tokens: int = 8192

    @property
    def max_verify_rows(self) -> int:
        """Rows of a step that verifies drafts, at most; 0 where there is no speculation."""
        if not self.draft_tokens:
            return 0
        return min(self.draft_rows, self.max_rows, self.max_step_tokens // (1 + self.draft_tokens))


@dataclass(frozen=True, kw_only=True)
class KernelsConfig:
    """Which implementation runs; "auto" takes the fastest that is there and logs which.

    Attributes:
        attention: "auto", "xla", "cpu" (native), "tpu" or "gpu" (Pallas).
        matmul: "auto", "xla", "cpu" (native, packed weights), or "gpu" (Pallas): int4 weights on
            NVIDIA Hopper GPUs, in steps of up to 64 tokens; longer ones are XLA's.
        layers: "auto", "unrolled" or "scanned": layers one after another in a step's program, or in
            a loop, which compiles faster. "auto" takes the loop where no layer's weights are copied
            for it: on TPUs, and on CPUs with the native matmul.
        lora: what adapters add: "auto", "xla", "cpu" (native), "tpu" or "gpu" (Pallas).
        experts: products of a mixture's experts: "auto", "xla", or "gpu" (Pallas, NVIDIA Hopper).
        cuda_graphs: whether an NVIDIA GPU runs a step as one CUDA graph; false launches its kernels
            one by one, which is slower and for finding faults.
    """

    attention: str = "auto"
    matmul: str = "auto"
    layers: str = "auto"
    lora: str = "auto"
    experts: str = "auto"
    cuda_graphs: bool = True


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the model is spread over devices: a mesh of data × expert × model.

    Attributes:
        data: copies of the model, each with sequences and pages of its own; the limits of
            `scheduler` are each copy's.
        expert: parts that the experts of a mixture are dealt to; everything else is split over
            expert × model.
        model: devices that share each matrix and the attention heads; 0 takes all there are.
        hosts: processes that share the mesh, each with its own devices; one a machine.
        host: which of them this is; number 0 serves the API, the others follow it.
        coordinator: "HOST:PORT" of host 0, where the others meet it.
        connect_timeout_s: all hosts must have met within this time.
        lost_after_s: a host that nothing is heard of for so long is lost.
    """

    data: int = 1
    expert: int = 1
    model: int = 0
    hosts: int = 1
    host: int = 0
    coordinator: str = ""
    connect_timeout_s: float = 300.0
    lost_after_s: float = 10.0


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """The engine process.

    Attributes:
        compile_cache_dir: JAX's persistent compilation cache; ~/.cache/jaxserve/xla where empty.
        compile_threads: programs compiled side by side at start-up; 0 takes the cores.
        step_timeout_s: a step that takes longer than this counts as hung.
        step_deadline_factor: so many times the longest measured step of its program a step may
            take, beside step_deadline_floor_s, before the engine counts as hung; never more than
            step_timeout_s, which is also the limit while nothing is measured.
        step_deadline_floor_s: see step_deadline_factor; an idle engine that does not stir for so
            long counts as hung, too.
        max_restarts: an engine that ends by itself is started again so often within
            restart_window_s; after that the server ends. 0: never.
        restart_window_s: see max_restarts.
        restart_backoff_s: pause before the second restart in a row; doubled each time, up to half
            a minute, while lives are short. The first restart is at once.
        batch_invariant: a request's output does not depend, to the last bit, on what else runs: one
            size of decode step and one of prompt step, never both in one, and what is computed
            again takes the way it took at first.
    """

    compile_cache_dir: str = ""
    compile_threads: int = 0
    step_timeout_s: float = 120.0
    step_deadline_factor: float = 20.0
    step_deadline_floor_s: float = 10.0
    max_restarts: int = 12
    restart_window_s: float = 600.0
    restart_backoff_s: float = 1.0
    batch_invariant: bool = False


@dataclass(frozen=True, kw_only=True)
class StructuredConfig:
    """Output that must match a grammar.

    Attributes:
        max_grammar_bytes: larger schemas, patterns and grammars are refused.
        max_properties: schemas with more properties are refused, nested ones counted too.
        check_timeout_s: a grammar that takes longer to compile is refused; the process that
            compiles it first is ended. It waits for others about as long at most.
        check_memory_bytes: likewise for one that needs more memory.
        cached_grammars: compiled grammars that the engine keeps, and verdicts that a front end
            keeps.
        mask_threads: threads that make the masks of a step's rows; 0 takes the cores, and one where
            the model runs on them too.
        step_fuel: what one mask may cost, in llguidance's units, before its row is ended.
    """

    max_grammar_bytes: int = 1024 * 1024
    max_properties: int = 5000
    check_timeout_s: float = 2.0
    check_memory_bytes: int = 2 * 1024 * 1024 * 1024
    cached_grammars: int = 256
    mask_threads: int = 0
    step_fuel: int = 200_000


@dataclass(frozen=True, kw_only=True)
class EmbeddingsConfig:
    """Embeddings, scores and reranking beside generation.

    Attributes:
        model: empty for none; "minilm" (embedded all-MiniLM-L6-v2), a directory, a hub id, or a gs://
            or s3:// address of an encoder of the BERT family; or "served": the generating model
            itself.
        name: in the API; from the model where empty.
        encoder_dtype: of an encoder's weights and states: "float32", "bfloat16" or "float16".
        pooling: "auto" (as the model's own files say, else "mean", or "last" for "served"), "cls",
            "mean", "max", "last" or "weightedmean".
        normalize: "auto" (as the model's own files say, else "true"), "true" or "false".
        max_length: tokens a text may have; 0 takes the model's own limit, or embed_tokens if that
            is less and the model is "served".
        over_length: of a longer text that does not say itself what to do: "error", or "truncate".
        embed_tokens: tokens of one embedding step while nothing generates.
        shared_embed_tokens: the same, while something does: what a generated token may have to
            wait for. A single longer text is a step by itself all the same.
        max_inputs: texts of one request.
        query_prefix, document_prefix: put before texts of that `input_type`, where the model's own
            files have no such prompt.
    """

    model: str = ""
    name: str = ""
    encoder_dtype: str = "float32"
    pooling: str = "auto"
    normalize: str = "auto"
    max_length: int = 0
    over_length: str = "error"
    embed_tokens: int = 2048
    shared_embed_tokens: int = 256
    max_inputs: int = 2048
    query_prefix: str = ""
    document_prefix: str = ""


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """LoRA adapters, chosen by each request.

    Attributes:
        enabled: whether there are any; each step program then has a twin for steps in which some
            row uses one.
        classes: slots in device memory, RANKxSLOTS each: an adapter goes to the class with the
            least rank that holds all its modules. In each copy of the model.
        vocabulary: whether adapters may have deltas of embed_tokens and lm_head, for which each
            slot then has room.
        experts: whether adapters may have deltas of a mixture's experts; each slot then has room
            for those of every expert, which `doctor` prints. The router may have one anyway.
        adapters: NAME=PATH each; PATH is a directory in peft's format, or a gs:// or s3:// address.
            They are loaded when they are first asked for.
        root: a directory, or a gs:// or s3:// address: a name that is not known is looked for
            below it. None where empty.
        cache_dir: where copies of adapters are kept, by content; where empty, a temporary
            directory that ends with the server.
        cache_bytes: of these copies; the least recently used are removed.
        host_bytes: memory of the host for adapters that are ready for a slot; at least one adapter.
        max_bytes: files of one adapter may have so many.
    """

    enabled: bool = False
    classes: tuple[str, ...] = ("16x8", "64x2")
    vocabulary: bool = False
    experts: bool = False
    adapters: tuple[str, ...] = ()
    root: str = ""
    cache_dir: str = ""
    cache_bytes: int = 32 * 1024**3
    host_bytes: int = 4 * 1024**3
    max_bytes: int = 4 * 1024**3


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """What is written to stderr.

    Attributes:
        level: "debug", "info", "warning" or "error".
    """

    level: str = "info"


@dataclass(frozen=True, kw_only=True)
class Config:
    """All sections."""

    model: ModelConfig = ModelConfig()
    weights: WeightsConfig = WeightsConfig()
    cache: CacheConfig = CacheConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    kernels: KernelsConfig = KernelsConfig()
    parallel: ParallelConfig = ParallelConfig()
    engine: EngineConfig = EngineConfig()
    http: HttpConfig = field(default_factory=HttpConfig)
    tools: ToolsConfig = field(default_factory=ToolsConfig)
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    structured: StructuredConfig = StructuredConfig()
    embeddings: EmbeddingsConfig = EmbeddingsConfig()
    lora: LoraConfig = LoraConfig()
    telemetry: TelemetryConfig = field(default_factory=TelemetryConfig)
    tracing: TracingConfig = field(default_factory=TracingConfig)
    slo: SloConfig = field(default_factory=SloConfig)
    metering: MeteringConfig = field(default_factory=MeteringConfig)
    alerts: AlertsConfig = field(default_factory=AlertsConfig)
    logging: LoggingConfig = LoggingConfig()
