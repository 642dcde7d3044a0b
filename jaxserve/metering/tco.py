"""Total cost of ownership: what a million tokens cost, from how fast, how dear and how hungry.

    cost an hour = hardware (rent, or capital over its years) + energy × PUE + people
    cost a token = cost an hour / (tokens an hour × utilisation)

A benchmark is of one device. For others its rates are scaled by the roofline: the work a second
that was reached, over what bounds it there and here (Williams et al. 2009). That supposes the same
share of the limit on both, which no two devices give; such a row says that it is an estimate.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxserve.errors import ConfigError
from jaxserve.metering.devices import DEVICES, Device, device_in

HOURS_A_YEAR = 8_766.0
HOURS_A_MONTH = HOURS_A_YEAR / 12
#: Share of the most power that is taken with nothing to do; the rest goes with the load.
IDLE_SHARE = 0.3


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """What a benchmark measured, on all its chips together.

    Attributes:
        device: of the table; None for another, or where it is not known.
        device_name: as it is shown. chips: how many.
        input_tokens_per_s, output_tokens_per_s: at the same time.
        prefill_tokens_per_s, decode_tokens_per_s: each alone, where that was measured.
        prefill_work, decode_work: FLOPs and bytes a second while it did each; the same twice where
            they were not measured apart; zeros where nothing counted them.
        bandwidth, flops: limits of one chip: of the table, or measured in the same run.
    """

    device: Device | None
    device_name: str
    chips: int
    input_tokens_per_s: float
    output_tokens_per_s: float
    prefill_tokens_per_s: float | None = None
    decode_tokens_per_s: float | None = None
    prefill_work: tuple[float, float] = (0.0, 0.0)
    decode_work: tuple[float, float] = (0.0, 0.0)
    bandwidth: float | None = None
    flops: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Prices:
    """What things cost, in one currency.

    Attributes:
        rent: of a chip and hour, by device; the table's where a device is not in it.
        capital: of a chip with its share of everything else, by device: it is bought then.
        years: over which what is bought is written off, evenly, to nothing.
        energy_per_kwh: None: 0 for what is rented, since it is in the rent, and 0.10 for what is
            bought.
        pue: energy of the building over energy of its machines.
        watts: of a chip with its share of the host, on average, by device, as measured; else
            modelled from the most that it takes and the utilisation.
        people_per_month: for these chips.
        carbon_g_per_kwh: of the electricity.
        utilisation: share of the hours' capacity that is sold.
    """

    rent: Mapping[str, float]
    capital: Mapping[str, float]
    watts: Mapping[str, float]
    years: float = 4.0
    energy_per_kwh: float | None = None
    pue: float = 1.2
    people_per_month: float = 0.0
    carbon_g_per_kwh: float = 0.0
    utilisation: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """One device's row.

    Attributes:
        estimated: its rates are scaled from another device's.
        hardware_per_hour, energy_per_hour, people_per_hour: of all chips.
        price_note: where the hardware's price is from; watts: of all chips, on average.
        per_million_output: the whole cost over the output tokens, as if input were free;
            per_million: over input and output tokens together;
            per_million_input_alone, per_million_output_alone: of a machine that does only the
            one, where prefill and decode were measured apart.
        energy_j_per_token, carbon_g_per_million: over input and output tokens together.
    """

    device: str
    chips: int
    estimated: bool
    input_tokens_per_s: float
    output_tokens_per_s: float
    hardware_per_hour: float
    energy_per_hour: float
    people_per_hour: float
    price_note: str
    watts: float
    per_million: float
    per_million_output: float
    per_million_input_alone: float | None
    per_million_output_alone: float | None
    energy_j_per_token: float
    carbon_g_per_million: float

    @property
    def per_hour(self) -> float:
        """All of it."""
        return self.hardware_per_hour + self.energy_per_hour + self.people_per_hour


# ---------------------------------------------------------------------------- benchmarks


def read_rates(
    record: Mapping[str, Any], device: str = "", chips: int = 0, input_ratio: float = 3.0
) -> Rates:
    """Rates out of the record of `bench serve` or `bench engine`.

    Args:
        device, chips: where the record does not say.
        input_ratio: input tokens for each output token, where the two were measured apart.

    Raises:
        ConfigError: it is neither, or measured nothing.
    """
    told = str(record.get("device", ""))
    said = device or told.rpartition(" x ")[2]
    known = DEVICES.get(device.lower()) or device_in(said)
    count = chips or _chips_in(told)
    try:
        if record["benchmark"] == "serve":
            rates = _serve_rates(record, known, said, count)
        elif record["benchmark"] == "engine":
            rates = _engine_rates(record, known, said, count, input_ratio)
        else:
            raise ConfigError(f"costs are of bench serve or engine, not of {record['benchmark']}")
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ConfigError(f"the benchmark's record cannot be read: {error!r}") from error
    measured = (rates.input_tokens_per_s, rates.output_tokens_per_s)
    if rates.chips < 1 or not all(0 <= rate < float("inf") for rate in measured):
        raise ConfigError(
            f"the benchmark's record cannot be: {measured[0]:g} input and {measured[1]:g} output "
            f"tokens a second on {rates.chips} chips"
        )
    if not rates.output_tokens_per_s > 0:
        raise ConfigError("the benchmark answered no token, so that none has a cost")
    return rates


def _serve_rates(record: Mapping[str, Any], known: Device | None, said: str, chips: int) -> Rates:
    work = (float(record.get("flops_per_s") or 0.0), float(record.get("bytes_per_s") or 0.0))
    return Rates(
        device=known,
        device_name=known.name if known else said or "this device",
        chips=chips,
        input_tokens_per_s=float(record["prompt_tokens_per_s"]),
        output_tokens_per_s=float(record["output_tokens_per_s"]),
        prefill_work=work,
        decode_work=work,
        bandwidth=known.bandwidth if known else None,
        flops=known.flops if known else None,
    )


def _engine_rates(
    record: Mapping[str, Any], known: Device | None, said: str, chips: int, input_ratio: float
) -> Rates:
    """The fastest decode, and prefill, one after the other in the time that the mix takes."""
    cases = record["cases"]
    decode = max((c for c in cases if c["kind"] == "decode"), key=lambda c: c["tokens_per_s"])
    prefill = max((c for c in cases if c["kind"] == "prefill"), key=lambda c: c["tokens_per_s"])
    read, peak = float(record["read_bytes_per_s"]), float(record["matmul_flops_per_s"])
    decode_rate, prefill_rate = float(decode["tokens_per_s"]), float(prefill["tokens_per_s"])
    output_rate = 1.0 / (1.0 / decode_rate + input_ratio / prefill_rate)

    def work(case: Mapping[str, Any]) -> tuple[float, float]:
        return float(case["mfu"]) * peak, float(case["mbu"]) * read

    return Rates(
        device=known,
        device_name=known.name if known else said or "this device",
        chips=chips,
        input_tokens_per_s=input_ratio * output_rate,
        output_tokens_per_s=output_rate,
        prefill_tokens_per_s=prefill_rate,
        decode_tokens_per_s=decode_rate,
        prefill_work=work(prefill),
        decode_work=work(decode),
        bandwidth=known.bandwidth if known else read / chips,
        flops=known.flops if known else peak / chips,
    )


def _chips_in(said: str) -> int:
    """How many devices a benchmark's "8 x NVIDIA H100 …" has; half as many chips of a TPU7x."""
    number, times, _ = said.partition(" x ")
    count = int(number) if times and number.isdigit() else 1
    device = device_in(said)
    return max(1, count // 2) if device is not None and device.name == "tpu7x" else count


def scaled(rates: Rates, device: Device) -> Rates | None:
    """An estimate of the same on as many chips of another device; None where nothing bounds it."""
    if not rates.bandwidth or not rates.flops:
        return None
    decode = _speedup(rates, rates.decode_work, device)
    prefill = _speedup(rates, rates.prefill_work, device, compute_bound=True)
    if rates.prefill_tokens_per_s is None or rates.decode_tokens_per_s is None:
        # One mix was measured: what bounds the whole of it is scaled, not its parts.
        speedup = decode if any(rates.decode_work) else min(decode, prefill)
        return _on(rates, device, speedup * rates.input_tokens_per_s, speedup)
    decode_rate = decode * rates.decode_tokens_per_s
    prefill_rate = prefill * rates.prefill_tokens_per_s
    ratio = rates.input_tokens_per_s / rates.output_tokens_per_s
    output_rate = 1.0 / (1.0 / decode_rate + ratio / prefill_rate)
    return _on(
        rates,
        device,
        ratio * output_rate,
        output_rate / rates.output_tokens_per_s,
        prefill_rate,
        decode_rate,
    )


def _on(
    rates: Rates,
    device: Device,
    input_rate: float,
    speedup: float,
    prefill_rate: float | None = None,
    decode_rate: float | None = None,
) -> Rates:
    return Rates(
        device=device,
        device_name=device.name,
        chips=rates.chips,
        input_tokens_per_s=input_rate,
        output_tokens_per_s=speedup * rates.output_tokens_per_s,
        prefill_tokens_per_s=prefill_rate,
        decode_tokens_per_s=decode_rate,
        bandwidth=device.bandwidth,
        flops=device.flops,
    )


def _speedup(
    rates: Rates, work: tuple[float, float], device: Device, *, compute_bound: bool = False
) -> float:
    """How much sooner the other device's limits let the same work be done."""
    assert rates.bandwidth and rates.flops
    flops, bytes_ = work
    if not flops and not bytes_:  # nothing counted it: decoding is bound by memory
        return device.flops / rates.flops if compute_bound else device.bandwidth / rates.bandwidth
    here = max(flops / rates.flops, bytes_ / rates.bandwidth)
    there = max(flops / device.flops, bytes_ / device.bandwidth)
    return here / there


# ---------------------------------------------------------------------------- costs


def cost_of(rates: Rates, prices: Prices, *, estimated: bool = False) -> Cost:
    """What tokens cost at these rates.

    Raises:
        ConfigError: the device has no price: it is not of the table, and none was given.
    """
    name, device = rates.device_name, rates.device
    bought = name in prices.capital
    if bought:
        chip_hour = prices.capital[name] / (prices.years * HOURS_A_YEAR)
        note = f"bought, over {prices.years:g} years"
    elif name in prices.rent:
        chip_hour, note = prices.rent[name], "as given"
    elif device is not None:
        chip_hour = device.price_per_hour
        note = f"{device.price_source}, {device.price_date}"
    else:
        raise ConfigError(
            f"{name!r} has no list price here: give one an hour and chip with --price "
            f"'{name}=AMOUNT', or what it costs to buy with --capital '{name}=AMOUNT'"
        )
    chip_watts = _watts(name, device, prices)
    kwh_an_hour = chip_watts * rates.chips * prices.pue / 1_000
    energy_price = prices.energy_per_kwh
    if energy_price is None:
        energy_price = 0.10 if bought else 0.0
    hardware = chip_hour * rates.chips
    energy = kwh_an_hour * energy_price
    people = prices.people_per_month / HOURS_A_MONTH
    hourly = hardware + energy + people
    output_hour = rates.output_tokens_per_s * 3_600 * prices.utilisation
    token_hour = output_hour + rates.input_tokens_per_s * 3_600 * prices.utilisation
    return Cost(
        device=name,
        chips=rates.chips,
        estimated=estimated,
        input_tokens_per_s=rates.input_tokens_per_s,
        output_tokens_per_s=rates.output_tokens_per_s,
        hardware_per_hour=hardware,
        energy_per_hour=energy,
        people_per_hour=people,
        price_note=note,
        watts=chip_watts * rates.chips,
        per_million=hourly / token_hour * 1e6,
        per_million_output=hourly / output_hour * 1e6,
        per_million_input_alone=_alone(hourly, rates.prefill_tokens_per_s, prices),
        per_million_output_alone=_alone(hourly, rates.decode_tokens_per_s, prices),
        energy_j_per_token=kwh_an_hour * 3.6e6 / token_hour,
        carbon_g_per_million=kwh_an_hour * prices.carbon_g_per_kwh / token_hour * 1e6,
    )


def compare(rates: Rates, prices: Prices, devices: list[str]) -> list[Cost]:
    """The measured device's row, then estimates of others.

    Args:
        devices: their names, of `DEVICES`.

    Raises:
        ConfigError: the measured device has no price, or there is no such device.
    """
    costs = [cost_of(rates, prices)]
    for name in devices:
        if name not in DEVICES:
            raise ConfigError(f"there is no device {name!r} here; there are {', '.join(DEVICES)}")
        if rates.device is not None and name == rates.device.name:
            continue
        other = scaled(rates, DEVICES[name])
        if other is not None:
            costs.append(cost_of(other, prices, estimated=True))
    return costs


def _watts(name: str, device: Device | None, prices: Prices) -> float:
    """Of one chip and its share of the host, on average."""
    if name in prices.watts:
        return prices.watts[name]
    if device is None:
        return 0.0
    return device.system_watts * (IDLE_SHARE + (1 - IDLE_SHARE) * prices.utilisation)


def _alone(hourly: float, rate: float | None, prices: Prices) -> float | None:
    if rate is None:
        return None
    return hourly / (rate * 3_600 * prices.utilisation) * 1e6
