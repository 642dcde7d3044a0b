"""What a million tokens cost: sums that can be done by hand, and estimates by the roofline."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from jaxserve.device.chips import CHIPS
from jaxserve.errors import ConfigError
from jaxserve.metering.devices import DEVICES, device_in
from jaxserve.metering.tco import HOURS_A_YEAR, Prices, compare, cost_of, read_rates, scaled

SERVE: dict[str, Any] = {
    "benchmark": "serve",
    "prompt_tokens_per_s": 3_000.0,
    "output_tokens_per_s": 1_000.0,
}
ENGINE: dict[str, Any] = {
    "benchmark": "engine",
    "device": "2 x NVIDIA H100 80GB HBM3 (gpu)",
    "read_bytes_per_s": 6e12,
    "matmul_flops_per_s": 1.5e15,
    "cases": [
        {"kind": "decode", "tokens_per_s": 100.0, "mfu": 0.01, "mbu": 0.6},
        {"kind": "decode", "tokens_per_s": 2_000.0, "mfu": 0.1, "mbu": 0.5},
        {"kind": "prefill", "tokens_per_s": 20_000.0, "mfu": 0.4, "mbu": 0.1},
    ],
}


def prices(**values) -> Prices:
    """What is bought and rented."""
    return Prices(**({"rent": {}, "capital": {}, "watts": {}} | values))


def test_rented_at_the_list_price():
    cost = cost_of(read_rates(SERVE, "h100"), prices())
    assert (cost.device, cost.chips, cost.estimated) == ("h100", 1, False)
    assert cost.hardware_per_hour == pytest.approx(6.88)
    assert cost.energy_per_hour == cost.people_per_hour == 0
    assert cost.per_million_output == pytest.approx(6.88 / 3.6)
    assert cost.per_million == pytest.approx(6.88 / 3.6 / 4)
    assert cost.per_million_input_alone is None
    assert "p5.48xlarge" in cost.price_note and "2026" in cost.price_note


def test_bought_with_energy_people_and_carbon():
    cost = cost_of(
        read_rates(SERVE, "h100", chips=8),
        prices(
            capital={"h100": HOURS_A_YEAR * 5},
            years=5.0,
            watts={"h100": 1_000.0},
            energy_per_kwh=0.25,
            pue=1.5,
            people_per_month=HOURS_A_YEAR / 12 * 7,
            carbon_g_per_kwh=400.0,
            utilisation=0.5,
        ),
    )
    assert cost.hardware_per_hour == pytest.approx(8)
    assert cost.energy_per_hour == pytest.approx(8 * 1.5 * 0.25)  # 12 kWh
    assert cost.people_per_hour == pytest.approx(7)
    assert cost.per_hour == pytest.approx(18)
    tokens = 0.5 * 3_600 * 4_000
    assert cost.per_million == pytest.approx(18 / tokens * 1e6)
    assert cost.energy_j_per_token == pytest.approx(12 * 3.6e6 / tokens)
    assert cost.carbon_g_per_million == pytest.approx(12 * 400 / tokens * 1e6)


def test_power_follows_the_load_and_is_in_the_rent():
    rates = read_rates(SERVE, "h100")
    full, half = (cost_of(rates, prices(utilisation=share)) for share in (1.0, 0.5))
    assert full.watts == pytest.approx(1_275)
    assert half.watts == pytest.approx(1_275 * 0.65)
    assert full.energy_per_hour == 0 and full.energy_j_per_token > 0
    bought = cost_of(rates, prices(capital={"h100": 30_000}))
    assert bought.energy_per_hour == pytest.approx(1.275 * 1.2 * 0.10)


def test_an_engines_prefill_and_decode_are_priced_apart():
    rates = read_rates(ENGINE, input_ratio=10.0)
    assert (rates.device_name, rates.chips) == ("h100", 2)
    # A second of decoding gives 2,000 tokens, for which a second of prefill brings 20,000.
    assert rates.output_tokens_per_s == pytest.approx(1_000)
    assert rates.input_tokens_per_s == pytest.approx(10_000)
    cost = cost_of(rates, prices(rent={"h100": 3.6}))
    assert cost.per_million_output_alone == pytest.approx(1.0)
    assert cost.per_million_input_alone == pytest.approx(0.1)
    # Both parts, at their own price, are the whole.
    assert cost.per_million_output == pytest.approx(1.0 + 10 * 0.1)


def test_estimates_are_scaled_by_what_bounds_each_part():
    rates = read_rates(ENGINE, input_ratio=10.0)
    other = scaled(rates, DEVICES["h200"])
    assert other is not None
    assert other.decode_tokens_per_s == pytest.approx(2_000 * 4.8 / 3.35)  # bound by memory
    assert other.prefill_tokens_per_s == pytest.approx(20_000)  # bound by the same FLOPs
    v5e = scaled(rates, DEVICES["v5e"])
    assert v5e is not None
    assert v5e.prefill_tokens_per_s == pytest.approx(20_000 * 197 / 989)
    # 75 TFLOP/s and 1.5 TB/s a chip here: there bound by memory too.
    assert v5e.decode_tokens_per_s == pytest.approx(2_000 * 0.819 / 3.35)
    assert scaled(rates, DEVICES["h100"]) == dataclasses.replace(
        rates, prefill_work=(0.0, 0.0), decode_work=(0.0, 0.0)
    )


def test_another_limit_may_bind_elsewhere():
    record = SERVE | {"flops_per_s": 400e12, "bytes_per_s": 2e12}  # 40% and 60% of an H100
    rates = read_rates(record, "h100")
    v5e = scaled(rates, DEVICES["v5e"])  # there FLOPs are scarcer: twice the peak, not 2.4 times
    assert v5e is not None
    assert v5e.output_tokens_per_s == pytest.approx(1_000 * (2 / 3.35) / max(400 / 197, 2 / 0.819))
    uncounted = scaled(read_rates(SERVE, "h100"), DEVICES["v6e"])
    assert uncounted is not None  # the more careful of both ratios
    assert uncounted.output_tokens_per_s == pytest.approx(1_000 * 1.64 / 3.35)


def test_comparison_marks_what_is_not_measured():
    costs = compare(read_rates(SERVE, "h100"), prices(), list(DEVICES))
    assert [(cost.device, cost.estimated) for cost in costs] == [
        ("h100", False),
        ("h200", True),
        ("v5e", True),
        ("v6e", True),
        ("tpu7x", True),
    ]
    unknown = read_rates(SERVE, "abacus")
    (alone,) = compare(unknown, prices(rent={"abacus": 1.0}), ["h100"])  # nothing to scale by
    assert (alone.device, alone.watts) == ("abacus", 0)


def test_a_machine_of_no_table_is_scaled_by_its_measured_limits():
    record = ENGINE | {"device": "1 x cpu (cpu)", "read_bytes_per_s": 33.5e9}
    record["matmul_flops_per_s"] = 98.9e9
    rates = read_rates(record)
    assert (rates.device, rates.device_name) == (None, "cpu (cpu)")
    other = scaled(rates, DEVICES["h100"])
    assert other is not None
    assert other.decode_tokens_per_s == pytest.approx(2_000 * 100)
    with pytest.raises(ConfigError, match="--price 'cpu"):
        cost_of(rates, prices())


@pytest.mark.parametrize(
    ("said", "name", "chips"),
    [
        ("1 x NVIDIA H200 (gpu)", "h200", 1),
        ("4 x TPU v5 lite (tpu)", "v5e", 4),
        ("8 x TPU v6 lite (tpu)", "v6e", 8),
        ("8 x TPU7x (tpu)", "tpu7x", 4),  # JAX sees half a chip as a device
    ],
)
def test_devices_are_known_as_jax_calls_them(said: str, name: str, chips: int):
    rates = read_rates(ENGINE | {"device": said})
    assert (rates.device_name, rates.chips) == (name, chips)


@pytest.mark.parametrize(
    "record",
    [
        {"benchmark": "kernels"},
        {"benchmark": "serve"},
        {"benchmark": "engine", "cases": []},
        SERVE | {"output_tokens_per_s": 0},
        SERVE | {"output_tokens_per_s": None},
    ],
)
def test_a_result_that_cannot_be_used_is_refused(record: dict):
    with pytest.raises(ConfigError):
        read_rates(record, "h100")


@pytest.mark.parametrize("name", CHIPS)
def test_the_table_agrees_with_that_of_chips(name: str):
    chip, device = CHIPS[name], DEVICES[name]
    assert device.bandwidth == pytest.approx(chip.bandwidth * chip.devices, rel=0.03)
    assert device.flops == pytest.approx(chip.flops * chip.devices, rel=0.001)
    assert device.memory_gb * 1e9 == pytest.approx(chip.memory_bytes * chip.devices, rel=0.08)


def test_each_figure_of_the_table_has_a_source():
    for device in DEVICES.values():
        assert device.price_source and device.watts_source and device.speed_source
        assert device.price_date.startswith("2026-")
        assert device.system_watts >= device.chip_watts > 0
        assert device_in(device.name) is device
    estimated = {name for name, device in DEVICES.items() if device.watts_are_estimated}
    assert estimated == {"v5e", "v6e", "tpu7x"}
    assert round(DEVICES["tpu7x"].chip_watts) == 1_085


@pytest.mark.parametrize(
    "wrong",
    [
        {"prompt_tokens_per_s": float("nan")},
        {"prompt_tokens_per_s": -1.0},
        {"output_tokens_per_s": float("inf")},
        {"device": "0 x NVIDIA H100"},
    ],
)
def test_what_no_benchmark_can_have_measured_is_refused(wrong: dict[str, Any]):
    with pytest.raises(ConfigError, match="cannot be"):
        read_rates(SERVE | wrong, "h100")
