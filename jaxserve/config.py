"""Configuration: frozen sections read from a YAML file, then the environment, then `--set`.

Part of the floor. This is the only module that reads the environment. A component is handed its
own section, never the whole `Config`. Later sources win: FILE.yaml < JAXSERVE_SECTION__KEY < --set
section.key=value. An unknown key fails and names the nearest one that exists.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from jaxserve.errors import ConfigError

ENV_PREFIX = "JAXSERVE_"


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
        dtype: "auto" (as the activations), "float32", "bfloat16" or "float16"; or "int8" or "fp8"
            (e4m3), with a scale for each position's key and value of each head.
    """

    page_size: int = 16
    num_pages: int = 0
    memory_bytes: int = 0
    memory_fraction: float = 0.5
    dtype: str = "auto"


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """What one step may hold.

    Attributes:
        max_rows: sequences that run at once.
        max_step_tokens: tokens of one step, decode rows and prefill chunks together.
        max_waiting: sequences that may wait; one more is refused.
        decode_steps: decode steps in one device call when nothing on the host is needed.
    """

    max_rows: int = 64
    max_step_tokens: int = 512
    max_waiting: int = 4096
    decode_steps: int = 4


@dataclass(frozen=True, kw_only=True)
class KernelsConfig:
    """Which implementation runs; "auto" takes the fastest that is there and logs which.

    Attributes:
        attention: "auto", "xla", "cpu" (native), "tpu" or "gpu" (Pallas).
        matmul: "auto", "xla", or "cpu" (native, packed weights).
        layers: "auto", "unrolled" or "scanned".
    """

    attention: str = "auto"
    matmul: str = "auto"
    layers: str = "auto"


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
    """

    compile_cache_dir: str = ""
    compile_threads: int = 0
    step_timeout_s: float = 120.0


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
    http: HttpConfig = HttpConfig()
    logging: LoggingConfig = LoggingConfig()


def load_config(
    file: Path | None = None,
    settings: Sequence[str] = (),
    environ: Mapping[str, str] | None = None,
) -> Config:
    """Reads the configuration from its three sources.

    Args:
        file: YAML file with sections as top-level keys.
        settings: "section.key=value" strings, as after `--set`.
        environ: the environment; os.environ where None.

    Raises:
        ConfigError: an unknown section or key, or a value of the wrong type or out of range.
    """
    environ = os.environ if environ is None else environ
    values: dict[str, dict[str, Any]] = {}
    for path, value in (*_from_file(file), *_from_environ(environ), *_from_settings(settings)):
        section, key = _known(path)
        values.setdefault(section, {})[key] = _convert(path, _field_type(section, key), value)
    if not values.get("model", {}).get("token") and environ.get("HF_TOKEN"):
        values.setdefault("model", {})["token"] = environ["HF_TOKEN"]
    config = Config(
        **{
            f.name: dataclasses.replace(getattr(_DEFAULT, f.name), **values.get(f.name, {}))
            for f in dataclasses.fields(Config)
        }
    )
    _check(config)
    return config


def describe(config: Config) -> str:
    """The resolved configuration as YAML, secrets blanked out."""
    resolved: dict[str, dict[str, Any]] = {}
    for section in dataclasses.fields(config):
        values = getattr(config, section.name)
        resolved[section.name] = {
            f.name: "***" if f.metadata.get("secret") and getattr(values, f.name)
            else _plain(getattr(values, f.name))
            for f in dataclasses.fields(values)
        }  # fmt: skip
    return yaml.safe_dump(resolved, sort_keys=False)


_DEFAULT = Config()
_KIND_NAMES = {bool: "true or false", int: "an integer", float: "a number", str: "text"}
_CHOICES: dict[str, tuple[str, ...]] = {
    "model.format": ("auto", "hf", "gguf", "orbax"),
    "weights.dtype": ("auto", "float32", "bfloat16", "float16"),
    "weights.quantization": ("none", "int8", "int4", "fp8"),
    "cache.dtype": ("auto", "float32", "bfloat16", "float16", "int8", "fp8"),
    "kernels.attention": ("auto", "xla", "cpu", "tpu", "gpu"),
    "kernels.matmul": ("auto", "xla", "cpu"),
    "kernels.layers": ("auto", "unrolled", "scanned"),
    "logging.level": ("debug", "info", "warning", "error"),
}
_BOUNDS: dict[str, tuple[float, float]] = {
    "model.max_context": (0, 2**31 - 1),
    "cache.page_size": (1, 1024),
    "cache.num_pages": (0, 2**31 - 1),
    "cache.memory_bytes": (0, 2**50),
    "cache.memory_fraction": (0.01, 0.95),
    "scheduler.max_rows": (1, 4096),
    "scheduler.max_step_tokens": (1, 65536),
    "scheduler.max_waiting": (0, 10_000_000),
    "scheduler.decode_steps": (1, 64),
    "parallel.data": (1, 4096),
    "parallel.expert": (1, 4096),
    "parallel.model": (0, 4096),
    "parallel.hosts": (1, 4096),
    "parallel.host": (0, 4095),
    "parallel.connect_timeout_s": (1, 86400),
    "parallel.lost_after_s": (0.5, 25),
    "engine.compile_threads": (0, 256),
    "engine.step_timeout_s": (1, 86400),
    "http.port": (0, 65535),
    "http.workers": (1, 64),
    "http.max_body_bytes": (1024, 2**31),
    "http.body_timeout_s": (0.1, 86400),
    "http.max_choices": (1, 1024),
    "http.drain_timeout_s": (0, 86400),
    "http.heartbeat_s": (0.1, 3600),
}


def _from_file(file: Path | None) -> list[tuple[str, Any]]:
    if file is None:
        return []
    try:
        document = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"cannot read the configuration file {file}: {reason}") from error
    if document is None:
        return []
    if not isinstance(document, dict):
        raise ConfigError(f"{file} must be a mapping of sections, not {type(document).__name__}")
    pairs: list[tuple[str, Any]] = []
    for section, values in document.items():
        if not isinstance(values, dict):
            raise ConfigError(f"section {section!r} in {file} must be a mapping of keys to values")
        pairs += [(f"{section}.{key}", value) for key, value in values.items()]
    return pairs


def _from_environ(environ: Mapping[str, str]) -> list[tuple[str, Any]]:
    pairs = []
    for name, value in sorted(environ.items()):
        if name.startswith(ENV_PREFIX) and "__" in name:
            section, _, key = name.removeprefix(ENV_PREFIX).lower().partition("__")
            pairs.append((f"{section}.{key}", value))
    return pairs


def _from_settings(settings: Sequence[str]) -> list[tuple[str, Any]]:
    pairs = []
    for setting in settings:
        path, equals, value = setting.partition("=")
        if not equals:
            raise ConfigError(f"--set takes section.key=value, got {setting!r}")
        pairs.append((path.strip(), value))
    return pairs


def _known(path: str) -> tuple[str, str]:
    known = [
        f"{section.name}.{key.name}"
        for section in dataclasses.fields(Config)
        for key in dataclasses.fields(getattr(_DEFAULT, section.name))
    ]
    if path not in known:
        near = difflib.get_close_matches(path, known, n=1, cutoff=0.0)
        raise ConfigError(f"unknown configuration key {path!r}; the nearest is {near[0]!r}")
    section, _, key = path.partition(".")
    return section, key


def _field_type(section: str, key: str) -> Any:
    return typing.get_type_hints(type(getattr(_DEFAULT, section)))[key]


def _convert(path: str, kind: Any, value: Any) -> Any:
    if typing.get_origin(kind) is tuple:
        items = value.split(",") if isinstance(value, str) else value
        if not isinstance(items, list | tuple):
            raise ConfigError(f"{path} takes a list, got {value!r}")
        return tuple(str(item).strip() for item in items if str(item).strip())
    if isinstance(kind, types.UnionType):
        raise TypeError(f"{path}: union types are not supported in configuration")
    try:
        if kind is bool:
            return _to_bool(value)
        if kind is str:
            if not isinstance(value, str | int | float):
                raise ValueError
            return str(value)
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise ValueError
        if kind is int and isinstance(value, float) and not value.is_integer():
            raise ValueError
        return kind(value)
    except (ValueError, OverflowError):
        raise ConfigError(f"{path} takes {_KIND_NAMES[kind]}, got {value!r}") from None


def _to_bool(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if str(value).lower() not in words:
        raise ValueError
    return words[str(value).lower()]


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _check(config: Config) -> None:
    for path, choices in _CHOICES.items():
        section, _, key = path.partition(".")
        value = getattr(getattr(config, section), key)
        if value not in choices:
            raise ConfigError(f"{path} must be one of {', '.join(choices)}, got {value!r}")
    for path, (low, high) in _BOUNDS.items():
        section, _, key = path.partition(".")
        value = getattr(getattr(config, section), key)
        if not low <= value <= high:  # also refuses NaN
            raise ConfigError(f"{path} must be between {low} and {high}, got {value}")
    if bool(config.http.tls_certificate) != bool(config.http.tls_key):
        raise ConfigError("http.tls_certificate and http.tls_key go together: give both or none")
    _check_hosts(config.parallel)
    if config.scheduler.max_step_tokens < config.scheduler.max_rows:
        raise ConfigError(
            f"scheduler.max_step_tokens ({config.scheduler.max_step_tokens}) must be at least "
            f"scheduler.max_rows ({config.scheduler.max_rows}): each decoding row needs a token"
        )


def _check_hosts(config: ParallelConfig) -> None:
    if config.host >= config.hosts:
        raise ConfigError(
            f"parallel.host must be below parallel.hosts={config.hosts}, got {config.host}"
        )
    if bool(config.coordinator) != (config.hosts > 1):
        raise ConfigError(
            f"parallel.coordinator={config.coordinator!r} and parallel.hosts={config.hosts} do not "
            "go together: several hosts need the address of host 0, one host needs none"
        )
    host, _, port = config.coordinator.rpartition(":")
    if config.coordinator and not (host and port.isdecimal() and 0 < int(port) < 65536):
        raise ConfigError(f"parallel.coordinator must be HOST:PORT, got {config.coordinator!r}")
