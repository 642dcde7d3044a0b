"""`jaxserve cost RESULT.json`: what a million tokens cost, by a benchmark, prices and power.

python -m jaxserve bench serve … > result.json
python -m jaxserve cost result.json --device h100 --compare v5e,v6e --utilisation 0.6
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxserve.bench import stats
from jaxserve.bench.figures import read_records
from jaxserve.bench.plot import grouped_bars
from jaxserve.errors import ConfigError
from jaxserve.metering.devices import DEVICES
from jaxserve.metering.tco import IDLE_SHARE, Cost, Prices, Rates, compare, read_rates


def add_cost(cost: argparse.ArgumentParser) -> None:
    """The arguments."""
    cost.add_argument(
        "result", type=Path, help="file that ends in a JSON line of bench serve/engine"
    )
    cost.add_argument("--device", default="", help="measured on; where the result does not say")
    cost.add_argument("--chips", type=int, default=0, help="how many; likewise")
    cost.add_argument(
        "--compare",
        default="",
        metavar="NAME,…",
        help=f"estimate others: {', '.join(DEVICES)}, all",
    )
    cost.add_argument(
        "--input-ratio",
        type=float,
        default=3.0,
        help="input tokens for each output token, of bench engine (default: 3)",
    )
    money = cost.add_argument_group("prices")
    for name, what in (
        ("price", "rent of a chip and hour, instead of the list price"),
        ("capital", "what a chip costs to buy, with its share of the host and network"),
        ("watts", "of a chip with its share of the host, as measured on average"),
    ):
        money.add_argument(
            f"--{name}", action="append", default=[], metavar="DEVICE=AMOUNT", help=what
        )
    money.add_argument("--years", type=float, default=4.0, help="to write capital off (default: 4)")
    money.add_argument(
        "--energy-price", type=float, help="a kWh (default: 0 if rented, 0.10 if bought)"
    )
    money.add_argument("--pue", type=float, default=1.2, help="of the building (default: 1.2)")
    money.add_argument("--people", type=float, default=0.0, help="a month, for these chips")
    money.add_argument("--carbon", type=float, default=0.0, help="grams of CO2 a kWh")
    money.add_argument(
        "--utilisation", type=float, default=1.0, help="share of capacity that is sold (default: 1)"
    )
    money.add_argument("--currency", default="USD", help="how amounts are called (default: USD)")
    out = cost.add_argument_group("output")
    out.add_argument("--json", action="store_true", help="a line of JSON instead of a table")
    out.add_argument("--csv", action="store_true", help="comma-separated values instead of a table")
    out.add_argument("--plot", type=Path, metavar="FILE.svg", help="also draw it")


def report(arguments: argparse.Namespace) -> int:
    """Writes the costs to stdout; returns the exit status.

    Raises:
        ConfigError: an argument or the result is wrong.
    """
    prices = _prices(arguments)
    rates = read_rates(
        read_records(arguments.result)[-1],
        arguments.device,
        arguments.chips,
        _positive("--input-ratio", arguments.input_ratio, zero=True),
    )
    names = list(DEVICES) if arguments.compare == "all" else _names(arguments.compare)
    costs = compare(rates, prices, names)
    if len(names) > 0 and len(costs) == 1 and names != [rates.device_name]:
        sys.stderr.write(
            "jaxserve cost: nothing bounds the measured device's speed here, so that it cannot be "
            "scaled: name it with --device\n"
        )
    if arguments.plot is not None:
        arguments.plot.write_text(_plot(costs, arguments.currency), encoding="utf-8")
    if arguments.json:
        sys.stdout.write(
            stats.json_line(_document(rates, prices, costs, arguments.currency)) + "\n"
        )
    elif arguments.csv:
        sys.stdout.write(_csv(costs))
    else:
        sys.stdout.write(_table(rates, prices, costs, arguments.currency))
    return 0


def _prices(arguments: argparse.Namespace) -> Prices:
    utilisation = _positive("--utilisation", arguments.utilisation)
    if utilisation > 1:
        raise ConfigError(f"--utilisation is a share between 0 and 1, not {utilisation:g}")
    if not 1 <= arguments.pue < float("inf"):
        raise ConfigError(f"--pue is 1 or more, not {arguments.pue:g}")
    if arguments.chips < 0:
        raise ConfigError(f"--chips is a number of chips, not {arguments.chips}")
    energy = arguments.energy_price
    return Prices(
        rent=_amounts("--price", arguments.price),
        capital=_amounts("--capital", arguments.capital),
        watts=_amounts("--watts", arguments.watts),
        years=_positive("--years", arguments.years),
        energy_per_kwh=None if energy is None else _positive("--energy-price", energy, zero=True),
        pue=arguments.pue,
        people_per_month=_positive("--people", arguments.people, zero=True),
        carbon_g_per_kwh=_positive("--carbon", arguments.carbon, zero=True),
        utilisation=utilisation,
    )


def _positive(option: str, value: float, *, zero: bool = False) -> float:
    if not (value > 0 or (zero and value == 0)) or value == float("inf"):
        raise ConfigError(f"{option} takes a number above 0, not {value:g}")
    return value


def _amounts(option: str, given: Sequence[str]) -> dict[str, float]:
    amounts = {}
    for word in given:
        name, _, amount = word.rpartition("=")
        try:
            amounts[name.lower() if name.lower() in DEVICES else name] = _positive(
                option, float(amount)
            )
        except ValueError:
            raise ConfigError(f"{option} takes DEVICE=AMOUNT, not {word!r}") from None
    return amounts


def _names(text: str) -> list[str]:
    return [name.strip().lower() for name in text.split(",") if name.strip()]


# ---------------------------------------------------------------------------- output

_COLUMNS: tuple[tuple[str, str], ...] = (
    ("input_tokens_per_s", "in tok/s"),
    ("output_tokens_per_s", "out tok/s"),
    ("hardware_per_hour", "hardware/h"),
    ("energy_per_hour", "energy/h"),
    ("people_per_hour", "people/h"),
    ("per_million", "/M tokens"),
    ("per_million_output", "/M output"),
    ("energy_j_per_token", "J/token"),
)


def _table(rates: Rates, prices: Prices, costs: Sequence[Cost], currency: str) -> str:
    alone = any(cost.per_million_input_alone is not None for cost in costs)
    columns = [*_COLUMNS]
    if alone:
        columns += [
            ("per_million_input_alone", "/M input alone"),
            ("per_million_output_alone", "/M output alone"),
        ]
    if prices.carbon_g_per_kwh:
        columns.append(("carbon_g_per_million", "g CO2/M"))
    rows = [
        [_label(cost), *(_number(getattr(cost, name)) for name, _ in columns)] for cost in costs
    ]
    ratio = rates.input_tokens_per_s / rates.output_tokens_per_s
    energy = prices.energy_per_kwh
    shown_energy = "0 (rented) or 0.10 (bought)" if energy is None else f"{energy:g}"
    lines = [
        f"Amounts in {currency}, at {prices.utilisation:.0%} utilisation; energy {shown_energy} a "
        f"kWh, PUE {prices.pue:g}; {ratio:.3g} input tokens for each output token.",
        "",
        stats.table(["device", *(title for _, title in columns)], rows),
        "",
        *(f"- {cost.device}: {_assumptions(cost, prices)}" for cost in costs),
    ]
    if any(cost.estimated for cost in costs):
        bound = (
            "the ratio of what bounds it (memory bandwidth or peak FLOPs)"
            if any(rates.decode_work)
            else "the smaller ratio of memory bandwidth and peak FLOPs (the result counts neither)"
        )
        lines += [
            "",
            f"* estimated from {rates.device_name} by {bound}, at the same share of that limit: "
            "measure before you buy. Whether the model fits is not looked at.",
        ]
    return "\n".join(lines) + "\n"


def _assumptions(cost: Cost, prices: Prices) -> str:
    device = DEVICES.get(cost.device)
    price = f"{cost.hardware_per_hour / cost.chips:.4g} a chip and hour ({cost.price_note})"
    if cost.device in prices.watts:
        return f"{price}; {cost.watts:.0f} W as given"
    if device is None:
        return f"{price}; power unknown: give --watts '{cost.device}=W'"
    kind = "estimate: " if device.watts_are_estimated else ""
    return (
        f"{price}; {cost.watts:.0f} W: {IDLE_SHARE:.0%} of at most {device.system_watts:.0f} W a "
        f"chip when idle, the rest by load ({kind}{device.watts_source})"
    )


def _label(cost: Cost) -> str:
    return f"{cost.chips} x {cost.device}{' *' if cost.estimated else ''}"


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 1_000 else f"{value:.3g}"


def _csv(costs: Sequence[Cost]) -> str:
    lines = io.StringIO()
    writer = csv.DictWriter(lines, [field.name for field in dataclasses.fields(Cost)])
    writer.writeheader()
    writer.writerows(dataclasses.asdict(cost) for cost in costs)
    return lines.getvalue()


def _document(rates: Rates, prices: Prices, costs: Sequence[Cost], currency: str) -> dict[str, Any]:
    used = [DEVICES[cost.device] for cost in costs if cost.device in DEVICES]
    return {
        "currency": currency,
        "measured": rates.device_name,
        "prices": prices,
        "costs": costs,
        "devices": used,
    }


def _plot(costs: Sequence[Cost], currency: str) -> str:
    """Bars of what a million tokens cost, by device."""
    return grouped_bars(
        "What a million tokens cost",
        [_label(cost) for cost in costs],
        [
            ("all tokens", [cost.per_million for cost in costs]),
            ("output tokens, input free", [cost.per_million_output for cost in costs]),
        ],
        f"{currency} a million tokens; * is an estimate",
        ".3g",
    )
