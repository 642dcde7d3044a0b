"""Looks at the settings of tracing; needs no OpenTelemetry, so that a start-up can afford it."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from urllib.parse import urlsplit

from jaxserve.config_observing import TracingConfig
from jaxserve.errors import ConfigError

_TRACES_PATH = "/v1/traces"


def check_tracing(config: TracingConfig) -> None:
    """Looks at the settings of tracing.

    Raises:
        ConfigError: one cannot be used, or what they need is not installed.
    """
    pairs("tracing.attributes", config.attributes)
    pairs("tracing.headers", config.headers, secret=True)
    if not config.endpoint:
        return
    url = urlsplit(config.endpoint)
    try:
        port = url.port
    except ValueError:
        port = -1
    if url.scheme not in ("http", "https") or not url.hostname or port == -1:
        raise ConfigError(
            f"tracing.endpoint must be http://HOST:PORT or https://HOST:PORT of an OTLP collector, "
            f"got {config.endpoint!r}"
        )
    if url.username or url.password:
        raise ConfigError("tracing.endpoint must hold no password; send it in tracing.headers")
    if config.protocol == "grpc" and url.path not in ("", "/"):
        raise ConfigError(
            f"tracing.endpoint={config.endpoint!r} has a path, which gRPC has not: leave it out, "
            "or set tracing.protocol=http"
        )
    needed = f"opentelemetry.exporter.otlp.proto.{config.protocol}"
    try:
        found = find_spec(needed)
    except ModuleNotFoundError:
        found = None
    if found is None:
        raise ConfigError(
            f"tracing needs the package opentelemetry-exporter-otlp-proto-{config.protocol}: "
            "install it, or set tracing.endpoint to nothing"
        )


def pairs(key: str, items: Sequence[str], *, secret: bool = False) -> dict[str, str]:
    """Settings of the kind "name=value".

    Args:
        key: of the setting, for the error.
        secret: whether the error must not repeat them.

    Raises:
        ConfigError: one is not of this kind.
    """
    found = {}
    for number, item in enumerate(items, 1):
        name, equals, value = item.partition("=")
        if not equals or not name.strip() or not (name + value).isprintable():
            shown = f"number {number} is not" if secret else f"got {item!r}"
            raise ConfigError(f"{key} takes a list of name=value; {shown}")
        found[name.strip()] = value.strip()
    return found


def http_endpoint(endpoint: str) -> str:
    """Where spans are sent over HTTP: the standard's path, unless there is another."""
    if urlsplit(endpoint).path in ("", "/"):
        return endpoint.rstrip("/") + _TRACES_PATH
    return endpoint
