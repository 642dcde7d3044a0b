"""Slices of chips by name."""

from __future__ import annotations

import pytest

from jaxserve.device.chips import CHIPS, device_info, parse_slice
from jaxserve.errors import ConfigError
from jaxserve.types import DeviceInfo


@pytest.mark.parametrize(
    ("text", "name", "num_devices"),
    [
        ("v5e:4x4", "v5e:4x4", 16),
        ("V6E:1x1", "v6e:1x1", 1),
        ("tpu7x:2x2x1", "tpu7x:2x2x1", 8),
        ("h100", "h100:1", 1),
        ("h200:2x8", "h200:2x8", 16),
    ],
)
def test_slices(text: str, name: str, num_devices: int) -> None:
    found = parse_slice(text)
    assert (found.name, found.num_devices) == (name, num_devices)
    assert found.memory.free_bytes == found.memory.total_bytes == found.chip.memory_bytes


@pytest.mark.parametrize("text", ["", "x5", "v5e:4x", "v5e:0", "v5e:-1", "v5e:99999", "v5e:²"])
def test_what_is_no_slice(text: str) -> None:
    with pytest.raises(ConfigError, match="no known chip|no topology"):
        parse_slice(text)


def test_figures_are_a_device_s() -> None:
    """A TPU7x chip is two devices: 192 GiB, less what is kept back, and 2,307 TFLOP/s together."""
    chip = CHIPS["tpu7x"]
    assert 189 << 30 < chip.devices * chip.memory_bytes < 192 << 30
    assert chip.devices * chip.flops == pytest.approx(2307e12)


@pytest.mark.parametrize(
    ("kind", "chip"),
    [("TPU v5 lite", "v5e"), ("TPU v6 lite", "v6e"), ("NVIDIA H100 80GB HBM3", "h100")],
)
def test_devices_by_jaxs_name(kind: str, chip: str) -> None:
    """A test of tests/compile asks libtpu itself what it calls its chips."""
    found = device_info(kind, 4)
    assert (found.kind, found.count) == (kind, 4)
    assert found.flops_per_s == CHIPS[chip].flops
    assert found.bytes_per_s == CHIPS[chip].bandwidth


@pytest.mark.parametrize("kind", ["cpu", "NVIDIA H100 PCIe", "NVIDIA H200 NVL", "TPU v9"])
def test_of_other_devices_nothing_is_claimed(kind: str) -> None:
    assert device_info(kind, 2) == DeviceInfo(kind=kind, count=2)
