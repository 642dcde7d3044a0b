"""Reads the configuration from a YAML file, then the environment, then `--set`.

Part of the floor. This is the only module that reads the environment. Later sources win:
FILE.yaml < JAXSERVE_SECTION__KEY < --set section.key=value. An unknown key fails and names the
nearest one that exists.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from jaxserve.config import Config, ParallelConfig
from jaxserve.config_values import BOUNDS, CHOICES
from jaxserve.errors import ConfigError

ENV_PREFIX = "JAXSERVE_"
_DEFAULT = Config()
_KIND_NAMES = {bool: "true or false", int: "an integer", float: "a number", str: "text"}


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
    return yaml.safe_dump(without_secrets(config), sort_keys=False)


def without_secrets(config: Config) -> dict[str, dict[str, Any]]:
    """The resolved configuration as plain values, secrets blanked out."""
    resolved: dict[str, dict[str, Any]] = {}
    for section in dataclasses.fields(config):
        values = getattr(config, section.name)
        resolved[section.name] = {
            f.name: "***" if f.metadata.get("secret") and getattr(values, f.name)
            else _plain(getattr(values, f.name))
            for f in dataclasses.fields(values)
        }  # fmt: skip
    return resolved


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
    for path, choices in CHOICES.items():
        section, _, key = path.partition(".")
        value = getattr(getattr(config, section), key)
        if value not in choices:
            raise ConfigError(f"{path} must be one of {', '.join(choices)}, got {value!r}")
    for path, (low, high) in BOUNDS.items():
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
    if config.scheduler.input_token_price > config.scheduler.output_token_price:
        raise ConfigError(
            f"scheduler.input_token_price ({config.scheduler.input_token_price}) must not be above "
            f"scheduler.output_token_price ({config.scheduler.output_token_price}): the bound of "
            "fairness would not hold"
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


def settings_of(overrides: Mapping[str, object]) -> list[str]:
    """Keyword arguments as `load_config` takes settings, "SECTION.KEY=VALUE".

    Args:
        overrides: by key, or by section and key with "__" between them.

    Raises:
        ConfigError: several sections have a key.
    """
    return [f"{_setting_path(name)}={_setting_text(value)}" for name, value in overrides.items()]


def _setting_path(name: str) -> str:
    """The configuration key that a keyword argument means.

    Raises:
        ConfigError: several sections have it.
    """
    if "__" in name:
        return name.replace("__", ".", 1)
    sections = [
        section.name
        for section in dataclasses.fields(Config)
        if any(key.name == name for key in dataclasses.fields(getattr(Config(), section.name)))
    ]
    if len(sections) > 1:
        choices = " or ".join(f"{section}__{name}" for section in sections)
        raise ConfigError(f"{name!r} is a key of several sections; write {choices}")
    return f"{sections[0]}.{name}" if sections else name


def _setting_text(value: object) -> str:
    if isinstance(value, list | tuple):
        return ",".join(map(str, value))
    return os.fspath(value) if isinstance(value, os.PathLike) else str(value)
