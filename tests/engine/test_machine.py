"""What "auto" means on each platform, what is refused there, and which devices are used."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import jax
import pytest
from jax.sharding import AbstractMesh

from jaxserve.config import KernelsConfig, WeightsConfig
from jaxserve.engine import machine
from jaxserve.engine.machine import model_options
from jaxserve.errors import ConfigError
from jaxserve.models.options import ModelOptions
from pallas_kernels import native


def pretend_native(monkeypatch: pytest.MonkeyPatch, reason: str | None) -> None:
    """As if the native library were there, or not for this reason."""
    library = Path("kernels.so") if reason is None else None
    found = native.Availability(library=library, reason=reason)
    monkeypatch.setattr(native, "load", lambda: found)


AUTO = WeightsConfig(), KernelsConfig()
TWO = AbstractMesh((1, 1, 2), ("data", "expert", "model"))


def test_auto_on_the_cpu_takes_the_native_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_native(monkeypatch, None)
    assert model_options(*AUTO, "cpu") == ModelOptions(
        dtype="float32", attention="cpu", matmul="cpu", layers="scanned"
    )
    half = model_options(WeightsConfig(dtype="float16"), KernelsConfig(), "cpu")
    assert (half.dtype, half.matmul, half.activations) == ("float16", "cpu", "float32")


def test_auto_on_the_cpu_without_a_native_library_is_xla_and_says_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pretend_native(monkeypatch, "no C++ compiler")
    with caplog.at_level(logging.INFO, "jaxserve"):
        options = model_options(*AUTO, "cpu")
    assert options == ModelOptions(
        dtype="float32", attention="xla", matmul="xla", layers="unrolled"
    )
    assert [record.message for record in caplog.records] == [
        "kernels.attention: xla (cpu: no C++ compiler; tpu: the platform is cpu; "
        "gpu: the platform is cpu)",
        "kernels.matmul: xla (cpu: no C++ compiler; gpu: the platform is cpu)",
    ]


def test_auto_on_a_tpu() -> None:
    assert model_options(*AUTO, "tpu") == ModelOptions(
        dtype="bfloat16", attention="tpu", matmul="xla", layers="scanned"
    )
    with pytest.raises(ConfigError, match=r"kernels\.attention=tpu .*: the platform is cpu"):
        model_options(WeightsConfig(), KernelsConfig(attention="tpu"), "cpu")


def test_auto_on_a_gpu_is_the_hopper_kernel_on_a_hopper_only(
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert model_options(*AUTO, "gpu", capability="9.0") == ModelOptions(
        dtype="bfloat16", attention="gpu", matmul="xla", layers="unrolled"
    )
    with caplog.at_level(logging.INFO, "jaxserve"):
        assert model_options(*AUTO, "gpu", capability="8.0").attention == "xla"
    assert any("compute capability 9.0, not 8.0" in message for message in caplog.messages)
    with pytest.raises(ConfigError, match=r"kernels\.attention=gpu .*: the platform is cpu"):
        model_options(WeightsConfig(), KernelsConfig(attention="gpu"), "cpu")


def test_auto_multiplies_int4_by_the_hopper_kernel_where_it_can(
    caplog: pytest.LogCaptureFixture,
) -> None:
    int4 = WeightsConfig(quantization="int4")
    with caplog.at_level(logging.INFO, "jaxserve"):
        options = model_options(int4, KernelsConfig(), "gpu", capability="9.0")
    assert (options.matmul, options.dtype, options.layers) == ("gpu", "bfloat16", "unrolled")
    assert not options.packed
    assert "kernels.matmul: gpu" in caplog.messages
    plain = model_options(int4, KernelsConfig(matmul="xla"), "gpu", capability="9.0")
    assert plain.matmul == "xla"
    shared = model_options(int4, KernelsConfig(), "gpu", TWO, "9.0")
    assert (shared.matmul, shared.tensor_parallel) == ("gpu", 2)


@pytest.mark.parametrize(
    ("weights", "platform", "capability", "reason"),
    [
        ({"quantization": "int4"}, "cpu", None, "the platform is cpu"),
        ({"quantization": "int4"}, "gpu", "8.0", "compute capability 9.0, not 8.0"),
        ({"quantization": "int8"}, "gpu", "9.0", "it reads int4 codes, and .* is int8"),
        ({"quantization": "int4", "dtype": "float16"}, "gpu", "9.0", "bfloat16, not float16"),
    ],
)
def test_int4_products_that_the_hopper_kernel_cannot_compute(
    weights: dict[str, str], platform: str, capability: str | None, reason: str
) -> None:
    asked = WeightsConfig(**weights), KernelsConfig(matmul="gpu")
    with pytest.raises(ConfigError, match=rf"kernels\.matmul=gpu cannot run here: .*{reason}"):
        model_options(*asked, platform, capability=capability)


def test_weights_that_the_native_matmul_does_not_read(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pretend_native(monkeypatch, None)
    weights = WeightsConfig(dtype="bfloat16")
    with caplog.at_level(logging.INFO, "jaxserve"):
        options = model_options(weights, KernelsConfig(), "cpu")
    assert (options.matmul, options.attention, options.layers) == ("xla", "cpu", "unrolled")
    reasons = "cpu: it does not read bfloat16 weights; gpu: the platform is cpu"
    assert f"kernels.matmul: xla ({reasons})" in caplog.messages
    with pytest.raises(ConfigError, match=r"kernels\.matmul=cpu cannot run here: .*bfloat16"):
        model_options(weights, KernelsConfig(matmul="cpu"), "cpu")


def test_a_mixture_of_experts_leaves_the_matmul_to_xla(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pretend_native(monkeypatch, None)
    with caplog.at_level(logging.INFO, "jaxserve"):
        options = model_options(*AUTO, "cpu", mixture=True)
    assert (options.matmul, options.attention, options.layers) == ("xla", "cpu", "unrolled")
    reason = "the native matmul has no product grouped by expert"
    assert f"kernels.matmul: xla (cpu: {reason}; gpu: the platform is cpu)" in caplog.messages
    with pytest.raises(ConfigError, match=rf"kernels\.matmul=cpu cannot run here: {reason}"):
        model_options(WeightsConfig(), KernelsConfig(matmul="cpu"), "cpu", mixture=True)


@pytest.mark.parametrize("kernel", ["attention", "matmul"])
def test_native_kernels_that_were_asked_for_and_cannot_run(
    monkeypatch: pytest.MonkeyPatch, kernel: str
) -> None:
    asked = KernelsConfig(**{kernel: "cpu"})
    with pytest.raises(ConfigError, match=rf"kernels\.{kernel}=cpu .*: the platform is gpu"):
        model_options(WeightsConfig(), asked, "gpu")
    pretend_native(monkeypatch, "the processor lacks avx2")
    with pytest.raises(ConfigError, match=rf"kernels\.{kernel}=cpu .*: the processor lacks avx2"):
        model_options(WeightsConfig(), asked, "cpu")


def test_what_was_asked_for_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_native(monkeypatch, None)
    asked = KernelsConfig(attention="xla", matmul="cpu", layers="unrolled")
    assert model_options(WeightsConfig(dtype="float16"), asked, "cpu") == ModelOptions(
        dtype="float16", attention="xla", matmul="cpu", layers="unrolled"
    )


def test_an_accelerator_that_is_not_used_is_an_error_unless_the_cpu_was_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = jax.config.jax_platforms
    planted = {"/dev/nvidia[0-9]*": ["/dev/nvidia0"]}
    monkeypatch.setattr(machine.glob, "glob", lambda pattern: planted.get(pattern, []))
    try:
        jax.config.update("jax_platforms", None)
        with pytest.raises(ConfigError, match=r"an accelerator \(/dev/nvidia0\).*JAX_PLATFORMS=cp"):
            machine.devices()
        jax.config.update("jax_platforms", "cpu")
        assert machine.devices() == jax.devices()
        jax.config.update("jax_platforms", None)
        planted.clear()
        assert machine.devices() == jax.devices()
    finally:
        jax.config.update("jax_platforms", before)


def test_a_platform_that_is_not_there_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def devices() -> list[Any]:
        raise RuntimeError("Unable to initialize backend 'tpu'")

    monkeypatch.setattr(jax, "devices", devices)
    with pytest.raises(ConfigError, match=r"no device: Unable .* 'tpu'; see JAX_PLATFORMS"):
        machine.devices()
