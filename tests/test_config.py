"""Configuration: precedence of its sources, wrong keys and values, what is printed."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml

from jaxserve.config import Config
from jaxserve.errors import ConfigError
from jaxserve.settings import describe, load_config


def write(directory: Path, text: str) -> Path:
    file = directory / "config.yaml"
    file.write_text(text)
    return file


def test_without_sources_all_is_default() -> None:
    assert load_config(environ={}) == Config()


def test_later_sources_win(tmp_path: Path) -> None:
    file = write(tmp_path, "http: {port: 1, workers: 2, host: a}\nscheduler: {max_rows: 8}\n")
    environ = {"JAXSERVE_HTTP__PORT": "10", "JAXSERVE_HTTP__WORKERS": "20"}
    config = load_config(file, ["http.port=100"], environ)
    assert (config.http.port, config.http.workers, config.http.host) == (100, 20, "a")
    assert config.scheduler.max_rows == 8
    assert config.cache == Config().cache


def test_the_last_setting_of_a_key_wins() -> None:
    assert load_config(settings=["http.port=1", "http.port=2"], environ={}).http.port == 2


def test_values_take_their_fields_types(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        "http: {cors_origins: [https://a, 'https://b']}\ncache: {memory_fraction: 0.25}\n"
        "model: {revision: 7}\n",
    )
    config = load_config(file, ["http.heartbeat_s=3", "cache.num_pages=12"], {})
    assert config.http.cors_origins == ("https://a", "https://b")
    assert (config.cache.memory_fraction, config.cache.num_pages) == (0.25, 12)
    assert config.model.revision == "7"
    assert config.http.heartbeat_s == 3.0 and isinstance(config.http.heartbeat_s, float)
    listed = load_config(settings=["http.cors_origins=https://a, https://b,"], environ={})
    assert listed.http.cors_origins == ("https://a", "https://b")


def test_a_value_may_hold_an_equals_sign() -> None:
    assert load_config(settings=["model.path=a=b"], environ={}).model.path == "a=b"


def test_other_variables_of_the_environment_are_ignored() -> None:
    environ = {"JAXSERVE_HOME": "x", "PATH": "y", "HTTP__PORT": "1"}
    assert load_config(environ=environ) == Config()


def test_the_hubs_own_variable_gives_the_token_unless_another_was_given() -> None:
    assert load_config(environ={"HF_TOKEN": "hub"}).model.token == "hub"
    environ = {"HF_TOKEN": "hub", "JAXSERVE_MODEL__TOKEN": "own"}
    assert load_config(environ=environ).model.token == "own"


@pytest.mark.parametrize(
    ("setting", "nearest"),
    [
        ("scheduler.max_row=3", "scheduler.max_rows"),
        ("sheduler.max_rows=3", "scheduler.max_rows"),
        ("http.prot=3", "http.port"),
        ("port=3", "http.port"),
        ("model.chat-template=x", "model.chat_template"),
    ],
)
def test_an_unknown_key_names_the_nearest(setting: str, nearest: str) -> None:
    key = setting.partition("=")[0]
    with pytest.raises(ConfigError, match=f"unknown .* {key!r}; the nearest is {nearest!r}"):
        load_config(settings=[setting], environ={})


def test_unknown_keys_fail_wherever_they_come_from(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'http\.prot'"):
        load_config(write(tmp_path, "http: {prot: 1}\n"), environ={})
    with pytest.raises(ConfigError, match=r"'http\.prot'"):
        load_config(environ={"JAXSERVE_HTTP__PROT": "1"})


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("http.port=eighty", "http.port takes an integer, got 'eighty'"),
        ("http.port=80.5", "http.port takes an integer, got '80.5'"),
        ("cache.memory_fraction=half", "takes a number, got 'half'"),
        ("http.port=65536", "http.port must be between 0 and 65535, got 65536"),
        ("scheduler.max_rows=0", "must be between 1 and 4096, got 0"),
        ("cache.memory_fraction=nan", "must be between 0.01 and 0.95, got nan"),
        ("weights.dtype=int4", "must be one of auto, float32, bfloat16, float16, got 'int4'"),
        ("logging.level=loud", "must be one of debug, info, warning, error"),
        ("http.tls_key=x", "go together: give both or none"),
        ("scheduler.max_step_tokens=63", r"\(63\) must be at least scheduler.max_rows \(64\)"),
        ("http.port", "--set takes section.key=value, got 'http.port'"),
    ],
)
def test_wrong_values_are_named_with_their_limit(setting: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(settings=[setting], environ={})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["coordinator=a:1"], "'a:1' and parallel.hosts=1 do not go together"),
        (["hosts=2"], "parallel.coordinator='' and parallel.hosts=2 do not go together"),
        (["coordinator=a:1", "hosts=2", "host=2"], "host must be below parallel.hosts=2, got 2"),
        (["coordinator=a", "hosts=2"], "must be HOST:PORT, got 'a'"),
        (["coordinator=a:b", "hosts=2"], "must be HOST:PORT, got 'a:b'"),
        (["coordinator=a:65536", "hosts=2"], "must be HOST:PORT, got 'a:65536'"),
        (["coordinator=:1", "hosts=2"], "must be HOST:PORT, got ':1'"),
        (["lost_after_s=26"], "lost_after_s must be between 0.5 and 25, got 26"),
    ],
)
def test_several_hosts_are_told_of_each_other(settings: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(settings=[f"parallel.{setting}" for setting in settings], environ={})


def test_an_address_of_several_hosts_may_be_ipv6() -> None:
    settings = ["parallel.coordinator=[::1]:9000", "parallel.hosts=2", "parallel.host=1"]
    assert load_config(settings=settings, environ={}).parallel.host == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("http: {port: true}", "http.port takes an integer, got True"),
        ("http: {port: 80.5}", "http.port takes an integer, got 80.5"),
        ("http: {port: [1]}", r"http.port takes an integer, got \[1\]"),
        ("http: {port: null}", "http.port takes an integer, got None"),
        ("http: {port: .inf}", "http.port takes an integer, got inf"),
        ("http: {cors_origins: 3}", "http.cors_origins takes a list, got 3"),
        ("model: {path: {a: 1}}", "model.path takes text"),
        ("http: 3", "section 'http' .* must be a mapping"),
        ("- 1", "must be a mapping of sections, not list"),
        ("a: [", "cannot read the configuration file"),
    ],
)
def test_wrong_files_are_explained(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(write(tmp_path, text), environ={})


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the configuration file .*nowhere\.yaml"):
        load_config(tmp_path / "nowhere.yaml", environ={})
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot read"):
        load_config(tmp_path / "binary.yaml", environ={})


def test_an_empty_file_changes_nothing(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, ""), environ={}) == Config()


def test_secrets_are_never_printed() -> None:
    config = load_config(settings=["model.token=hf_very_secret"], environ={})
    printed = describe(config)
    assert "hf_very_secret" not in printed
    assert yaml.safe_load(printed)["model"]["token"] == "***"
    assert yaml.safe_load(describe(Config()))["model"]["token"] == ""


def test_what_is_printed_can_be_read_back(tmp_path: Path) -> None:
    config = load_config(settings=["http.cors_origins=https://a", "cache.num_pages=9"], environ={})
    assert load_config(write(tmp_path, describe(config)), environ={}) == config


def test_sections_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().http.port = 1  # type: ignore[misc]
