"""Configuration that only the front end reads; sections of `jaxserve.config.Config`."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class HttpConfig:
    """The HTTP front end.

    Attributes:
        host, port: where it listens; port 0 takes a free one and prints it.
        workers: HTTP processes.
        key_file: YAML file of API keys (docs/http-api.md); without one the server listens on
            loopback only, and everybody is one anonymous admin.
        cors_origins: origins that browsers may call from.
        tls_certificate, tls_key: PEM files; both or none.
        max_body_bytes: larger request bodies are refused.
        body_timeout_s: a request's body must be there within this time.
        max_choices: bound of n and best_of, and of prompts in a batch.
        drain_timeout_s: on SIGTERM, streams may go on this long.
        heartbeat_s: silence in a stream after which a comment is sent.
        restart_wait_s: a request that comes within this time after the engine's death waits for
            it to be started again; a later one is refused until it is ready.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    workers: int = 1
    key_file: str = ""
    cors_origins: tuple[str, ...] = ()
    tls_certificate: str = ""
    tls_key: str = ""
    max_body_bytes: int = 4 * 1024 * 1024
    body_timeout_s: float = 30.0
    max_choices: int = 128
    drain_timeout_s: float = 60.0
    heartbeat_s: float = 10.0
    restart_wait_s: float = 30.0


@dataclass(frozen=True, kw_only=True)
class ToolsConfig:
    """How the model's messages are read: calls of tools, and reasoning.

    Attributes:
        parser: the notation of calls: "hermes" (Qwen's, too), "llama3", "mistral", "pythonic"
            (Gemma, Llama 4), "json", or "auto" (by the chat template; the log says which).
        reasoning: "think" (between <think> and </think>), "none", or "auto" (as the chat template
            has it).
    """

    parser: str = "auto"
    reasoning: str = "auto"


@dataclass(frozen=True, kw_only=True)
class LimitsConfig:
    """Rate limits (their numbers are in the key file), deadlines, and what overload gives up.

    Attributes:
        default_output_tokens: output that a request without max_tokens reserves of a token limit.
        redis_url: a Redis or Valkey server that keeps the rate limits of several servers
            together; where empty, each server keeps its own.
        redis_prefix: of all keys there.
        store_timeout_ms: an answer of that server that takes longer is a failure.
        when_store_fails: "local" (local_share of each limit on this server alone), "open" (no
            limits) or "closed" (no requests of limited keys).
        local_share: share of every limit; one over the number of servers is exact.
        default_timeout_s: deadline of requests that name none; 0 sets none.
        max_wait_s: a request that would wait longer is refused; 0 lets all wait.
        overload_wait_s: a request of normal priority that would wait longer than this means
            overload; 0 never does.
        overload_after_s: how long it must last for each step of what is given up, and of what is
            taken back.
        low_priority_max_tokens: under overload, output tokens of requests of low priority.
    """

    default_output_tokens: int = 512
    redis_url: str = field(default="", metadata={"secret": True})
    redis_prefix: str = "jaxserve"
    store_timeout_ms: float = 100.0
    when_store_fails: str = "local"
    local_share: float = 0.25
    default_timeout_s: float = 0.0
    max_wait_s: float = 0.0
    overload_wait_s: float = 0.0
    overload_after_s: float = 10.0
    low_priority_max_tokens: int = 128
