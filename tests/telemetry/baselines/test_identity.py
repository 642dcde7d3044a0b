"""What a baseline is valid for: which changes are deployments, which are none."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest

from jaxserve.config import (
    Config,
    EmbeddingsConfig,
    EngineConfig,
    HttpConfig,
    LoraConfig,
    ModelConfig,
    SchedulerConfig,
    WeightsConfig,
)
from jaxserve.telemetry.baselines.identity import (
    CONFIGURED,
    DEPLOYED,
    Deployment,
    content,
    device_name,
)
from jaxserve.types import DeviceInfo


def of(config: Config | None = None, release: str = "1", **more) -> Deployment:
    return dataclasses.replace(Deployment.of(config or Config(), lambda name: release), **more)


@pytest.mark.parametrize(
    "config",
    [
        Config(weights=WeightsConfig(quantization="int8")),
        Config(scheduler=SchedulerConfig(max_rows=32)),
        Config(model=ModelConfig(max_context=512)),
        Config(engine=EngineConfig(batch_invariant=True)),
        Config(http=HttpConfig(workers=2)),
        Config(lora=LoraConfig(classes=("8x4",))),
        Config(embeddings=EmbeddingsConfig(embed_tokens=512)),
    ],
)
def test_settings_that_decide_speed_are_another_version(config: Config):
    before, now = of(), of(config)
    assert now.version != before.version
    assert [kind for kind, _ in now.changes(before)] == [CONFIGURED]


@pytest.mark.parametrize(
    "config",
    [
        Config(weights=WeightsConfig(cache_dir="/elsewhere")),
        Config(model=ModelConfig(served_name="other", token="secret")),
        Config(engine=EngineConfig(max_restarts=3, compile_cache_dir="/x")),
        Config(http=HttpConfig(port=1)),
        Config(lora=LoraConfig(adapters=("a=/b",), root="/c")),
        Config(embeddings=EmbeddingsConfig(name="e")),
    ],
)
def test_names_places_and_limits_are_not(config: Config):
    assert of(config).version == of().version
    assert "secret" not in str(of(config))


def test_what_has_changed_is_told():
    before = of(device="1 x a")
    now = of(Config(scheduler=SchedulerConfig(max_rows=32)), "2", model="new", device="2 x b")
    (deployed, first), (configured, second) = now.changes(before)
    assert (deployed, configured) == (DEPLOYED, CONFIGURED)
    assert "jaxserve from 1 to 2" in first and "the model's files" in first
    assert first.endswith("device from 1 x a to 2 x b")
    assert second == "scheduler.max_rows from 64 to 32"
    assert list(now.changes(now)) == []


def test_many_changes_are_told_in_short():
    before = of(settings={f"a.{n}": "1" for n in range(20)})
    ((_, told),) = of(settings={}).changes(before)
    assert told.startswith("a.0 from 1 to nothing") and told.endswith("and 12 more")


def test_it_is_read_as_it_was_written():
    before = of(device="1 x a")
    assert Deployment.read(dataclasses.asdict(before)) == before
    for broken in ({}, {"software": 3, "model": "", "settings": {}, "device": ""}):
        with pytest.raises((KeyError, TypeError, ValueError)):
            Deployment.read(broken)


def test_content_of_a_model(tmp_path: Path):
    model, copy = tmp_path / "model", tmp_path / "copy"
    for place in (model, copy):
        (place / ".cache").mkdir(parents=True)
        (place / "weights").write_bytes(bytes(1_000_000))
        (place / "small").write_bytes(b"x")
        (place / ".cache" / "when").write_text(str(place))
    assert content(str(model)) == content(str(copy))  # wherever it is, whenever it came
    os.utime(copy / "weights", (0, 0))
    assert content(str(model)) == content(str(copy))
    found = {content(str(model))}
    with (copy / "weights").open("r+b") as file:
        for at in (0, 999_999):
            file.seek(at)
            file.write(b"y")
            file.flush()
            found.add(content(str(copy)))
    (copy / "small").write_bytes(b"z")
    found.add(content(str(copy)))
    (copy / "small").rename(copy / "other")
    found.add(content(str(copy)))
    found |= {content(str(model / "weights")), content("org/name"), content("org/other")}
    assert len(found) == 8


def test_tuned_weights_are_another_content(tmp_path: Path):
    file = tmp_path / "weights"
    file.write_bytes(os.urandom(300_000))
    before = content(str(file))
    tuned = bytearray(file.read_bytes())
    for at in range(0, len(tuned), 1000):
        tuned[at] ^= 1
    file.write_bytes(tuned)
    assert content(str(file)) != before


def test_devices_are_as_the_engine_says(tmp_path: Path):
    assert device_name(DeviceInfo(kind="NVIDIA H200", count=8)) == "8 x NVIDIA H200"
    assert device_name(None) == "unknown"
    assert device_name(DeviceInfo(kind="cpu"), tmp_path) == "1 x cpu"
    (tmp_path / "proc").mkdir()
    lines = "processor: 0\nmodel name\t: A 9000\nprocessor: 1\nmodel name\t: A 9000\n"
    (tmp_path / "proc" / "cpuinfo").write_text(lines)
    assert device_name(DeviceInfo(kind="cpu"), tmp_path) == "1 x cpu (2 x A 9000)"
