"""Accelerators for cost: list prices, power, and what bounds their speed, each with its source.

Figures are a chip's, a whole TPU7x for one. Prices are list prices, on demand, for a year's whole
hours less what anybody negotiates: give your own (`--price`). Power is the makers' where they
publish it; Google does not for TPUs, so theirs follow from ratios that it does publish, and are
marked as estimates.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One kind of chip.

    Attributes:
        name: as it is given on the command line; marks: what a benchmark's `device` has of it.
        price_per_hour: of one chip with its share of the host, in US dollars.
        price_source, price_date: who lists that, and when it was read.
        chip_watts: the most that the chip itself takes.
        system_watts: the most of one chip and its share of the host, fans and switches.
        watts_source: of both; watts_are_estimated: no maker says so.
        bandwidth: of the memory, bytes a second. flops: in bfloat16, dense, operations a second.
        memory_gb: of one chip.
        speed_source: of these three.
    """

    name: str
    marks: tuple[str, ...]
    price_per_hour: float
    price_source: str
    price_date: str
    chip_watts: float
    system_watts: float
    watts_source: str
    watts_are_estimated: bool = False
    bandwidth: float
    flops: float
    memory_gb: float
    speed_source: str


_TPU_PAGE = "cloud.google.com/tpu/pricing, on demand"
#: 9,216 chips in about 10 MW (Google Cloud Next 2025, Hot Chips 2025).
_TPU7X_WATTS = 10e6 / 9_216
#: Twice the peak FLOPs per watt of its predecessor (the same): FP8, 4,614 against 918 TFLOPs.
_V6E_WATTS = _TPU7X_WATTS * 2 * 918 / 4_614
#: 4.7 times the peak FLOPs at 1.67 times the FLOPs per watt (Google I/O 2024).
_V5E_WATTS = _V6E_WATTS * 1.67 / 4.7

DEVICES = {
    device.name: device
    for device in (
        Device(
            name="h100",
            marks=("h100",),
            price_per_hour=55.04 / 8,
            price_source="AWS EC2 p5.48xlarge (8 H100 SXM), us-east-1, on demand",
            price_date="2026-11-09",
            chip_watts=700,
            system_watts=10_200 / 8,
            watts_source="NVIDIA: H100 SXM data sheet; DGX H100, at most 10.2 kW for 8",
            bandwidth=3.35e12,
            flops=989e12,
            memory_gb=80,
            speed_source="NVIDIA, H100 SXM data sheet, without sparsity",
        ),
        Device(
            name="h200",
            marks=("h200",),
            price_per_hour=63.296 / 8,
            price_source="AWS EC2 p5en.48xlarge (8 H200 SXM), us-east-1, on demand",
            price_date="2026-08-06",
            chip_watts=700,
            system_watts=10_200 / 8,
            watts_source="NVIDIA: H200 SXM data sheet; DGX H200, at most 10.2 kW for 8",
            bandwidth=4.8e12,
            flops=989e12,
            memory_gb=141,
            speed_source="NVIDIA, H200 SXM data sheet, without sparsity",
        ),
        Device(
            name="v5e",
            marks=("v5 lite", "v5e"),
            price_per_hour=1.20,
            price_source="Google Cloud's SKUs by skypilot-catalog (catalogs/v8/gcp/vms.csv at "
            "006059e), us-central1, on demand",
            price_date="2026-11-26",
            chip_watts=_V5E_WATTS,
            system_watts=_V5E_WATTS,
            watts_source="from v6e: 4.7 times the FLOPs at 1.67 times the FLOPs per watt (Google)",
            watts_are_estimated=True,
            bandwidth=0.819e12,
            flops=197e12,
            memory_gb=16,
            speed_source="docs.cloud.google.com/tpu/docs/v5e",
        ),
        Device(
            name="v6e",
            marks=("v6 lite", "v6e"),
            price_per_hour=2.70,
            price_source=f"{_TPU_PAGE}, us-east5",
            price_date="2026-08-01",
            chip_watts=_V6E_WATTS,
            system_watts=_V6E_WATTS,
            watts_source="from TPU7x: half its peak FP8 FLOPs per watt (Google)",
            watts_are_estimated=True,
            bandwidth=1.64e12,
            flops=918e12,
            memory_gb=32,
            speed_source="docs.cloud.google.com/tpu/docs/v6e",
        ),
        Device(
            name="tpu7x",
            marks=("tpu7x", "tpu 7x", "v7x"),
            price_per_hour=12.00,
            price_source=f"{_TPU_PAGE}, us-central1",
            price_date="2026-08",
            chip_watts=_TPU7X_WATTS,
            system_watts=_TPU7X_WATTS,
            watts_source="a pod of 9,216 takes about 10 MW (Google, Hot Chips 2025)",
            watts_are_estimated=True,
            bandwidth=7.37e12,
            flops=2_307e12,
            memory_gb=192,
            speed_source="docs.cloud.google.com/tpu/docs/tpu7x",
        ),
    )
}


def device_in(text: str) -> Device | None:
    """The device that a benchmark's text speaks of; None where it is none of these."""
    lowered = text.lower()
    return next(
        (device for device in DEVICES.values() if any(m in lowered for m in device.marks)), None
    )
